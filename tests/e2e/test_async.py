"""Sampling while the learners update, in real processes."""

import itertools
import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.sleepers import STEP_SECONDS, UPDATE_SECONDS, SleepingConfig
from vlarl_rllib import VLAPPO, VLAPPOConfig
from vlarl_rllib.observability.metrics import iteration_row
from vlarl_rllib.settings import Settings

STEPS = 20


def settings(**changes: dict[str, Any]) -> Settings:
    values: dict[str, Any] = {
        "env": {"name": "synthetic", "tasks": [0, 1], "num_envs": 4, "num_processes": 2, "max_steps": 8},
        "rollout": {"steps_per_iteration": STEPS, "async_mode": True},
        "engines": {"num": 0},
        "learners": {"num": 1, "micro_batch_size": 16},
        "training": {"minibatch_size": 40, "lr": 1e-3, "old_log_probs": "recompute"},
        "evaluation": {"episodes": 4},
        "run": {"iterations": 100},
    }
    return Settings.from_dict({section: values.get(section, {}) | keys for section, keys in (values | changes).items()})


def train(algorithm: VLAPPO) -> dict[str, Any]:
    row = iteration_row(algorithm.train())
    assert row["logprob_gap_max"] < 1e-4 and row["staleness_max"] <= 1 and row["faults"]["stale_steps"] == 0
    assert sum(row["staleness"].values()) == 4 * STEPS
    return row


def test_a_run_that_samples_ahead_learns_evaluates_and_is_restored(ray_session: None, tmp_path: Path) -> None:
    algorithm = VLAPPOConfig.from_settings(settings(), tmp_path / "run").build_algo()
    try:
        rows = [train(algorithm) for _ in range(3)]
        assert rows[0]["staleness"] == {"0": 4 * STEPS} and rows[0]["importance_weight"] == pytest.approx(1.0, abs=1e-3)
        assert sum(row["staleness"].get("1", 0) for row in rows[1:]) > 0, "nothing was sampled during an update"
        assert algorithm.evaluate()["vlarl"]["episodes"] == 4
        checkpoint = algorithm.save_to_path(tmp_path / "checkpoint")
        rows.append(train(algorithm))
        played, learned = sum(row["decisions"] for row in rows), 4 * 4 * STEPS
        assert learned <= played <= learned + 4 * STEPS, "what was reported so far: at most a share ahead"
        algorithm.restore_from_path(checkpoint)
        rows.append(train(algorithm))
        assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 4]
        assert rows[-1]["staleness"] == {"0": 4 * STEPS}, "what was sampled before the restore is not learned from"
        assert [row["policy_version"] for row in rows] == [2, 3, 4, 5, 7]
    finally:
        algorithm.stop()


def median_wall(config: VLAPPOConfig, iterations: int) -> tuple[float, float, float]:
    """Median seconds of an iteration, and of its phases sample and update, behind the first two."""
    algorithm = config.build_algo()
    try:
        rows = [iteration_row(algorithm.train()) for _ in range(iterations + 2)][1:]
    finally:
        algorithm.stop()
    walls = [row["timestamp"] - last["timestamp"] for last, row in itertools.pairwise(rows)]
    phases = [statistics.median(row["seconds"][phase] for row in rows[1:]) for phase in ("sample", "update")]
    return statistics.median(walls), phases[0], phases[1]


@pytest.mark.slow
def test_an_iteration_takes_as_long_as_the_longer_of_sampling_and_updating(ray_session: None, tmp_path: Path) -> None:
    changes = {
        "env": {"num_processes": 4},
        "engines": {"num": 1},
        "evaluation": {"episodes": 0},
        "model": {"unnorm_key": "libero_spatial"},
    }
    sync = settings(**changes, rollout={"async_mode": False, "steps_per_iteration": STEPS})
    wall, sample, update = median_wall(SleepingConfig.from_settings(sync, tmp_path / "sync"), 3)
    assert sample > STEPS * STEP_SECONDS and update > UPDATE_SECONDS and wall > sample + update
    ahead, *_ = median_wall(SleepingConfig.from_settings(settings(**changes), tmp_path / "async"), 4)
    print(
        f"\nsync {wall:.2f} s (sample {sample:.2f}, update {update:.2f}), async {ahead:.2f} s: "
        f"{ahead / max(sample, update):.3f} of the longer"
    )
    assert ahead <= 1.1 * max(sample, update)
