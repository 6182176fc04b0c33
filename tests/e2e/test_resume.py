"""What is stopped at a checkpoint goes on as if it had not been: same tokens, same losses; also with another number of
learners. What engines have to do with it is in test_algorithm.py."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vlarl_rllib import VLAPPO, VLAPPOConfig
from vlarl_rllib.settings import Settings

ITERATIONS = 2
"""Compared behind the checkpoint."""
LOSSES = ("first_policy_loss", "first_value_loss")


def build(run: Path, *, learners: int = 1, restore_from: Path | None = None) -> VLAPPO:
    settings = Settings.from_dict(
        {
            "env": {
                "name": "synthetic",
                "tasks": [0, 1],
                "num_envs": 2,
                "num_processes": 1,
                "models_per_process": 2,
                "max_steps": 6,
            },
            "rollout": {"num_runners": 2, "steps_per_iteration": 12},
            "engines": {"num": 0},
            "learners": {"num": learners, "micro_batch_size": 32, "timeout_seconds": 120},
            "training": {"minibatch_size": 24, "num_epochs": 2, "lr": 1e-4, "value_lr": 1e-3},
            "curriculum": {"kind": "adaptive", "temperature": 0.2},
            "rewards": {"length": 0.01, "smoothness": 0.1, "value_shaping": 0.1},
            "evaluation": {"episodes": 0},
            "run": {"iterations": 100, "seed": 5},
        }
    )
    config = VLAPPOConfig.from_settings(settings, run)
    config.restore_from = str(restore_from) if restore_from else None
    return config.build_algo()


@pytest.fixture
def make(ray_session: None) -> Iterator[Callable[..., VLAPPO]]:
    algorithms: list[VLAPPO] = []

    def make(*args: Any, **kwargs: Any) -> VLAPPO:
        while algorithms:
            algorithms.pop().stop()
        algorithms.append(build(*args, **kwargs))
        return algorithms[-1]

    yield make
    for algorithm in algorithms:
        algorithm.stop()


def train(algorithm: VLAPPO, iterations: int = ITERATIONS) -> list[dict[str, Any]]:
    return [algorithm.train()["vlarl"] for _ in range(iterations)]


def assert_same(rows: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float) -> None:
    assert [row["iteration"] for row in rows] == [row["iteration"] for row in expected]
    assert [row["token_checksum"] for row in rows] == [row["token_checksum"] for row in expected]
    assert [row["env_steps"] for row in rows] == [row["env_steps"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        for name in LOSSES:
            assert row[name] == pytest.approx(other[name], abs=tolerance), (row["iteration"], name)


@pytest.mark.timeout(600)
def test_the_same_run_goes_on_after_a_resume_a_frozen_learner_and_with_two_learners(
    make: Callable[..., VLAPPO], tmp_path: Path
) -> None:
    algorithm = make(tmp_path / "one")
    train(algorithm, 2)
    pointer = tmp_path / "pointer"
    pointer.mkdir()
    algorithm.save_checkpoint(str(pointer))
    expected = train(algorithm)
    assert len({row["token_checksum"] for row in expected}) == ITERATIONS and all(
        row["first_value_loss"] != 0 for row in expected
    )

    # A frozen learner: noticed within its time-out, and back to the checkpoint inside the same trial.
    runners, version = algorithm.collector._runner_pids.copy(), algorithm.weight_sync.version
    algorithm.learner_group.ranks.timeout_seconds = 2.0
    os.kill(algorithm.learner_group.pids[0], signal.SIGSTOP)
    with pytest.MonkeyPatch.context() as patch:
        rebuild = algorithm.learner_group.rebuild
        patch.setattr(
            algorithm.learner_group,
            "rebuild",
            lambda: (setattr(algorithm.learner_group.ranks, "timeout_seconds", 120.0), rebuild()),
        )
        again = train(algorithm)
    assert_same(again, expected, 1e-5)
    assert again[0]["faults"]["learner_restarts"] == 1 and again[0]["faults"]["repeated_iterations"] == ITERATIONS
    assert again[0]["policy_version"] > version, "the version must not decrease"
    assert algorithm.collector._runner_pids == runners, "the runners are to stay"

    # A new start from the same checkpoint, with two learners instead of one.
    two = make(tmp_path / "two", learners=2, restore_from=pointer)
    assert two.iteration == 2
    rows = train(two)
    assert_same(rows[:1], expected[:1], 1e-4)
    for row, other in zip(
        rows, expected, strict=True
    ):  # two learners add up in another order: a later token may differ
        for name in LOSSES:
            assert row[name] == pytest.approx(other[name], abs=1e-4), (row["iteration"], name)

    # One of the two dies in the middle of an update: the other one waits for it meanwhile.
    pids = two.learner_group.pids
    update = two.learner_group.update

    def update_and_die(**kwargs: Any) -> Any:
        two.learner_group.update = update
        os.kill(pids[1], signal.SIGSTOP)
        threading.Timer(0.5, os.kill, (pids[1], signal.SIGKILL)).start()
        return update(**kwargs)

    two.learner_group.update = update_and_die
    (row,) = train(two, 1)
    assert row["iteration"] == 3 and row["faults"]["learner_restarts"] == 1
    assert not set(pids) & set(two.learner_group.pids)
