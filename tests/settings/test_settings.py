"""Settings as a user meets them: what is accepted, what is refused in one line, and what follows from them."""

import ast
from pathlib import Path
from typing import Any

import pytest

from vlarl_rllib.config import VLAPPOConfig
from vlarl_rllib.envs.registry import suites
from vlarl_rllib.models.family import load_family
from vlarl_rllib.settings import Role, RuntimeArgs, Settings, calculate_runtime_args, known_keys
from vlarl_rllib.settings.published import PUBLISHED_MODELS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vlarl_rllib"
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

DOCUMENTED = """
model:      {path: tiny, unnorm_key: null, center_crop: null, dtype: float32, lora: null, critic: shared_head}
env:        {name: libero, suite: libero_spatial, tasks: [0, 1], num_envs: 4, num_processes: null, models_per_process: 1, max_steps: null, fast_render: false}
rollout:    {num_runners: 1, steps_per_iteration: 128, temperature: null, async_mode: false, max_staleness: 1}
engines:    {num: 1, gpus: 0, dtype: float32, max_batch: 64}          # num: 0 = in-process Hugging Face sampler
learners:   {num: 1, gpus: 0, micro_batch_size: 16, fsdp: {mesh: [1, -1], cpu_offload: false, checkpoint_activations: false}}
training:   {lr: 1.0e-5, value_lr: 1.0e-4, gamma: 0.99, gae_lambda: 0.95, clip_low: 0.2, clip_high: 0.28, vf_clip: 0.2, entropy_coeff: 0.0, kl_coeff: 0.0, grad_clip: 1.0,
             minibatch_size: 64, num_epochs: 1, ratio: action, old_log_probs: behaviour, normalize_advantages: true, whiten_rewards: false, critic_warmup_iterations: 0}
weights:    {transport: auto, bucket_mb: 256}
rewards:    {success: 1.0}
curriculum: {kind: fixed}
evaluation: {every: 0, episodes: 64}       # every 0 = before and after only; episodes 0 = none
run:        {iterations: 10, checkpoint_every: 5, keep_checkpoints: 2, seed: 0, wandb: null}
"""  # noqa: E501
"""The layout that the documentation promises, with every key at its default but `env.tasks`."""


def settings(**sections: dict[str, Any]) -> Settings:
    return Settings.from_dict(sections)


def plan(**sections: dict[str, Any]) -> RuntimeArgs:
    return calculate_runtime_args(settings(**sections), cores=2)


# What is accepted


def test_there_are_configs() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_file_loads_and_has_a_plan(path: Path) -> None:
    assert calculate_runtime_args(Settings.from_yaml(path)).steps_per_iteration > 0


def test_defaults_are_valid_and_survive_a_round_trip() -> None:
    defaults = settings()
    assert calculate_runtime_args(defaults, cores=2).num_slots == 4
    assert Settings.from_dict(defaults.to_dict()) == defaults


def test_the_documented_layout_is_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "documented.yaml"
    file.write_text(DOCUMENTED)
    assert Settings.from_yaml(file) == settings(env={"tasks": [0, 1]})


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("# nothing yet\n")
    assert Settings.from_yaml(file) == settings()


def test_settings_cannot_be_changed_behind_the_validation() -> None:
    with pytest.raises(ValueError, match="frozen"):
        settings().training.lr = 1.0  # type: ignore[misc]


def test_every_key_has_a_description() -> None:
    assert [key for key, description in known_keys().items() if not description.endswith(".")] == []


# What follows from the settings


def test_sizes_of_one_iteration() -> None:
    # slots 2 x 3 = 6; steps 6 x 10 = 60; minibatches ceil(60 / 25) = 3, twice = 6 optimiser steps;
    # each of 2 learners has 12.5 steps of a minibatch, in micro batches of 4: ceil(12.5 / 4) = 4.
    result = plan(
        env={"num_envs": 3},
        rollout={"num_runners": 2, "steps_per_iteration": 10},
        learners={"num": 2, "micro_batch_size": 4},
        training={"minibatch_size": 25, "num_epochs": 2},
    )
    assert (result.num_slots, result.steps_per_iteration) == (6, 60)
    assert (result.num_minibatches, result.optimizer_steps, result.micro_batches) == (3, 6, 4)


