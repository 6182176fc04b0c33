"""From finished episodes to success rates: the numbers, and results.json, results.csv, report.md and the terminal's
table."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from vlarl_rllib.process.own_files import replace_file

Z_95 = 1.959963984540054
"""Quantile of the standard normal distribution that leaves 2.5 % above."""
INCOMPLETE = "Not all episodes are there, and those that succeed end first: these rates tend to be too high."
GROUPS = ("standard", "held_out")
"""All starts, and those that no training of this package uses."""


def wilson_interval(successes: int, episodes: int) -> tuple[float, float]:
    """95 % interval of a success rate (Wilson 1927, Journal of the American Statistical Association 22, 209-212).

    Unlike rate +- 1.96 standard errors it stays within [0, 1] and has a width at 0 and at all successes.

    Raises:
        ValueError: no episodes, or more successes than episodes.
    """
    if not 0 <= successes <= episodes or episodes == 0:
        raise ValueError(f"{successes} successes in {episodes} episodes have no success rate")
    rate, z2 = successes / episodes, Z_95**2
    centre = (rate + z2 / (2 * episodes)) / (1 + z2 / episodes)
    half = Z_95 / (1 + z2 / episodes) * math.sqrt(rate * (1 - rate) / episodes + z2 / (4 * episodes**2))
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == episodes else centre + half)


@dataclass(frozen=True)
class SuccessCount:
    """Successes among episodes."""

    successes: int
    episodes: int

    @property
    def success_rate(self) -> float | None:
        """None without an episode."""
        return self.successes / self.episodes if self.episodes else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % Wilson interval; None without an episode."""
        return wilson_interval(self.successes, self.episodes) if self.episodes else None

    def to_dict(self) -> dict[str, Any]:
        low, high = self.interval or (None, None)
        return {
            "episodes": self.episodes,
            "successes": self.successes,
            "success_rate": self.success_rate,
            "low": low,
            "high": high,
        }

    def __str__(self) -> str:
        if self.interval is None:
            return "-"
        low, high = self.interval
        return (
            f"{100 * self.successes / self.episodes:.1f} % [{100 * low:.1f}, {100 * high:.1f}] "
            f"{self.successes}/{self.episodes}"
        )


@dataclass(frozen=True)
class TaskResult:
    """One task, or all of them together."""

    task_id: int | None
    """None = all."""
    instruction: str
    standard: SuccessCount
    """From all starts."""
    held_out: SuccessCount
    """From those that no training of this package uses."""
    mean_steps: float | None
    """Of all episodes."""


@dataclass(frozen=True)
class EvaluationResult:
    """The outcome of an evaluation, whole or as far as it got."""

    question: dict[str, Any]
    """See `EvaluationRequest.question`."""
    deviations: list[str]
    """See `EvaluationRequest.deviations`."""
    tasks: list[TaskResult]
    overall: TaskResult
    episodes: list[dict[str, Any]]
    """`task`, `trial`, `success` and `steps` of each, by task and trial."""
    num_planned: int

    @property
    def complete(self) -> bool:
        return len(self.episodes) == self.num_planned

    @property
    def standard(self) -> SuccessCount:
        """Over all tasks and starts."""
        return self.overall.standard

    @property
    def held_out(self) -> SuccessCount:
        """Over all tasks, held-out starts only."""
        return self.overall.held_out


def summarize(
    question: dict[str, Any],
    episodes: Sequence[dict[str, Any]],
    instructions: Mapping[int, str],
    held_out: Mapping[int, Collection[int]],
    deviations: list[str],
) -> EvaluationResult:
    """Count successes.

    Args:
        question: what was asked.
        episodes: finished ones.
        instructions, held_out: by task.
        deviations: from the published protocol.
    """
    ordered = sorted(episodes, key=lambda episode: (episode["task"], episode["trial"]))

    def count(task_id: int | None, instruction: str) -> TaskResult:
        mine = [episode for episode in ordered if task_id in (None, episode["task"])]
        kept_back = [episode for episode in mine if episode["trial"] in held_out[episode["task"]]]
        mean_steps = sum(episode["steps"] for episode in mine) / len(mine) if mine else None
        return TaskResult(task_id, instruction, _count(mine), _count(kept_back), mean_steps)

    return EvaluationResult(
        question=question,
        deviations=deviations,
        tasks=[count(task, instruction) for task, instruction in instructions.items()],
        overall=count(None, "all"),
        episodes=ordered,
        num_planned=len(question["tasks"]) * question["trials"],
    )


