"""A family that the package knows nothing of trains: three actions a decision, in one pass, in this process and in an
engine actor; an installed package's family is found by its name."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.rllib.callbacks.callbacks import RLlibCallback

from tests.families.pointer_policy import ACTIONS, PointerFamily, write_checkpoint
from vlarl_rllib import VLAPPOConfig
from vlarl_rllib.evaluation.libero_protocol import EvaluationRequest
from vlarl_rllib.models.family import family_name
from vlarl_rllib.process.plugins import added_by_packages
from vlarl_rllib.runs.checkpoints import FACTS_FILE, CheckpointStore
from vlarl_rllib.runs.export import find_training_checkpoint
from vlarl_rllib.runs.preflight import check
from vlarl_rllib.settings import Settings, SettingsError
from vlarl_rllib.types import DURATION_KEY, LOG_PROBS_KEY, STEP_REWARDS_KEY

HERE = Path(__file__).parent
POINTER = "tests.families.pointer_policy:PointerFamily"
SLOTS, DECISIONS, ITERATIONS = 4, 12, 2
GAMMA = 0.5


class PointerFamilyInVLLM(PointerFamily):
    """What cannot be: vLLM samples one token after the other."""

    vllm_model = "pointer_policy:NeverImported"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pointer") / "checkpoint"
    write_checkpoint(directory)
    return directory


def settings(checkpoint: Path, **changes: dict[str, Any]) -> Settings:
    values: dict[str, dict[str, Any]] = {
        "model": {
            "path": str(checkpoint),
            "family": POINTER,
            "unnorm_key": "pointing",
        },
        "env": {"name": "synthetic", "num_envs": SLOTS, "num_processes": 1, "max_steps": 10},
        "rollout": {"steps_per_iteration": DECISIONS},
        "engines": {"num": 0, "max_batch": 3},
        "learners": {"num": 0, "micro_batch_size": 8},
        "training": {"minibatch_size": 24, "lr": 1e-3, "gamma": GAMMA, "ratio": "decision"},
        "evaluation": {"episodes": 4},
    }
    return Settings.from_dict({name: keys | changes.pop(name, {}) for name, keys in values.items()} | changes)


def make_callbacks(seen: Any) -> type[RLlibCallback]:
    """A class of this function, so that Ray ships it to the runners by value."""

    class Callbacks(RLlibCallback):
        def on_sample_end(self, *, samples: list[Any], **kwargs: Any) -> None:
            for fragment in samples:
                outputs = {
                    name: np.asarray(fragment.get_extra_model_outputs(name))
                    for name in (DURATION_KEY, STEP_REWARDS_KEY, LOG_PROBS_KEY)
                }
                facts = outputs | {
                    "tokens": np.asarray(fragment.get_actions()),
                    "rewards": np.asarray(fragment.get_rewards()),
                    "frames": len(fragment.get_observations()),
                    "success": fragment.custom_data.get("success"),
                    "length": fragment.custom_data["length"],
                    "ends": bool(fragment.is_done),
                }
                ray.get(seen.add.remote(facts))

    return Callbacks


@ray.remote(num_cpus=0)
class Seen:
    """What the runners handed over."""

    def __init__(self) -> None:
        self.fragments: list[dict[str, Any]] = []

    def add(self, facts: dict[str, Any]) -> None:
        self.fragments.append(facts)

    def all(self) -> list[dict[str, Any]]:
        return self.fragments


@pytest.mark.parametrize("num_engines", [0, 1])
def test_it_trains_end_to_end(num_engines: int, checkpoint: Path, ray_session: None) -> None:
    """Where there is an engine, with its values."""
    seen: Any = Seen.remote()
    chosen = settings(checkpoint, engines={"num": num_engines, "max_batch": 3})
    config = VLAPPOConfig.from_settings(chosen.replaced(training={"values": "engine" if num_engines else "learner"}))
    algorithm = config.callbacks(make_callbacks(seen)).build_algo()
    try:
        results = [algorithm.train() for _ in range(ITERATIONS)]
        fragments = ray.get(seen.all.remote())
    finally:
        algorithm.stop()

    durations = np.concatenate([fragment[DURATION_KEY] for fragment in fragments])
    assert len(durations) == ITERATIONS * SLOTS * DECISIONS, "the quota counts decisions"
    rows = [result["vlarl"] for result in results]
    assert [row["decisions"] for row in rows] == [SLOTS * DECISIONS] * ITERATIONS
    assert rows[-1]["env_steps"] == durations.sum() < 3 * len(durations)
    assert results[-1]["learners"]["__all_modules__"]["num_env_steps_trained_lifetime"] == durations.sum()
    assert results[-1]["env_runners"]["num_module_steps_sampled_lifetime"]["default_policy"] == len(durations)
    assert all(row["logprob_gap_max"] < 1e-5 and row["optimizer_steps"] == 2 for row in rows)
    assert rows[-1]["policy_version"] == ITERATIONS + 1
    gaps = [row["value_gap_max"] for row in rows if "value_gap_max" in row]
    assert len(gaps) == ITERATIONS * num_engines and all(gap < 1e-5 < abs(rows[-1]["value_mean"]) for gap in gaps)
    assert rows[0]["policy_loss"] != 0.0 and np.isfinite([row["value_loss"] for row in rows]).all()

    in_the_middle = 0
    for fragment in fragments:
        assert fragment["tokens"].shape == (len(fragment["rewards"]), ACTIONS.num_tokens)
        assert fragment["frames"] == len(fragment["rewards"]) + 1
        for position, (duration, steps) in enumerate(
            zip(fragment[DURATION_KEY], fragment[STEP_REWARDS_KEY], strict=True)
        ):
            last = fragment["ends"] and position == len(fragment["rewards"]) - 1
            assert duration == 3 or last, "only an end cuts a decision short"
            # success pays 1 at its environment step, discounted to the decision's first
            assert fragment["rewards"][position] == pytest.approx(sum(GAMMA**i * r for i, r in enumerate(steps)))
            assert steps[duration:].sum() == 0.0
        if fragment["ends"] and fragment["success"] and fragment[DURATION_KEY][-1] < 3:
            in_the_middle += 1
            assert fragment["rewards"][-1] == GAMMA ** (fragment[DURATION_KEY][-1] - 1)
        if fragment["ends"] and not fragment["success"]:
            assert fragment["length"] == 10, "the horizon counts environment steps"
    assert in_the_middle, "no episode succeeded in the middle of a decision"
    played = results[-1]["vlarl_details"]["evaluation"] or results[0]["vlarl_details"]["initial_evaluation"]
    assert 1 <= played["mean_length"] <= 10


def test_more_actions_than_a_decision_has_are_refused(checkpoint: Path) -> None:
    from vlarl_rllib.runs.preflight import check

    with pytest.raises(
        SettingsError, match=r"^rollout.execute_actions: 4 is more than the 3 action\(s\) of a decision"
    ):
        check(settings(checkpoint, rollout={"execute_actions": 4}))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a package with a family and a reward is installed."""
    site = tmp_path_factory.mktemp("site")
    information = site / "my_policies-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: my-policies\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        "[vlarl_rllib.families]\npointer = my_policies:PointerFamily\nlost = their_policies:Family\n"
        "[vlarl_rllib.rewards]\nstill = my_rewards:Still\n"
    )
    (site / "my_policies.py").symlink_to(HERE / "pointer_policy.py")
    (site / "my_rewards.py").write_text(
        "from vlarl_rllib.rewards import Reward\n\n"
        "class Still(Reward):\n    name = 'still'\n    every_frame = True\n\n"
        "    def __call__(self, episode):\n"
        "        assert len(episode.frames) == len(episode.actions) + 1, 'a frame behind each action'\n"
        "        return episode.per_decision(-abs(episode.actions[:, 0]))\n"
    )
    return site