def test_learning_in_the_driver_counts_as_one_learner() -> None:
    # 64 steps of a minibatch in micro batches of 16.
    result = plan(learners={"num": 0})
    assert (result.micro_batches, result.mesh) == (4, (1, 1))


@pytest.mark.parametrize(
    ("num", "mesh", "expected"),
    [
        (1, (1, -1), (1, 1)),
        (4, (1, -1), (1, 4)),
        (4, (2, -1), (2, 2)),
        (4, (-1, 1), (4, 1)),
        (6, (-1, 3), (2, 3)),
        (8, (2, 4), (2, 4)),
    ],
)
def test_mesh_is_filled_up(num: int, mesh: tuple[int, int], expected: tuple[int, int]) -> None:
    assert plan(learners={"num": num, "fsdp": {"mesh": mesh}}, env={"num_envs": 8}).mesh == expected


@pytest.mark.parametrize(
    ("num_envs", "num_engines", "max_batch", "expected"),
    [(20, 1, 64, 20), (20, 1, 8, 8), (21, 2, 64, 11), (4, 0, 64, 4)],
)
def test_an_engine_makes_room_for_its_share_of_the_slots(
    num_envs: int, num_engines: int, max_batch: int, expected: int
) -> None:
    chosen = settings(env={"num_envs": num_envs}, engines={"num": num_engines, "max_batch": max_batch})
    assert calculate_runtime_args(chosen).engine_batch == expected
    assert VLAPPOConfig.from_settings(chosen).engine_spec().max_batch == expected


@pytest.mark.parametrize(
    ("num_envs", "num_processes", "cores", "expected"),
    [(4, None, 2, 2), (4, None, 16, 4), (4, 3, 2, 3), (1, None, 2, 1), (4, 4, 1, 4)],
)
def test_processes_are_cores_at_most_slots(num_envs: int, num_processes: int | None, cores: int, expected: int) -> None:
    env = {"num_envs": num_envs, "num_processes": num_processes}
    assert calculate_runtime_args(settings(env=env), cores=cores).num_processes == expected


def test_every_actor_has_a_bundle_and_runners_are_where_rllib_looks_for_them() -> None:
    result = plan(
        rollout={"num_runners": 2, "cpus_per_runner": 3},
        learners={"num": 2, "cpus": 2, "gpus": 0.5},
        rewards={"process": 0.5, "judge": "judge", "judge_cpus": 2, "judge_gpus": 0.25},
        engines={"num": 2, "cpus": 4, "gpus": 1},
    )
    assert [(bundle.role.value, bundle.resources) for bundle in result.bundles] == [
        ("algorithm", {"CPU": 1.0}),
        ("runner", {"CPU": 3.0}),
        ("runner", {"CPU": 3.0}),
        ("learner", {"CPU": 2.0, "GPU": 0.5}),
        ("learner", {"CPU": 2.0, "GPU": 0.5}),
        ("reward worker", {"CPU": 2.0, "GPU": 0.25}),
        ("engine", {"CPU": 4.0, "GPU": 1.0}),
        ("engine", {"CPU": 4.0, "GPU": 1.0}),
    ]
    assert (result.total_cpus, result.total_gpus) == (1 + 6 + 4 + 2 + 8, 1 + 0.25 + 2)  # 21 CPUs, 3.25 GPUs
    assert result.bundle_of(Role.ALGORITHM) == 0
    assert [result.bundle_of(Role.RUNNER, number - 1) for number in (1, 2)] == [1, 2]  # RLlib: by the runner's number
    assert [result.bundle_of(Role.LEARNER, rank) for rank in (0, 1)] == [3, 4]
    assert result.bundle_of(Role.REWARD_WORKER) == 5
    assert [result.bundle_of(Role.ENGINE, index) for index in (0, 1)] == [6, 7]
    with pytest.raises(IndexError):
        result.bundle_of(Role.ENGINE, 2)


