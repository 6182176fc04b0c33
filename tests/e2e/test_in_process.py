"""An algorithm in a script or notebook, without engines and learner actors: RLlib's own calls, and what a checkpoint
brings along."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray import tune
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.tune.utils import flatten_dict

from vlarl_rllib import VLAPPO, VLAPPOConfig
from vlarl_rllib.errors import DivergedError, SettingsError
from vlarl_rllib.learner import rank
from vlarl_rllib.learner.passes import PPOPasses
from vlarl_rllib.models.family import load_family
from vlarl_rllib.models.presets import resolve_model
from vlarl_rllib.observability.metrics import iteration_row
from vlarl_rllib.runs.checkpoints import CheckpointStore
from vlarl_rllib.settings import Settings

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
GIVEN: dict[str, dict[str, Any]] = {
    "env": {
        "name": "synthetic",
        "tasks": [0, 1],
        "num_envs": 2,
        "num_processes": 1,
        "models_per_process": 2,
        "max_steps": 8,
    },
    "rollout": {"steps_per_iteration": 2},  # too short for an episode to end in the first iteration
    "engines": {"num": 0},
    "learners": {"num": 0, "micro_batch_size": 16},
    "training": {"minibatch_size": 4, "lr": 1e-4},
    "evaluation": {"episodes": 4},
}


ITERATIONS = 6


def make_callbacks() -> type[RLlibCallback]:
    """A class of this function, so that Ray ships it to the runners by value."""

    class Callbacks(RLlibCallback):
        """Notes what is called, in the runners too."""

        def on_train_result(self, *, result: dict[str, Any], metrics_logger: Any, **kwargs: Any) -> None:
            result["noted"] = True
            metrics_logger.log_value("noted_percentile", 1.0, reduce="percentiles", window=10)

        def on_evaluate_end(self, *, algorithm: Any, evaluation_metrics: dict[str, Any], **kwargs: Any) -> None:
            algorithm.noted_evaluation = evaluation_metrics

        def on_checkpoint_loaded(self, *, algorithm: Any, **kwargs: Any) -> None:
            algorithm.noted_checkpoint = algorithm.iteration

        def on_episode_end(self, *, episode: Any, metrics_logger: Any, env_index: int, **kwargs: Any) -> None:
            metrics_logger.log_value("noted_length", float(episode.custom_data["length"]), reduce="mean", window=1)
            metrics_logger.log_value(
                "noted_pair", episode.get_rewards()[-2:], reduce="item_series", window=2
            )  # no checkpoint can keep it

    return Callbacks


def build(**changes: dict[str, Any]) -> VLAPPOConfig:
    values = GIVEN | {section: GIVEN.get(section, {}) | keys for section, keys in changes.items()}
    return VLAPPOConfig.from_settings(Settings.from_dict(values)).callbacks(make_callbacks())


def train_on(algorithm: VLAPPO) -> None:
    """Until the update has shown in sampling."""
    for _ in range(3):
        algorithm.train()


@pytest.fixture(scope="module")
def algorithm(ray_session: None) -> Iterator[VLAPPO]:
    algorithm = build().build_algo()
    yield algorithm
    algorithm.stop()


@pytest.fixture(scope="module")
def results(algorithm: VLAPPO) -> list[dict[str, Any]]:
    return [algorithm.train() for _ in range(ITERATIONS)]


@pytest.fixture(scope="module")
def saved(algorithm: VLAPPO, results: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "checkpoint"
    for _ in range(2):  # a second save replaces the first
        algorithm.save_to_path(directory)
    return directory


def test_every_iteration_has_the_same_numbers(results: list[dict[str, Any]]) -> None:
    """Tune's `stop`, schedulers and the CSV's header, which is the first row's, need them."""
    rows = [flatten_dict({"vlarl": result["vlarl"]}) for result in results]
    assert results[0]["vlarl_details"]["success_rate"] is None, "an episode ended, so nothing is tested here"
    assert results[-1]["vlarl"]["success_rate"] > 0
    assert all(row.keys() == rows[0].keys() for row in rows)
    assert all(isinstance(value, int | float) and value == value for row in rows for value in row.values())
    assert [row["vlarl/evaluation_success_rate"] for row in rows] == [
        results[0]["vlarl_details"]["initial_evaluation"]["success_rate"]
    ] * ITERATIONS


BY_NUMBER = ("success_rate_by_task", "staleness")
"""Whose keys are numbers of their own."""


def names_of(row: dict[str, Any]) -> set[str]:
    """Keys of a row of `metrics.jsonl`; those of what has several numbers behind a dot, but for tasks and ages."""
    names: set[str] = set()
    for name, value in row.items():
        inner = value if isinstance(value, dict) and name not in BY_NUMBER else {}
        names |= {f"{'evaluation' if name == 'initial_evaluation' else name}.{key}" for key in inner}
        names |= set() if inner and "evaluation" not in name else {name}
    return names


