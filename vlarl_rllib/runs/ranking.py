"""Which sample of an experiment is best, over its seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = "run.seed"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Outcome:
    """What became of one trial."""

    directory: Path
    sampled: dict[str, Any]
    """By dotted key, with the seed."""
    score: float | None
    """The metric after its last iteration; None where it has none."""
    iterations: int
    state: str
    """How it ended: done, stopped early, failed, unfinished."""
    error: str | None = None
    """One line."""
    checkpoint: Path | None = None
    """Its best by evaluation, else its newest."""
    checkpoint_score: float | None = None
    """Greedy success of the checkpoint; None where that was not evaluated."""


@dataclass(frozen=True)
class Ranked:
    """The trials of one sample, which differ in their seeds alone."""

    sampled: dict[str, Any]
    """Without the seed."""
    trials: tuple[Outcome, ...]

    @property
    def scores(self) -> list[float]:
        """Of the trials that have one."""
        return [trial.score for trial in self.trials if trial.score is not None]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.scores) if self.scores else None

    @property
    def iterations(self) -> int:
        """How far all its trials with a score got."""
        return min((trial.iterations for trial in self.trials if trial.score is not None), default=0)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the mean over seeds, by Student's t; None for fewer than two of them."""
        return mean_interval(self.scores)

    @property
    def best(self) -> Outcome | None:
        """The trial with its best checkpoint, by evaluation and then by the metric; None where there is none."""
        there = [trial for trial in self.trials if trial.checkpoint is not None]
        return max(there, key=lambda trial: (_or_least(trial.checkpoint_score), _or_least(trial.score)), default=None)


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of a mean by Student's t, which takes the values to be normal; None for fewer than two."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    half = float(t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def rank(trials: Sequence[Outcome]) -> list[Ranked]:
    """Samples, the best first: those that went furthest, since a scheduler ends the worse ones early, and among them by
    the mean over their seeds; those without a score last."""
    groups: dict[str, list[Outcome]] = {}
    for trial in trials:
        groups.setdefault(repr(sorted(_without_seed(trial.sampled).items())), []).append(trial)
    ranked = [Ranked(_without_seed(group[0].sampled), tuple(group)) for group in groups.values()]
    return sorted(ranked, key=lambda sample: (-sample.iterations, -_or_least(sample.mean)))


def _or_least(score: float | None) -> float:
    return -math.inf if score is None else score


def _without_seed(sampled: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in sampled.items() if key != SEED}