def test_what_is_not_there_has_no_bundle() -> None:
    result = plan(learners={"num": 1}, engines={"num": 1})
    assert [bundle.role for bundle in result.bundles] == [Role.ALGORITHM, Role.RUNNER, Role.LEARNER, Role.ENGINE]
    assert (result.bundle_of(Role.LEARNER), result.bundle_of(Role.ENGINE)) == (2, 3)
    without = result.only(Role.RUNNER, Role.ENGINE)
    assert [bundle.role for bundle in without.bundles] == [Role.RUNNER, Role.ENGINE] and without.total_cpus == 2.0


def test_without_learner_actors_the_driver_takes_their_resources() -> None:
    result = plan(learners={"num": 0, "cpus": 2, "gpus": 1}, engines={"num": 0})
    assert result.bundles == ((Role.ALGORITHM, {"CPU": 2.0, "GPU": 1.0}, {}), (Role.RUNNER, {"CPU": 1.0}, {}))


@pytest.mark.parametrize(
    ("section", "role", "others"),
    [
        ("algorithm", Role.ALGORITHM, {"CPU": 1.0}),
        ("runners", Role.RUNNER, {"CPU": 3.0}),
        ("learners", Role.LEARNER, {"CPU": 1.0, "GPU": 0.5}),
        ("reward_worker", Role.REWARD_WORKER, {"CPU": 1.0}),
        ("engines", Role.ENGINE, {"CPU": 1.0, "GPU": 1.0}),
    ],
)
def test_what_is_asked_for_a_role_is_in_its_bundles_alone(section: str, role: Role, others: dict[str, float]) -> None:
    crew: dict[str, Any] = {
        "rollout": {"num_runners": 2, "cpus_per_runner": 3},
        "learners": {"num": 2, "gpus": 0.5},
        "rewards": {"process": 0.5, "judge": "judge"},
        "engines": {"num": 2, "gpus": 1},
    }
    place = {"resources": {"farm": 0.5, "memory": 1e9}, "labels": {"zone": "in(a, b)"}}
    result, without = plan(**crew, placement={section: place}), plan(**crew)
    for bundle, before in zip(result.bundles, without.bundles, strict=True):
        if bundle.role is role:
            assert (bundle.resources, bundle.labels) == (others | place["resources"], place["labels"])
            assert bundle.options == {"memory": 1e9, "resources": {"farm": 0.5}, "label_selector": place["labels"]}
        else:
            assert bundle == before and not bundle.labels and set(bundle.resources) <= {"CPU", "GPU"}


def test_learning_in_the_driver_lies_where_the_algorithm_does() -> None:
    result = plan(
        learners={"num": 0, "gpus": 1},
        placement={"algorithm": {"resources": {"big": 1}}, "learners": {"resources": {"farm": 1}}},
    )
    assert result.bundles[0] == (Role.ALGORITHM, {"CPU": 1.0, "GPU": 1.0, "big": 1.0}, {})
    assert not any("farm" in bundle.resources for bundle in result.bundles)


@pytest.mark.parametrize(
    ("env", "num_runners", "expected"),
    [
        # One task for all.
        ({"tasks": [7], "num_envs": 3}, 2, ((7, 7, 7), (7, 7, 7))),
        # As many tasks as models of the one runner: in turn.
        ({"tasks": [4, 6], "num_envs": 4, "num_processes": 2}, 1, ((4, 6, 4, 6),)),
        # Two runners share four tasks, two each.
        ({"tasks": [0, 1, 2, 3], "num_envs": 2, "num_processes": 2}, 2, ((0, 1), (2, 3))),
        # Three tasks on two runners: two each, the first one twice.
        ({"tasks": [5, 6, 7], "num_envs": 3, "num_processes": 2}, 2, ((5, 6, 5), (7, 5, 7))),
        # More runners than tasks: they take turns.
        ({"tasks": [8, 9], "num_envs": 1}, 3, ((8,), (9,), (8,))),
        # One process with three models.
        ({"tasks": [0, 1, 2], "num_envs": 4, "num_processes": 1, "models_per_process": 3}, 1, ((0, 1, 2, 0),)),
    ],
)
def test_tasks_are_spread_over_runners_and_slots(
    env: dict[str, Any], num_runners: int, expected: tuple[tuple[int, ...], ...]
) -> None:
    assert plan(env=env, rollout={"num_runners": num_runners}).slot_tasks == expected


