"""From the rows of runs to the lines of charts: three axes, smoothing, a band over seeds.

Runs whose settings differ in `run.seed` alone are one group, drawn as the mean of its runs and a band from the lowest
to the highest of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlarl_rllib.evaluation.report import wilson_interval
from vlarl_rllib.runs.files import SHOWN_SECONDS

Row = dict[str, Any]
Rows = Sequence[Row]

AXES = {
    "steps": "environment steps",
    "iterations": "iterations",
    "minutes": "minutes of wall time",
    "hours": "hours of wall time",
}
"""What a chart's x can be."""
SECONDS_IN = {"minutes": 60.0, "hours": 3600.0}
MINUTES_UNTIL = 3.0
"""Hours of the longest run."""
MAX_POINTS = 300
"""Of a line; more than a chart has pixels for."""
SMALLEST = 1e-45
"""Less is nothing, to a float32."""
FAINT_GROUPS = 4
"""With more groups, what a strong line is made of is not drawn."""
SMOOTHED_SHARE = 25
"""A curve is smoothed over one part in so many of its iterations."""


@dataclass(frozen=True)
class Panel:
    """One chart, of what each iteration has a number of."""

    title: str
    value: Callable[[Row], float | None]
    weight: Callable[[Row], float] = lambda row: 1.0
    """Of an iteration, where iterations are averaged."""
    is_rate: bool = False
    """Between 0 and 1."""
    log: bool = False
    is_noisy: bool = True
    """Whether it is smoothed."""


@dataclass(frozen=True)
class Line:
    """One curve: y over x, NaN nowhere."""

    x: np.ndarray
    y: np.ndarray
    color: int | None
    """Number of the group; None = one of many, in grey."""
    label: str
    faint: bool = False
    low: np.ndarray | None = None
    """Lower end of the band."""
    high: np.ndarray | None = None
    bars: bool = False
    """The band is drawn as an error bar at each point."""


@dataclass(frozen=True)
class Chart:
    """What is drawn in one picture."""

    title: str
    lines: list[Line]
    is_rate: bool = False
    log: bool = False
    legend: list[tuple[int, str]] = field(default_factory=list)
    """Color and name, where the colors are not those of the page."""


@dataclass(frozen=True)
class Curves:
    """The runs of a group, for drawing."""

    name: str
    color: int | None
    runs: list[Rows]


def _metric(name: str) -> Callable[[Row], float | None]:
    return lambda row: row[name]


def _applied(name: str) -> Callable[[Row], float | None]:
    return lambda row: row["applied"][name]


def _episodes(row: Row) -> float:
    return float(row["episodes"])


def seconds_of(row: Row) -> float:
    """Of an iteration, the start of the run aside."""
    return float(sum(row["seconds"][name] for name in SHOWN_SECONDS))


PANELS = (
    Panel("success, training episodes, sampled", _metric("success_rate"), _episodes, is_rate=True),
    Panel("return of an episode", _metric("return_mean"), _episodes),
    Panel("length of an episode, environment steps", _metric("episode_length"), _episodes),
    Panel("entropy of a decision, nats", _metric("entropy")),
    Panel("KL of an iteration's update, nats", _metric("approx_kl")),
    Panel("clip fraction", _metric("clip_fraction")),
    Panel("gradient norm, policy", _metric("grad_norm")),
    Panel("gradient norm, value head", _metric("grad_norm_critic")),
    Panel("learning rate applied, policy", _applied("lr"), is_noisy=False),
    Panel("learning rate applied, value head", _applied("value_lr"), is_noisy=False),
    Panel("|log-prob of learner - of sampler|, mean", _metric("logprob_gap_mean"), log=True),
    Panel("|log-prob of learner - of sampler|, largest", _metric("logprob_gap_max"), log=True),
    Panel("value loss", _metric("value_loss")),
    Panel("explained variance", _metric("explained_variance")),
    Panel("policy loss", _metric("policy_loss")),
    Panel("seconds of an iteration", seconds_of),
)


def charts_of(groups: Sequence[Curves], axis: str, task_names: Mapping[str, str] | None = None) -> list[Chart]:
    """Every chart that has something to show, over one of `AXES`.

    Args:
        task_names: by task id; success by task is drawn where they are given, and there is one run.
    """
    placed = [(group, [positions(rows, axis) for rows in group.runs]) for group in groups]
    evaluations = [_evaluation_line(group, at) for group, at in placed]
    charts = [Chart("success, held-out starts, greedy", evaluations, is_rate=True)]
    show_faint = len(groups) <= FAINT_GROUPS
    for panel in PANELS:
        lines = [line for group, at in placed for line in _lines(group, at, panel, show_faint)]
        drawn = [part for line in lines for part in (line.y, line.low) if part is not None]
        log = panel.log and all((part > SMALLEST).all() for part in drawn)
        charts.append(Chart(panel.title, lines, panel.is_rate, log))
    if task_names:
        charts.insert(2, _by_task(groups[0].runs[0], placed[0][1], task_names))
    kept = [(chart, [line for line in chart.lines if len(line.x)]) for chart in charts]
    return [Chart(chart.title, lines, chart.is_rate, chart.log, chart.legend) for chart, lines in kept if lines]


def positions(rows: Rows, axis: str) -> np.ndarray:
    """Where the ends of iterations lie on an axis; never falling."""
    if axis == "iterations":
        found = [float(row["iteration"]) for row in rows]
    elif axis == "steps":
        found = [float(row["env_steps"]) for row in rows]
    else:
        spent = [_worked(row, earlier) for row, earlier in zip(rows, [None, *rows], strict=False)]
        found = [seconds / SECONDS_IN[axis] for seconds in np.cumsum(spent)]
    return np.maximum.accumulate(np.asarray(found))