@pytest.mark.slow  # tests/docs/test_extending.py has the same way in every run
def test_an_installed_package_adds_a_family_and_a_reward_by_name(checkpoint: Path, site: Path, tmp_path: Path) -> None:
    """In the processes of a command; two of a decision's three actions are played."""
    values = settings(
        checkpoint,
        run={"iterations": 2, "dashboard": False},
        rollout={"execute_actions": 2},
        rewards={"others": {"still": 0.5}},
    ).to_dict()
    values["model"]["family"] = None  # the checkpoint says it
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(json.dumps(values))
    command = [sys.executable, "-m", "vlarl_rllib", "train", str(config), "--run-dir", str(run)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[-1]["faults"]["reward_zeros"] == 0 and not (run / "reward_errors").exists()
    assert rows[-1]["reward_mean"] < 0, "the reward of the package has no effect"
    decisions = sum(row["decisions"] for row in rows)
    assert 1.5 * decisions < rows[-1]["env_steps"] <= 2 * decisions


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("model", {"family": "lost"}, "model.family is 'lost', but their_policies cannot be imported"),
        (
            "model",
            {"family": "pinter"},
            "model.family is 'pinter'; choose one of pointer, lost, openvla, openvla_oft, or name it",
        ),
        (
            "rewards",
            {"others": {"stil": 1.0}},
            "rewards.others names 'stil'; choose one of still, or name it as",
        ),
        (
            "rewards",
            {"others": {"my_rewards:Gone": 1.0}},
            "rewards.others names 'my_rewards:Gone', but my_rewards",
        ),
        (
            "model",
            {"critic": "separate", "critic_path": "tiny"},
            "model.critic_path: preset tiny is of the family openvla, not of model.family tests.families",
        ),
        ("model", {"family": "json:loads"}, "model.family is 'json:loads', but that is no vlarl_rllib.models.family"),
        ("model", {"family": "pathlib:Path", "path": "tiny"}, "model.family is 'pathlib:Path', but that is no"),
        (
            "model",
            {"family": "tests.families.test_family:PointerFamilyInVLLM"},
            "model.path: the family pointer has a `vllm_model`, and one pass gives",
        ),
        ("model", {"path": "tiny"}, "model.path: preset tiny is of the family openvla, not of model.family tests."),
        ("model", {"lora": {}}, "model.lora.targets: 'published' means nothing to the family pointer; choose one of"),
        ("rewards", {"others": {"json:loads": 1.0}}, "rewards.others names 'json:loads', but it cannot be made"),
        ("rewards", {"others": {"pathlib:Path": 1.0}}, "rewards.others names 'pathlib:Path', but that is no"),
        ("weights", {"transport": "pigeons:Loft"}, "weights.transport: 'pigeons:Loft': no such class, since pigeons"),
        ("weights", {"transport": "vlarl_rllib.types:Loft"}, "weights.transport: 'vlarl_rllib.types:Loft': no such"),
        ("weights", {"transport": "vlarl_rllib.types:EnvSpec"}, "weights.transport: 'vlarl_rllib.types:EnvSpec': the"),
        ("rollout", {"execute_actions": 4}, "rollout.execute_actions: 4 is more than the 3 action(s) of a decision of"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    section: str, values: dict[str, Any], message: str, checkpoint: Path, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(site)
    added_by_packages.cache_clear()
    try:
        with pytest.raises(SettingsError) as caught:
            check(settings(checkpoint, **{section: values}))
    finally:
        added_by_packages.cache_clear()
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("model", {"family": "no_such_module:Family"}),
        ("weights", {"transport": "no_such_module:Transport"}),
        ("rewards", {"others": {"no_such_module:Reward": 1.0}}),
    ],
)
def test_a_checkpoint_names_no_code(section: str, values: dict[str, Any]) -> None:
    written = Settings.from_dict({section: values}).to_dict()  # which imports nothing
    with pytest.raises(SettingsError, match=r"^runs/x: its settings name .* a checkpoint chooses no code"):
        Settings.from_checkpoint(written, "runs/x")