@pytest.fixture(scope="module")
def valued(ray_session: None) -> Iterator[list[dict[str, Any]]]:
    """The same run, and more of it, where the sampler gives the values."""
    algorithm = build(training={"values": "engine"}, evaluation={"episodes": 0}).build_algo()
    yield [algorithm.train() for _ in range(ITERATIONS + 2)]
    algorithm.stop()


def test_values_of_the_sampler_make_the_same_run(results: list[dict[str, Any]], valued: list[dict[str, Any]]) -> None:
    """All are 0 until an episode has ended, from then on what the critic has learned; the gap is over all decisions."""
    told = ("first_policy_loss", "first_value_loss", "advantage_abs_mean", "value_mean", "explained_variance")
    for result, expected in zip(valued, results, strict=False):
        row, first = result["vlarl"], expected["vlarl"]
        assert row["token_checksum"] == first["token_checksum"]
        assert {name: row[name] for name in told} == pytest.approx(
            {name: first[name] for name in told}, rel=1e-4, abs=1e-5
        )
        assert "value_gap_mean" not in first
    rows = [result["vlarl"] for result in valued]
    assert all(row["value_gap_mean"] <= row["value_gap_max"] < 1e-6 for row in rows)
    assert abs(rows[-1]["value_mean"]) > 1e-4


def test_the_page_on_metrics_explains_what_a_row_has(
    results: list[dict[str, Any]], valued: list[dict[str, Any]]
) -> None:
    """Both ways: nothing is missing there, and nothing is explained that there is not."""
    rows = PAGE.read_text().partition("## Exported")[0].splitlines()
    columns = [line.split(" | ")[0] for line in rows if line.startswith("| `")]
    explained = [name for column in columns for name in re.findall(r"`([\w.]+)`", column)]
    assert len(explained) == len(set(explained))
    assert set(explained) == set().union(*(names_of(iteration_row(result)) for result in (*results, *valued)))


def test_rates_are_amounts_over_seconds(results: list[dict[str, Any]]) -> None:
    for row in (result["vlarl"] for result in results):
        assert row["decisions_per_second"] == pytest.approx(row["decisions"] / row["seconds"]["sample"])
        assert row["env_steps_per_second"] == pytest.approx(row["decisions_per_second"]), "one action a decision"
        assert row["trained_samples_per_second"] == pytest.approx(row["trained_samples"] / row["seconds"]["update"])
        assert row["trained_samples"] == row["decisions"] * Settings.from_dict(GIVEN).training.num_epochs


def test_rllibs_own_numbers_are_there_from_the_first_iteration(results: list[dict[str, Any]]) -> None:
    wanted = {"episode_return_mean", "episode_len_mean", "num_episodes"}
    for result in results:
        assert wanted <= result["env_runners"].keys()


def test_callbacks_are_called(algorithm: VLAPPO, results: list[dict[str, Any]]) -> None:
    assert all(result["noted"] for result in results)
    assert algorithm.noted_evaluation == results[0]["vlarl_details"]["initial_evaluation"]
    assert 0 < results[-1]["env_runners"]["noted_length"] <= 8


def test_an_evaluation_can_be_asked_for(algorithm: VLAPPO, results: list[dict[str, Any]]) -> None:
    found = algorithm.evaluate()
    assert found["env_runners"]["num_episodes"] == found["vlarl"]["episodes"] == 4
    assert found["env_runners"]["episode_return_mean"] == found["vlarl"]["success_rate"]
    assert found["vlarl"]["failures"] == algorithm.noted_evaluation["failures"]


def test_a_notebook_asks_the_module_for_values(algorithm: VLAPPO, results: list[dict[str, Any]]) -> None:
    frames = np.zeros((2, 28, 28, 3), np.uint8)
    frames[1] = 200
    processor = load_family("openvla").processor(resolve_model(algorithm.config.settings().model.path))
    batch = processor.raw_inputs(list(frames), ["point at the red square"] * 2)
    with torch.no_grad():
        values = algorithm.get_module().compute_values(batch)
    assert values.shape == (2,) and values[0] != values[1]


def test_rllib_builds_it_from_its_checkpoint_while_the_first_one_lives(algorithm: VLAPPO, saved: Path) -> None:
    other = Algorithm.from_checkpoint(str(saved))
    try:
        assert isinstance(other, VLAPPO) and other.iteration == ITERATIONS
        assert other.train()["vlarl"]["env_steps"] == (ITERATIONS + 1) * 4
        assert algorithm.train()["vlarl"]["logprob_gap_max"] < 1e-4, "the other one's weights came in between"
    finally:
        other.stop()