@pytest.mark.parametrize("num_tasks", range(1, 11))
@pytest.mark.parametrize(
    ("num_runners", "num_envs", "num_processes", "models"),
    [(1, 10, 2, 5), (2, 5, 5, 1), (3, 4, 2, 2), (4, 3, 1, 3), (10, 2, 1, 1)],
)
def test_every_task_is_played_within_the_models_allowed(
    num_tasks: int, num_runners: int, num_envs: int, num_processes: int, models: int
) -> None:
    result = plan(
        env={
            "tasks": list(range(num_tasks)),
            "num_envs": num_envs,
            "num_processes": num_processes,
            "models_per_process": models,
        },
        rollout={"num_runners": num_runners},
    )
    assert {task for tasks in result.slot_tasks for task in tasks} == set(range(num_tasks))
    assert [len(tasks) for tasks in result.slot_tasks] == [num_envs] * num_runners
    assert all(len(set(tasks)) <= num_processes * models for tasks in result.slot_tasks)


def test_a_number_means_so_many_of_the_first_tasks() -> None:
    result = settings(
        env={"tasks": 3, "num_envs": 3, "num_processes": 1, "models_per_process": 3}, collect={"tasks": 5}
    )
    assert result.task_ids == [0, 1, 2] and calculate_runtime_args(result).demonstrated_tasks == (0, 1, 2, 3, 4)


def test_null_means_all_tasks_of_the_suite() -> None:
    env = {"suite": "libero_90", "tasks": None, "num_envs": 90, "num_processes": 2, "models_per_process": 45}
    assert settings(env=env).task_ids == list(range(90))


@pytest.mark.parametrize(
    ("tasks", "episodes", "expected"), [([0], 64, 10), ([0, 1], 64, 20), ([0, 1], 7, 7), ([0], 0, 0)]
)
def test_an_evaluation_plays_each_held_out_start_once(tasks: list[int], episodes: int, expected: int) -> None:
    # 10 of LIBERO's 50 starts of a task are held out.
    assert plan(env={"tasks": tasks}, evaluation={"episodes": episodes}).evaluation_episodes == expected


@pytest.mark.parametrize(
    ("path", "key", "crop", "temperature"),
    [
        ("openvla-7b", "bridge_orig", False, 1.0),
        ("openvla/openvla-7b", "bridge_orig", False, 1.0),
        ("openvla-7b-finetuned-libero-spatial", "libero_spatial", True, 1.5),
        ("openvla/openvla-7b-finetuned-libero-object", "libero_object", True, 1.5),
        ("openvla-7b-finetuned-libero-goal", "libero_goal", True, 1.5),
        ("openvla/openvla-7b-finetuned-libero-10", "libero_10", True, 1.5),
        # Presets, directories and others' checkpoints: the suite's statistics.
        ("tiny", "libero_goal", True, 1.0),
        ("checkpoints/openvla-7b", "libero_goal", True, 1.0),
        ("someone/openvla-7b", "libero_goal", True, 1.0),
    ],
)
def test_null_means_what_fits_the_model(path: str, key: str, crop: bool, temperature: float) -> None:
    result = settings(model={"path": path}, env={"suite": "libero_goal"})
    assert (result.unnorm_key, result.center_crop, result.temperature) == (key, crop, temperature)
    assert Settings.from_dict(result.to_dict()) == result
    assert settings(env={"name": "tabletop"}).unnorm_key == "tabletop"


