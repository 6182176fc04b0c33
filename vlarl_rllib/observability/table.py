"""The live table of `vlarl train`: one line an iteration."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console

from vlarl_rllib.observability.driver_callback import DriverCallback
from vlarl_rllib.observability.metrics import iteration_row
from vlarl_rllib.observability.self_test import tell

COLUMNS = (
    ("iter", 8), ("steps", 9), ("success", 8), ("policy", 8), ("value", 7), ("kl", 8),
    ("sample", 7), ("update", 7), ("sync", 6), ("env/s", 7), ("calls/s", 8), ("train/s", 8), ("eta", 9),
)  # fmt: skip
RATES = ("env_steps_per_second", "decisions_per_second", "trained_samples_per_second")


class LiveTable(DriverCallback):
    """Prints each iteration as Tune reports it.

    Args:
        iterations: of the whole run, for the estimate of what is left.
        add: records an iteration's `result["vlarl"]`; returns how many earlier rows it replaced.
    """

    def __init__(self, iterations: int, console: Console, add: Callable[[dict[str, Any]], int]) -> None:
        self._iterations, self._console, self._add = iterations, console, add
        self._has_header = False
        self._spent: list[float] = []

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        row = iteration_row(result)
        if not self._has_header:
            self._has_header = True
            self._console.print(f"ready after {row['seconds']['startup']:.0f} s", style="dim")
            self._console.print("".join(f"{name:>{width}}" for name, width in COLUMNS), style="bold")
        self._spent.append(sum(v for k, v in row["seconds"].items() if k != "startup"))
        if repeated := self._add(row):
            self._console.print(
                f"{repeated} iteration(s) are played again after a fault: {_nonzero(row['faults'])}", style="yellow"
            )
        self._print_evaluation(row["initial_evaluation"])
        self._console.print(
            "".join(f"{text:>{width}}" for text, (_, width) in zip(self._cells(row), COLUMNS, strict=True))
        )
        self._print_evaluation(row["evaluation"])
        tell(row, self._console)

    def _print_evaluation(self, evaluation: dict[str, Any] | None) -> None:
        if evaluation:
            rate, episodes = 100 * evaluation["success_rate"], evaluation["episodes"]
            self._console.print(
                f"evaluation: {rate:.1f} % of {episodes} greedy episodes from held-out starts", style="dim"
            )

    def _cells(self, row: dict[str, Any]) -> list[str]:
        seconds = row["seconds"]
        left = (self._iterations - row["iteration"]) * sum(self._spent) / len(self._spent)
        success = "-" if row["success_rate"] is None else f"{100 * row['success_rate']:.0f} %"
        return [
            f"{row['iteration']}/{self._iterations}",
            f"{row['env_steps']:,}",
            success,
            f"{row['policy_loss']:.4f}",
            f"{row['value_loss']:.3f}",
            f"{row['approx_kl']:.1e}",
            *(f"{seconds[name]:.1f}" for name in ("sample", "update", "sync")),
            *(f"{row[name]:.1f}" if row[name] < 1000 else f"{row[name]:,.0f}" for name in RATES),
            time.strftime("%H:%M:%S", time.gmtime(left)) if left < 86400 else f"{left / 86400:.1f} d",
        ]


def _nonzero(faults: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in faults.items() if count)