def test_the_self_test_is_told_twice_and_notices_another_temperature_and_weights_that_did_not_travel(
    algorithm: VLAPPO, results: list[dict[str, Any]], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = [result["vlarl_details"]["self_test"] for result in results]
    assert [one and one["told"].partition(":")[0] for one in told] == [
        "self-test", "self-test of updated weights", *[None] * (ITERATIONS - 2),
    ]  # fmt: skip
    assert all(one["failed"] == [] and one["told"].endswith(": ok") for one in told[:2])

    def failed_of_one_more_iteration() -> list[str]:
        result = algorithm.train()
        faults.append(result["vlarl"]["faults"]["failed_self_tests"])
        return (result["vlarl_details"]["self_test"] or {"failed": []})["failed"]

    faults: list[int] = []
    learner = algorithm.learner_group._learner
    assert failed_of_one_more_iteration() == []
    with monkeypatch.context() as patch:
        other = learner.settings.replaced(rollout={"temperature": 1.01})
        patch.setattr(learner, "_passes", PPOPasses(learner.sharded, other, learner._actions.num_actions))
        assert "log-prob gap" in failed_of_one_more_iteration()
    scale_weights(learner, 1.01)  # behind the push
    assert "log-prob gap" in failed_of_one_more_iteration()
    assert failed_of_one_more_iteration() == []
    assert faults == [0, 1, 2, 2]


def scale_weights(learner: Any, factor: float) -> None:
    with torch.no_grad():
        for parameter in learner.sharded.policy.parameters():
            parameter.mul_(factor)


def test_a_new_runs_settings_win_over_the_checkpoints_and_divergence_names_the_rate(saved: Path) -> None:
    training = {
        "lr": 0.0,
        "value_lr": 0.0,
        "weight_decay": 0.125,
        "clip_low": 0.1,
        "clip_high": 0.3,
        "minibatch_size": 2,
    }
    config = build(training=training, learners={"micro_batch_size": 2})
    config.restore_from = str(saved)
    other = config.build_algo()
    try:
        assert other.iteration == other.noted_checkpoint == ITERATIONS
        row = other.train()["vlarl"]
        policy, critic = other.learner_group._learner.sharded.optimizers.values()
        assert [
            (group["lr"], group["weight_decay"]) for optimizer in (policy, critic) for group in optimizer.param_groups
        ] == [
            (0.0, 0.125),
            (0.0, 0.0),
        ]
        assert policy.state_dict()["state"][0]["step"] > ITERATIONS, "Adam's moments are the checkpoint's"
        assert row["applied"] == training | {"temperature": 1.0} and row["optimizer_steps"] == 2

        policy.param_groups[0]["lr"] = 1e30
        with pytest.raises(
            DivergedError, match=r"not finite; lower training.lr \(0\) or training.value_lr \(0\).*--resume-from"
        ):
            train_on(other)
    finally:
        other.stop()


def test_a_save_goes_to_a_directory_or_is_refused(algorithm: VLAPPO, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("dear")
    with pytest.raises(SettingsError, match="holds something else than a checkpoint"):
        algorithm.save_to_path(tmp_path)
    with pytest.raises(OSError, match=r"nope://bucket/x: Unrecognized filesystem"):
        algorithm.save_to_path("nope://bucket/x")
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


@pytest.mark.parametrize("damaged", [False, True], ids=["of a run without a checkpoint", "to a damaged one"])
def test_a_pointer_of_tunes_that_is_no_use_is_as_good_as_none(
    algorithm: VLAPPO, saved: Path, tmp_path: Path, damaged: bool
) -> None:
    before = algorithm.ledger.faults["damaged_checkpoints"]
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    (copy / "facts.json").write_text("{}")
    CheckpointStore.write_pointer(tmp_path, copy if damaged else None)
    algorithm.checkpoints.origin = saved
    algorithm._iteration = 17  # as Tune has it of the trial's last result
    algorithm.load_checkpoint(str(tmp_path))
    assert algorithm.iteration == CheckpointStore.read_facts(saved)["iteration"] != 17
    assert algorithm.ledger.faults["damaged_checkpoints"] == before + damaged


@pytest.mark.parametrize("where", ["__init__", "on_environment_created"])
def test_a_runner_that_cannot_start_says_why(ray_session: None, where: str) -> None:
    def fail(self: Any, **kwargs: Any) -> None:
        if ray.get_runtime_context().get_actor_id():  # in the runner, not in the Algorithm
            raise ValueError("no such scene")

    broken, members = type("Broken", (RLlibCallback,), {where: fail}), {*rank._MEMBERS}
    with pytest.raises(RuntimeError, match=r"(?s)runner 1 cannot start:.*ValueError: no such scene"):
        build().callbacks(broken).build_algo()
    assert members == rank._MEMBERS, "the learner of this process has left its group"


TOLD = ("token_checksum", "policy_loss", "value_loss", "entropy", "env_steps", "optimizer_steps")


def begun_as(algorithm: VLAPPO, **changes: dict[str, Any]) -> list[dict[str, Any]]:
    """The first iterations of another trial in the same processes."""
    assert algorithm.reset_config(build(**changes).to_dict())
    return [algorithm.train()["vlarl"] for _ in range(3)]


def test_a_trial_in_anothers_processes_is_what_it_would_be_in_its_own(
    algorithm: VLAPPO, results: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Tune's `reuse_actors`: weights, moments, seeds, curriculum, episodes and counters are the new trial's."""
    pids = algorithm.collector._runner_pids.copy()
    versions = [results[-1]["vlarl"]["policy_version"]]
    other = begun_as(algorithm, run={"seed": 5}, training={"lr": 3e-3, "num_epochs": 2})
    assert other[0]["applied"]["lr"] == 3e-3 and other[0]["token_checksum"] != results[0]["vlarl"]["token_checksum"]
    donor = algorithm.save_to_path(tmp_path / "donor")
    versions += [row["policy_version"] for row in other]

    again = begun_as(algorithm)
    versions += [row["policy_version"] for row in again]
    for row, first in zip(again, results, strict=False):
        assert {name: row[name] for name in TOLD} == {name: first["vlarl"][name] for name in TOLD}
    assert sorted(set(versions)) == versions, "the version of the weights never repeats"
    assert algorithm.collector._runner_pids == pids

    assert algorithm.reset_config(build(training={"lr": 7e-4, "value_lr": 2e-3}).to_dict())
    algorithm.load_checkpoint(donor)  # population based training: the donor's weights, this trial's rates
    row = algorithm.train()["vlarl"]
    assert row["iteration"] == 4 and row["applied"]["lr"] == 7e-4 and row["applied"]["value_lr"] == 2e-3
    with pytest.raises(SettingsError, match=r"reuse_actors: env\.num_envs differs"):
        algorithm.reset_config(build(env={"num_envs": 4}).to_dict())


def test_a_sampled_preset_is_there_for_engines_and_runners() -> None:
    """As VLAPPO takes Tune's config: what is sampled must not undo what this machine has filled in."""
    config = VLAPPOConfig().update_from_dict({"vla": GIVEN, "sampled": {"model.path": "tiny"}})
    config.validate()
    config.freeze()
    assert config.settings().model.path == config.vla["model"]["path"] == "tiny"
    assert Path(config.engine_spec().here().model_path).is_dir()


def test_a_space_that_tune_could_not_write_down_is_asked_for_again() -> None:
    with pytest.raises(SettingsError, match="callbacks_class is not in the files of the experiment"):
        VLAPPOConfig().update_from_dict({"callbacks_class": ("__ref_ph", "1")})


def test_tunes_own_conventions(ray_session: None, tmp_path: Path) -> None:
    """Stop at a metric that is not there at first, keep the best by evaluation, a CSV with every column, and a moved
    experiment."""
    config = build(evaluation={"every": 1, "episodes": 2})
    tuner = tune.Tuner(
        VLAPPO,
        param_space=config.to_dict() | {"lr": tune.grid_search([1e-3, -1.0])},
        run_config=tune.RunConfig(
            name="experiment",
            storage_path=str(tmp_path),
            stop={"vlarl/success_rate": 2.0, "training_iteration": 4},
            checkpoint_config=tune.CheckpointConfig(
                checkpoint_frequency=1,
                num_to_keep=2,
                checkpoint_score_attribute="training_iteration",
                checkpoint_score_order="min",
            ),
            verbose=0,
        ),
    )
    grid = tuner.fit()
    assert len(grid.errors) == 1, "".join(map(str, grid.errors))
    (error,) = grid.errors
    assert "SettingsError: training.lr: -1.0 is not allowed" in str(error), (
        "the other trial is to run, and this one to say why it does not"
    )
    result = grid.get_best_result("vlarl/best_evaluation_success_rate", "max")
    assert result.metrics["vlarl"]["applied"]["lr"] == 1e-3
    trial = Path(result.path)
    header, *lines = (trial / "progress.csv").read_text().splitlines()
    assert {"vlarl/success_rate", "vlarl/evaluation_success_rate", "vlarl/applied/lr"} <= set(
        header.split(",")
    ) and len(lines) == 4
    kept = [checkpoint.path for checkpoint, _ in result.best_checkpoints]
    iterations = sorted(
        json.loads((CheckpointStore.resolve(Path(path)) / "facts.json").read_text())["iteration"] for path in kept
    )
    assert iterations == [1, 2], "Tune keeps the best two, by a score that falls"
    moved = tmp_path / "moved"
    (tmp_path / "experiment").rename(moved)
    assert CheckpointStore.resolve(moved / trial.name / Path(kept[0]).name).parent == moved / trial.name / "checkpoints"