@pytest.mark.parametrize("path", ["tiny", "openvla-7b", "openvla-7b-finetuned-libero-spatial"])
def test_what_is_said_wins_over_what_fits_the_model(path: str) -> None:
    result = settings(
        model={"path": path, "unnorm_key": "my_robot", "center_crop": path == "openvla-7b"},
        rollout={"temperature": 0.7},
    )
    assert (result.unnorm_key, result.center_crop, result.temperature) == ("my_robot", path == "openvla-7b", 0.7)


def test_published_models_fit_the_suites_and_vllm() -> None:
    assert {model.unnorm_key for model in PUBLISHED_MODELS.values()} == {"bridge_orig", *suites("libero")} - {
        "libero_90"
    }
    for name, model in PUBLISHED_MODELS.items():
        assert model.hub_id.partition("/")[2] == name and load_family(model.family).name in ("openvla", "openvla_oft")
        # An explicit value of the same size is accepted.
        assert settings(rollout={"temperature": model.temperature}).temperature == model.temperature


# No key without an effect

PLACED: dict[str, dict[str, Any]] = {
    **{role: {} for role in ("algorithm", "runners", "learners", "engines")},
    "reward_worker": {"rewards": {"process": 0.5, "judge": "judge"}},
}
"""Roles of `placement`, and what there must be for somebody to have them."""
THROUGH_PLAN: dict[str, tuple[dict[str, Any], str]] = {
    "env.tasks": ({"env": {"tasks": [3]}}, "slot_tasks"),
    "env.num_processes": ({"env": {"num_processes": 1}}, "num_processes"),
    "engines.max_batch": ({"engines": {"max_batch": 2}}, "engine_batch"),
    "learners.fsdp.mesh": ({"learners": {"num": 2, "fsdp": {"mesh": [2, 1]}}}, "mesh"),
    "placement.strategy": ({"placement": {"strategy": "SPREAD"}}, "strategy"),
    **{
        f"placement.{role}.{key}": ({"placement": {role: {key: value}}, **more}, "bundles")
        for role, more in PLACED.items()
        for key, value in (("resources", {"farm": 1}), ("labels", {"zone": "a"}))
    },
    "collect.tasks": ({"collect": {"tasks": [1]}}, "demonstrated_tasks"),
    "evaluation.episodes": ({"evaluation": {"episodes": 3}}, "evaluation_episodes"),
}
"""Keys that others read as a field of `RuntimeArgs`: key -> (settings with another value, the field)."""
THROUGH_FAMILY = {"num_images": 2, "proprio": True, "chunk": 4, "stop_token": False, "l1_head": True}
"""Of `model.oft`, other values, which others read as `family_reference`."""


def attributes_read_outside_settings() -> set[tuple[str, str]]:
    """(`x`, `y`) of every `x.y` and `....x.y` in the package, the settings themselves apart."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        for node in (
            ast.walk(ast.parse(file.read_text())) if file.parent.name != "settings" and file.name != "plan.py" else ()
        ):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                found.add(
                    (
                        owner.id
                        if isinstance(owner, ast.Name)
                        else owner.attr
                        if isinstance(owner, ast.Attribute)
                        else "",
                        node.attr,
                    )
                )
    return found


READ = attributes_read_outside_settings()


@pytest.mark.parametrize(
    "key",
    list(known_keys()),
)
def test_no_key_without_an_effect(key: str) -> None:
    """The key is read somewhere: as `<section>.<key>`, as `settings.<key>` where a function takes one section, or
    through the plan.

    Necessary, not sufficient: that what was read also does something is for the other tests to show.
    """
    *_, section, leaf = key.split(".")
    if key in THROUGH_PLAN:
        values, field = THROUGH_PLAN[key]
        without = {name: {k: v for k, v in part.items() if k == "num"} for name, part in values.items()}
        assert getattr(plan(**values), field) != getattr(plan(**without), field)
        assert any(name == field for _, name in READ)
    elif section == "oft":
        reference = settings(
            model={"family": "openvla_oft", "oft": {leaf: THROUGH_FAMILY[leaf]}}
        ).model.family_reference
        assert any(name == "family_reference" for _, name in READ)
        assert reference and load_family(reference) is not load_family("openvla_oft")
    else:
        assert {(section, leaf), ("settings", leaf)} & READ
