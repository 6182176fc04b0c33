"""What `vlarl tune` shows: a line for each finished iteration, a live table where somebody watches, the ranking."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from vlarl_rllib.observability.driver_callback import DriverCallback
from vlarl_rllib.observability.metrics import iteration_row
from vlarl_rllib.observability.self_test import tell
from vlarl_rllib.settings.overrides import dotted

COLUMNS = (("iter", 6), ("steps", 9), ("success", 8), ("evaluation", 11), ("kl", 9), ("seconds", 8))
MAX_NAME = 64


def short(sampled: Mapping[str, Any]) -> str:
    """Values without the sections of their keys: `lr=1e-05 seed=2`."""
    return " ".join(f"{key.rsplit('.', 1)[-1]}={_shown(value)}" for key, value in sampled.items())


def label_of(trial: Any) -> str:
    """What a reader calls one of Tune's trials: its number and its values, as they are now."""
    return f"{_number(trial)} {short(dotted(trial.config['sampled']))}"


def directory_name(trial: Any) -> str:
    """A trial's: its number and its values, in characters that no shell and no file system minds."""
    words = re.sub(r"[^A-Za-z0-9.+-]+", "_", label_of(trial)).strip("_")
    return words[:80].rstrip("_.")


def _number(trial: Any) -> str:
    return trial.trial_id.rsplit("_", 1)[-1][-3:]


class ExperimentTable(DriverCallback):
    """Prints each iteration of each trial as Tune reports it.

    Args:
        iterations: of each trial.
    """

    def __init__(self, iterations: int, console: Console) -> None:
        self._iterations, self._console = iterations, console
        self._width = 0
        self._live: Live | None = None

    def __enter__(self) -> ExperimentTable:
        if self._console.is_terminal:
            self._live = Live(console=self._console, transient=True, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        row = iteration_row(result)
        width = min(MAX_NAME, max(len(_short_label(other)) for other in trials))
        if width > self._width:
            self._width = width
            self._console.print(f"{'trial':<{width}}" + "".join(f"{name:>{w}}" for name, w in COLUMNS), style="bold")
        cells = "".join(f"{cell:>{width}}" for cell, (_, width) in zip(self._cells(row), COLUMNS, strict=True))
        self._console.print(f"{_short_label(trial):<{self._width}}{cells}")
        tell(row, self._console, of=f"{_short_label(trial)}: ", passed=False)
        if self._live is not None:
            self._live.update(self._table(trials), refresh=True)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self._live is not None:
            self._live.update(self._table(trials), refresh=True)

    def _cells(self, row: dict[str, Any]) -> list[str]:
        evaluation = row["evaluation"] or row["initial_evaluation"]
        return [
            f"{row['iteration']}/{self._iterations}",
            f"{row['env_steps']:,}",
            _percent(row["success_rate"]),
            _percent(evaluation and evaluation["success_rate"]),
            f"{row['approx_kl']:.1e}",
            f"{sum(row['seconds'].values()) - row['seconds']['startup']:.1f} s",
        ]

    def _table(self, trials: Sequence[Any]) -> Table:
        table = Table("trial", "state", "iteration", "success", "evaluation", "best", box=None, padding=(0, 2))
        for trial in trials:
            row = (trial.last_result or {}).get("vlarl", {})
            names = ("success_rate", "evaluation_success_rate", "best_evaluation_success_rate")
            table.add_row(
                label_of(trial),
                trial.status.lower(),
                f"{row['iteration']}/{self._iterations}" if row else "-",
                *(_percent(row.get(name)) for name in names),
            )
        return table


def _short_label(trial: Any) -> str:
    label = label_of(trial)
    return label if len(label) <= MAX_NAME else label[: MAX_NAME - 3] + "..."


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.1f} %"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    text = str(value)
    with suppress(ValueError):
        return text[text.rindex("/") + 1 :]  # of a path its end
    return text
