"""The ranking over seeds, by hand-made numbers."""

import math
from pathlib import Path

import pytest

from vlarl_rllib.runs.ranking import Outcome, mean_interval, rank


def outcome(lr: float, seed: int, score: float | None, checkpoint: float | None = None, iterations: int = 5) -> Outcome:
    directory = Path(f"{lr}-{seed}")
    there = directory / "checkpoint" if checkpoint is not None else None
    return Outcome(directory, {"training.lr": lr, "run.seed": seed}, score, iterations, "done", None, there, checkpoint)


def test_samples_are_ranked_by_the_mean_over_their_seeds() -> None:
    lucky, steady = [outcome(1e-3, 0, 0.9), outcome(1e-3, 1, 0.1)], [outcome(1e-4, 0, 0.6), outcome(1e-4, 1, 0.5)]
    failed = [outcome(1e-2, 0, None)]
    first, second, last = rank([*failed, *lucky, *steady])
    assert first.sampled == {"training.lr": 1e-4} and first.mean == pytest.approx(0.55) and len(first.trials) == 2
    assert second.sampled == {"training.lr": 1e-3} and second.mean == pytest.approx(0.5)
    assert last.mean is None and last.interval is None and last.best is None


def test_the_interval_is_students() -> None:
    """Mean 2, deviation 1, 3 values: t(0.975, 2) = 4.3027, over the square root of 3."""
    low, high = mean_interval([1.0, 2.0, 3.0]) or (math.nan, math.nan)
    assert (low, high) == pytest.approx((2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5), abs=1e-4)
    assert mean_interval([0.5]) is None


def test_the_best_checkpoint_is_the_best_evaluated_one() -> None:
    (sample,) = rank([outcome(1e-3, 0, 0.9, checkpoint=0.5), outcome(1e-3, 1, 0.4, checkpoint=0.7)])
    assert sample.best is not None and sample.best.sampled["run.seed"] == 1


def test_whoever_was_ended_early_is_behind_those_that_went_on() -> None:
    early, late = outcome(1e-3, 0, 0.9, iterations=2), outcome(1e-4, 0, 0.2, iterations=9)
    assert [sample.sampled["training.lr"] for sample in rank([early, late])] == [1e-4, 1e-3]