def axes_for(runs: Sequence[Rows]) -> dict[str, str]:
    """`AXES` with the unit of time that suits the longest of the runs."""
    longest = max(positions(rows, "hours")[-1] for rows in runs)
    unused = "hours" if longest < MINUTES_UNTIL else "minutes"
    return {axis: label for axis, label in AXES.items() if axis != unused}


def _worked(row: Row, earlier: Row | None) -> float:
    """Seconds since the end of the iteration before; where the run was started in between, those of the start and the
    iteration alone, since it may have lain still."""
    since = -1.0 if earlier is None else row["timestamp"] - earlier["timestamp"]
    return since if since >= 0 and not row["seconds"].get("startup") else float(sum(row["seconds"].values()))


def evaluation_points(rows: Rows) -> list[tuple[int, dict[str, Any]]]:
    """(environment steps before it, evaluation) of every greedy evaluation, in order."""
    points: list[tuple[int, dict[str, Any]]] = []
    for row in rows:
        if row["initial_evaluation"]:
            points.append((0, row["initial_evaluation"]))
        if row["evaluation"]:
            points.append((row["env_steps"], row["evaluation"]))
    return points


def evaluation_successes(evaluation: Mapping[str, Any]) -> tuple[int, int]:
    """(successes, episodes)"""
    return round(evaluation["success_rate"] * evaluation["episodes"]), evaluation["episodes"]


def _evaluation_line(group: Curves, at: Sequence[np.ndarray]) -> Line:
    """With Wilson's 95 % intervals for one run, from the lowest to the highest seed for several."""
    found: dict[int, list[tuple[float, dict[str, Any]]]] = {}
    for rows, ends in zip(group.runs, at, strict=True):
        for row, x in zip(rows, ends, strict=True):
            if row["initial_evaluation"]:
                found.setdefault(0, []).append((0.0, row["initial_evaluation"]))
            if row["evaluation"]:
                found.setdefault(row["iteration"], []).append((float(x), row["evaluation"]))
    means, rates, low, high = [], [], [], []
    for _, points in sorted(found.items()):
        each = [evaluation["success_rate"] for _, evaluation in points]
        interval = wilson_interval(*evaluation_successes(points[0][1])) if len(each) == 1 else (min(each), max(each))
        means.append(np.mean([x for x, _ in points]))
        rates.append(np.mean(each))
        low.append(interval[0])
        high.append(interval[1])
    x_values, y, lower, upper = (np.asarray(numbers, float) for numbers in (means, rates, low, high))
    return Line(x_values, y, group.color, group.name, low=lower, high=upper, bars=True)


def _by_task(rows: Rows, at: Sequence[np.ndarray], names: Mapping[str, str]) -> Chart:
    lines, legend = [], []
    for color, (task, name) in enumerate(names.items()):
        panel = Panel(name, lambda row, task=task: row["success_rate_by_task"].get(task))  # type: ignore[misc]
        if len((line := _lines(Curves(name, color, [rows]), at, panel, show_faint=False)[0]).x):
            lines.append(line)
            legend.append((color, name))
    return Chart("success by task, training episodes", lines, is_rate=True, legend=legend)


def _lines(group: Curves, at: Sequence[np.ndarray], panel: Panel, show_faint: bool) -> list[Line]:
    """What is drawn of a group: faint what the strong line is made of, where there is room for it."""
    curves = [_smooth(rows, ends, panel) for rows, ends in zip(group.runs, at, strict=True)]
    faint: list[Line] = []
    if len(curves) == 1:
        x, raw, y = curves[0]
        if show_faint and not np.array_equal(raw, y):
            faint = [Line(*_thinned(x, raw), group.color, group.name, faint=True)]
        return [*faint, Line(*_thinned(x, y), group.color, group.name)]
    curves = [curve for curve in curves if len(curve[0])]
    if show_faint:
        faint = [Line(*_thinned(x, y), group.color, group.name, faint=True) for x, _, y in curves]
    return [*faint, _mean_line(group, [(x, y) for x, _, y in curves])]


def _mean_line(group: Curves, curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> Line:
    """Mean and band as far as all runs of the group have come."""
    empty = np.zeros(0)
    if not curves:
        return Line(empty, empty, group.color, group.name)
    first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    at = np.unique(np.concatenate([x[(x >= first) & (x <= last)] for x, _ in curves]))
    if len(at) > MAX_POINTS:
        at = np.linspace(first, last, MAX_POINTS)
    values = np.stack([np.interp(at, x, y) for x, y in curves])
    return Line(at, values.mean(0), group.color, group.name, low=values.min(0), high=values.max(0))


def window_of(num_rows: int) -> int:
    """Iterations that a curve of so many is smoothed over; odd, 1 = not at all."""
    return 2 * (num_rows // (2 * SMOOTHED_SHARE)) + 1


def _smooth(rows: Rows, ends: np.ndarray, panel: Panel) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, y, moving average of y) of the iterations that have a finite number."""
    known = [
        (x, float(value), max(panel.weight(row), 1e-9))
        for x, row in zip(ends, rows, strict=True)
        if (value := panel.value(row)) is not None and math.isfinite(value)
    ]
    if not known:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    x, y, weights = np.asarray(known, float).T
    window = window_of(len(rows))
    if window == 1 or not panel.is_noisy:
        return x, y, y
    inside = slice(window // 2, window // 2 + len(x))
    sums, totals = (np.convolve(part, np.ones(window))[inside] for part in (y * weights, weights))
    return x, y, sums / totals


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `MAX_POINTS` of a line's points, the ends among them."""
    if len(x) <= MAX_POINTS:
        return x, y
    kept = np.unique(np.linspace(0, len(x) - 1, MAX_POINTS).round().astype(int))
    return x[kept], y[kept]
