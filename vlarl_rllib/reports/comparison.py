"""Runs beside each other: which settings differ, which come out best, and what the differences have to do with it."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np

from vlarl_rllib.evaluation.report import wilson_interval
from vlarl_rllib.reports.series import Rows, evaluation_points, evaluation_successes
from vlarl_rllib.runs.files import RunFiles
from vlarl_rllib.runs.ranking import SEED, mean_interval

LAST_SHARE = 5
"""Without evaluations, a run's outcome is its success over the last of so many parts of its iterations."""
MIN_SETTINGS = 10
"""Fewer points than that show a correlation by chance (with 10, one of 0.63 has p = 0.05)."""
SHUFFLES = 2000
MAX_NAMED_KEYS = 3
"""A group is called by its settings where no more of them differ."""
MAX_VALUE = 80
"""Characters of a setting's value in a table."""


@dataclass(frozen=True)
class Group:
    """Runs whose settings differ in `run.seed` alone."""

    name: str
    runs: list[RunFiles]
    settings: Mapping[str, Any] | None
    """Of the first of them."""


@dataclass(frozen=True)
class Outcome:
    """Success that a group has come to, with its 95 % interval."""

    rate: float
    low: float
    high: float


@dataclass(frozen=True)
class Importance:
    """How far the order of the outcomes goes with one key."""

    key: str
    share: float
    """Of the variance of the outcomes' ranks, 0 to 1."""
    p: float
    """How often shuffled outcomes have as large a share."""
    best: str
    """Where the best outcomes are."""


def make_groups(runs: Sequence[RunFiles], names: Sequence[str]) -> list[Group]:
    """In the order of their first runs.

    Args:
        names: of the runs.
    """
    found: dict[Hashable, list[int]] = {}
    for number, run in enumerate(runs):
        key = (
            number
            if run.settings is None
            else tuple((key, _text(value)) for key, value in run.settings.items() if key != SEED)
        )
        found.setdefault(key, []).append(number)
    members = list(found.values())
    keys = differing_keys([runs[numbers[0]].settings for numbers in members])
    return [
        Group(_group_name(numbers, names, runs, keys), [runs[number] for number in numbers], runs[numbers[0]].settings)
        for numbers in members
    ]


def _group_name(numbers: list[int], names: Sequence[str], runs: Sequence[RunFiles], keys: Sequence[str]) -> str:
    if len(numbers) == 1:
        return names[numbers[0]]
    settings = runs[numbers[0]].settings or {}
    if keys and len(keys) <= MAX_NAMED_KEYS:
        return ", ".join(f"{key.rpartition('.')[2]} {shown(settings.get(key))}" for key in keys)
    return f"{names[numbers[0]]} and {len(numbers) - 1} more"


def names_of(runs: Sequence[RunFiles]) -> list[str]:
    """Their directories' names, with as many of the folders above as tell them apart."""
    parts = [run.run.path.parts for run in runs]
    names = []
    for own in parts:
        count = 1
        while count < len(own) and sum(other[-count:] == own[-count:] for other in parts) > 1:
            count += 1
        names.append("/".join(own[-count:]))
    return names


def differing_keys(settings: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """Keys that have more than one value, in file order; the seed is none of them."""
    known = [values for values in settings if values is not None]
    keys = dict.fromkeys(key for values in known for key in values)
    return [key for key in keys if key != SEED and len({_text(values.get(key)) for values in known}) > 1]


def shown(value: Any) -> str:
    """A setting's value, as in YAML."""
    text = _text(value)
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}..."


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def uses_evaluations(groups: Sequence[Group]) -> bool:
    """Whether outcomes are those of greedy evaluations: where all runs have one."""
    return all(evaluation_points(run.rows) for group in groups for run in group.runs)