def _count(episodes: Sequence[dict[str, Any]]) -> SuccessCount:
    return SuccessCount(sum(episode["success"] for episode in episodes), len(episodes))


def write_reports(directory: Path, result: EvaluationResult) -> None:
    """results.json, results.csv and report.md."""
    replace_file(directory / "results.json", json.dumps(to_dict(result), indent=2) + "\n")
    replace_file(directory / "results.csv", to_csv(result))
    replace_file(directory / "report.md", to_markdown(result))


def to_dict(result: EvaluationResult) -> dict[str, Any]:
    def row(task: TaskResult) -> dict[str, Any]:
        return {
            "task": task.task_id,
            "instruction": task.instruction,
            "standard": task.standard.to_dict(),
            "held_out": task.held_out.to_dict(),
            "mean_steps": task.mean_steps,
        }

    return {
        "complete": result.complete,
        "planned": result.num_planned,
        "deviations": result.deviations,
        "overall": row(result.overall),
        "tasks": [row(task) for task in result.tasks],
    }


def to_csv(result: EvaluationResult) -> str:
    """A row per task, and one called `all`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ("episodes", "successes", "success_rate", "low", "high")
    writer.writerow(
        ["task", "instruction", *(f"{group}_{column}" for group in GROUPS for column in columns), "mean_steps"]
    )
    for task in (*result.tasks, result.overall):
        counts = [count.to_dict()[column] for count in (task.standard, task.held_out) for column in columns]
        name = "all" if task.task_id is None else task.task_id
        writer.writerow([name, task.instruction, *counts, task.mean_steps])
    return text.getvalue()


def to_markdown(result: EvaluationResult) -> str:
    """For a person who was not there."""
    question = result.question
    state = "" if result.complete else f" (incomplete: {len(result.episodes)} of {result.num_planned} episodes)"
    lines = [f"# {question['suite'] or question['env']}: {question['checkpoint']}{state}", ""]
    lines += ["| task | instruction | all starts | held-out starts | mean steps |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(cells)} |" for cells in map(_cells, (*result.tasks, result.overall))]
    lines += [] if result.complete else ["", INCOMPLETE]
    lines += [
        "",
        "Success rate [95 % Wilson interval] successes/episodes. Held-out starts are those that no training of "
        "vlarl_rllib uses, the last"
        " fifth of each task's initial states. One greedy episode from each start.",
        "",
        f"Not the published protocol: {'; '.join(result.deviations)}."
        if result.deviations
        else "The published protocol.",
        "",
        "| what was asked | |",
        "|---|---|",
    ]
    lines += [f"| {key} | {value} |" for key, value in question.items() if value is not None]
    return "\n".join(lines) + "\n"


def to_table(result: EvaluationResult) -> Table:
    """For the terminal."""
    table = Table("task", "instruction", caption="success rate [95 % Wilson interval]")
    for heading in ("all starts", "held-out starts"):
        table.add_column(heading, no_wrap=True)
    for task in result.tasks:
        table.add_row(*_cells(task)[:4])
    table.add_section()
    table.add_row(*_cells(result.overall)[:4], style="bold")
    return table


def _cells(task: TaskResult) -> tuple[str, ...]:
    name = "" if task.task_id is None else str(task.task_id)
    steps = "-" if task.mean_steps is None else f"{task.mean_steps:.1f}"
    return name, task.instruction, str(task.standard), str(task.held_out), steps