def test_who_looks_at_a_runs_checkpoint_names_its_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / FACTS_FILE).write_text("{}")
    written = Settings.from_dict({"model": {"family": POINTER}}).to_dict()
    monkeypatch.setattr(CheckpointStore, "resolve", lambda path: path)
    monkeypatch.setattr(CheckpointStore, "read_facts", lambda path: {"iteration": 3, "settings": written})
    with pytest.raises(SettingsError, match=rf"chooses no code; say --family {POINTER}$"):
        find_training_checkpoint(tmp_path)
    found = find_training_checkpoint(tmp_path, POINTER)
    assert found is not None and found.settings.model.family == POINTER


def test_a_model_type_that_is_no_word_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": ["openvla"]}))
    with pytest.raises(ValueError, match=r"model_type is \['openvla'\], must be 'openvla'"):
        family_name(str(tmp_path))


def test_an_evaluation_of_a_foreign_checkpoint_says_its_family(checkpoint: Path) -> None:
    request = EvaluationRequest(str(checkpoint), env="synthetic", unnorm_key="pointing", family=POINTER, engine="torch")
    request.check()
    assert request.settings(request.starts()[:1]).model.family == POINTER and request.question()["family"] == POINTER
    with pytest.raises(SettingsError, match=r"CHECKPOINT: .*model_type is 'pointer', must be 'openvla'"):
        replace(request, family=None).check()
