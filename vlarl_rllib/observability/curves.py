"""A run's curves as one picture. matplotlib is imported in the function that draws."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Interval = Callable[[int, int], tuple[float, float]]
"""(successes, episodes) -> bounds of the success rate."""

SHOWN_SECONDS = ("sample", "update", "sync", "evaluation", "recovery", "other")
MAX_TASK_LINES, MAX_LABEL = 10, 40
"""More tasks, and longer names, are too much for a small picture."""


def draw_curves(rows: Sequence[dict[str, Any]], interval: Interval, task_names: Mapping[str, str]) -> bytes:
    """A PNG of success, losses, policy change, the sampler's gap and where time went, over the iterations of
    `metrics.jsonl`.

    Args:
        rows: at least one.
        interval: draws the error bars of greedy evaluations.
        task_names: of every task id in the rows.
    """
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(15, 8), layout="constrained")
    axes = figure.subplots(2, 3)
    steps = [row["env_steps"] for row in rows]
    _success(axes[0, 0], rows, steps, interval)
    _success_by_task(axes[0, 1], rows, steps, task_names)
    _lines(axes[0, 2], rows, steps, ("value_loss", "explained_variance"), "critic")
    _lines(axes[1, 0], rows, steps, ("approx_kl", "clip_fraction"), "change of the policy in an iteration")
    _lines(
        axes[1, 1], rows, steps, ("logprob_gap_mean", "logprob_gap_max"), "|log-prob of learner - of sampler|", log=True
    )
    _seconds(axes[1, 2], rows)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def evaluation_points(rows: Sequence[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """(environment steps before it, evaluation) of every greedy evaluation, in order."""
    points: list[tuple[int, dict[str, Any]]] = []
    for row in rows:
        if row["initial_evaluation"]:
            points.append((0, row["initial_evaluation"]))
        if row["evaluation"]:
            points.append((row["env_steps"], row["evaluation"]))
    return points


def _success(axis: Any, rows: Sequence[dict[str, Any]], steps: list[int], interval: Interval) -> None:
    known = [
        (step, row["success_rate"]) for step, row in zip(steps, rows, strict=True) if row["success_rate"] is not None
    ]
    if known:
        axis.plot(*zip(*known, strict=True), color="tab:gray", label="training episodes, sampled")
    for index, (step, evaluation) in enumerate(evaluation_points(rows)):
        rate, episodes = evaluation["success_rate"], evaluation["episodes"]
        low, high = interval(round(rate * episodes), episodes)
        label = "held-out starts, greedy (95 %)" if index == 0 else None
        axis.errorbar(
            [step], [rate], yerr=[[rate - low], [high - rate]], fmt="o", color="tab:blue", capsize=4, label=label
        )
    axis.set(title="success rate", xlabel="environment steps", ylim=(-0.02, 1.02))
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="best")


def _success_by_task(axis: Any, rows: Sequence[dict[str, Any]], steps: list[int], names: Mapping[str, str]) -> None:
    tasks = sorted({task for row in rows for task in row["success_rate_by_task"]}, key=int)
    for task in tasks[:MAX_TASK_LINES]:
        known = [
            (step, row["success_rate_by_task"][task])
            for step, row in zip(steps, rows, strict=True)
            if task in row["success_rate_by_task"]
        ]
        axis.plot(*zip(*known, strict=True), label=textwrap.shorten(names[task], MAX_LABEL, placeholder="..."))
    axis.set(title="success rate by task, training", xlabel="environment steps", ylim=(-0.02, 1.02))
    if tasks:
        axis.legend(loc="best", fontsize="small")


def _lines(
    axis: Any, rows: Sequence[dict[str, Any]], steps: list[int], names: Sequence[str], title: str, *, log: bool = False
) -> None:
    for name in names:
        axis.plot(steps, [row[name] for row in rows], label=name)
    if log and all(row[name] > 0 for row in rows for name in names):
        axis.set_yscale("log")
    axis.set(title=title, xlabel="environment steps")
    axis.legend(loc="best")


def _seconds(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    iterations = [row["iteration"] for row in rows]
    bottom = [0.0] * len(rows)
    for name in SHOWN_SECONDS:
        values = [row["seconds"][name] for row in rows]
        if any(values):
            axis.bar(iterations, values, bottom=bottom, label=name, width=0.9)
            bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    axis.set(title="seconds of an iteration", xlabel="iteration")
    axis.legend(loc="best", fontsize="small")