def last_counts(rows: Rows, by_evaluation: bool) -> tuple[int, int]:
    """(successes, episodes) of a run's last evaluation, or else of its last training episodes."""
    if by_evaluation:
        return evaluation_successes(evaluation_points(rows)[-1][1])
    last = [row for row in rows[-max(1, len(rows) // LAST_SHARE) :] if row["success_rate"] is not None]
    return sum(round(row["success_rate"] * row["episodes"]) for row in last), sum(row["episodes"] for row in last)


def outcome(runs: Sequence[Rows], by_evaluation: bool) -> Outcome | None:
    """Of several seeds the mean and Student's interval for it; of one run its success and Wilson's interval; None where
    no episode has ended."""
    counts = [(successes, episodes) for successes, episodes in (last_counts(rows, by_evaluation) for rows in runs)]
    rates = [successes / episodes for successes, episodes in counts if episodes]
    if not rates:
        return None
    over_seeds = mean_interval(rates)
    if over_seeds is None:
        return Outcome(rates[0], *wilson_interval(*next(pair for pair in counts if pair[1])))
    return Outcome(mean(rates), max(0.0, over_seeds[0]), min(1.0, over_seeds[1]))


def ranked(groups: Sequence[Group]) -> list[tuple[Group, Outcome | None]]:
    """The best first; those without an outcome last."""
    by_evaluation = uses_evaluations(groups)
    found = [(group, outcome([run.rows for run in group.runs], by_evaluation)) for group in groups]
    return sorted(found, key=lambda pair: -1.0 if pair[1] is None else pair[1].rate, reverse=True)


def importances(ranking: Sequence[tuple[Group, Outcome | None]]) -> list[Importance]:
    """Of each key that differs, by itself, how much of the variance of the outcomes' ranks goes with it: for numbers
    what a parabola over the key's ranks explains (a best value may lie in the middle), for names what lies between them
    (the correlation ratio); the largest first. None with fewer than `MIN_SETTINGS` settings.

    What two keys do together is not seen. The p-values are those of single keys, by shuffling.
    """
    from scipy.stats import rankdata

    points = [(group.settings, found.rate) for group, found in ranking if group.settings is not None and found]
    if len(points) < MIN_SETTINGS:
        return []
    settings: list[Mapping[str, Any]] = [values for values, _ in points]
    outcomes = np.asarray([rate for _, rate in points])
    ranks = rankdata(outcomes)
    random = np.random.default_rng(0)
    shuffled = np.stack([ranks, *(random.permutation(ranks) for _ in range(SHUFFLES))])
    found = []
    for key in differing_keys(settings):
        values = [values.get(key) for values in settings]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            order = rankdata(np.asarray(values, float))
            shares, fitted = _parabola(order, shuffled)
            best = int(np.argmax(fitted))
            ends = {order.max(): "higher is better", order.min(): "lower is better"}
            best_at = ends.get(order[best], f"best around {shown(values[best])}")
        else:
            codes = np.unique([_text(value) for value in values], return_inverse=True)[1]
            if len(set(codes)) == len(codes):  # a name for each: it stands for whatever differs
                continue
            shares = _correlation_ratio(codes, shuffled)
            highest = max(set(codes), key=lambda code: outcomes[codes == code].mean())
            best_at = f"{shown(values[list(codes).index(highest)])} is best"
        p = float((np.sum(shares[1:] >= shares[0] - 1e-12) + 1) / (SHUFFLES + 1))
        found.append(Importance(key, float(shares[0]), p, best_at))
    return sorted(found, key=lambda one: one.share, reverse=True)


def _parabola(x: np.ndarray, outcomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of the variance of each of outcomes [S, N] that a parabola over x [N] explains, and the first one's
    parabola [N]."""
    x = (x - x.mean()) / len(x)
    basis = np.linalg.svd(np.stack([x - x.mean(), x**2 - (x**2).mean()], 1), full_matrices=False)
    directions = basis[0][:, basis[1] > 1e-9]
    y = outcomes - outcomes.mean(1, keepdims=True)
    fitted = (y @ directions) @ directions.T
    return (fitted**2).sum(1) / np.maximum((y**2).sum(1), 1e-12), fitted[0]


def _correlation_ratio(codes: np.ndarray, outcomes: np.ndarray) -> np.ndarray:
    """Share of the variance of each of outcomes [S, N] that lies between the classes of codes [N]."""
    y = outcomes - outcomes.mean(1, keepdims=True)
    between = sum((codes == code).sum() * y[:, codes == code].mean(1) ** 2 for code in set(codes))
    return np.asarray(between / np.maximum((y**2).sum(1), 1e-12))
