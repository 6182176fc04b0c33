"""Action statistics of data sets, as `norm_stats` has them: what scales an action must be finite and in order."""

from __future__ import annotations

import math
from typing import Any

from vlarl_rllib.types import ACTION_SIZE

LARGEST = 1e30
"""Absolute value of an action, in whatever units: beyond it float32 would be near its end (NaN is not below it)."""


def action_statistics(entry: Any, where: str) -> dict[str, Any]:
    """The `action` part of an entry of `norm_stats`, checked. Raises ValueError, beginning with `where`."""
    statistics = entry.get("action") if isinstance(entry, dict) else None
    check_action_statistics(statistics, f"{where}: action")
    assert isinstance(statistics, dict), "it was checked"
    return statistics


def check_action_statistics(statistics: Any, where: str) -> None:
    """Raise ValueError, in one line that begins with `where`, for statistics that an action must not be scaled with.

    Quantiles are 7 finite numbers each, no upper one below its lower one where `mask` (7 booleans, all true where
    absent) holds. Equal ones pass: a dimension that never changes, such as the rotations of `tabletop`, has them, and
    scales to that constant.
    """
    check_quantiles(statistics, where, ACTION_SIZE)
    mask = statistics.get("mask", [True] * ACTION_SIZE)
    if not isinstance(mask, list) or len(mask) != ACTION_SIZE or not all(isinstance(entry, bool) for entry in mask):
        raise ValueError(
            f"{where}.mask is {_shortened(mask)}, must be {ACTION_SIZE} booleans; make the statistics anew"
        )
    _check_order(statistics, mask, where)


def check_quantiles(statistics: Any, where: str, size: int) -> None:
    """Raise ValueError, in one line that begins with `where`, unless `q01` and `q99` are `size` finite numbers each."""
    if not isinstance(statistics, dict):
        raise ValueError(
            f"{where} is {type(statistics).__name__}, must be an object with q01 and q99; make the statistics anew"
        )
    for name in ("q01", "q99"):
        numbers = statistics.get(name)
        if not isinstance(numbers, list) or len(numbers) != size or not all(map(_is_finite, numbers)):
            raise ValueError(
                f"{where}.{name} is {_shortened(numbers)}, must be {size} finite numbers; make the statistics anew"
            )


def _check_order(statistics: dict[str, Any], mask: list[bool], where: str) -> None:
    for index, (low, high, used) in enumerate(zip(statistics["q01"], statistics["q99"], mask, strict=True)):
        if used and not (low <= high and math.isfinite(high - low)):
            raise ValueError(
                f"{where}: q99 is {high} and q01 {low} at number {index}, must not be lower; make the statistics anew"
            )


def _is_finite(number: Any) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and abs(number) <= LARGEST


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
