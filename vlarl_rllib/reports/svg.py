"""Charts as the numbers of an inline SVG: nothing is fetched, nothing runs, and it is sharp at every width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlarl_rllib.reports.series import SMALLEST, Chart, Line

WIDTH, HEIGHT = 340, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 22
UNITS = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))
"""(from, divisor, letter) of large numbers."""
EQUAL = 1e-6
"""Numbers that differ by less, relatively, are one in float32."""
MAX_MARKED = 12
"""Points of a line that are marked one by one."""


@dataclass(frozen=True)
class Mark:
    """A line of a chart, in the picture's pixels."""

    color: str
    """Of a style's name: `c0` to `c9`, or `rest`."""
    label: str
    points: str
    """Of a polyline."""
    faint: bool
    band: str
    """Of a polygon; empty without one."""
    bars: list[tuple[str, str, str]]
    """(x, from y, to y)"""
    dots: list[tuple[str, str]]


@dataclass(frozen=True)
class Picture:
    """A whole chart."""

    title: str
    x_ticks: list[tuple[str, str]]
    """(pixel, label)"""
    y_ticks: list[tuple[str, str]]
    marks: list[Mark]
    legend: list[tuple[str, str]]
    """(color, name)"""


def picture(chart: Chart) -> Picture:
    """Lay out a chart that has at least one line."""
    lines = chart.lines
    x_low, x_high = 0.0, max(float(line.x[-1]) for line in lines)
    x_high = x_high if x_high > SMALLEST else 1.0
    ends = [part for line in lines for part in (line.y, line.low, line.high) if part is not None]
    y_low, y_high = (0.0, 1.0) if chart.is_rate else _range(ends, chart.log)

    def to_x(x: np.ndarray) -> np.ndarray:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def to_y(y: np.ndarray) -> np.ndarray:
        y, low, high = (np.log10(part) if chart.log else np.asarray(part, float) for part in (y, y_low, y_high))
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    x_ticks, y_ticks = ticks(x_low, x_high), _decades(y_low, y_high) if chart.log else ticks(y_low, y_high)
    return Picture(
        chart.title,
        list(zip(_texts(to_x(np.asarray(x_ticks))), labels(x_ticks), strict=True)),
        list(zip(_texts(to_y(np.asarray(y_ticks))), labels(y_ticks), strict=True)),
        [
            _mark(line, to_x(line.x), *(None if part is None else to_y(part) for part in (line.y, line.low, line.high)))
            for line in lines
        ],
        [(_color(color), name) for color, name in chart.legend],
    )


def _mark(line: Line, x: np.ndarray, y: Any, low: np.ndarray | None, high: np.ndarray | None) -> Mark:
    across = _texts(x)
    band, bars = "", []
    if low is not None and high is not None:
        if line.bars:
            bars = list(zip(across, _texts(low), _texts(high), strict=True))
        else:
            band = f"{_points(across, _texts(high))} {_points(across[::-1], _texts(low[::-1]))}"
    marked = not line.faint and (line.bars or len(x) <= MAX_MARKED)
    down = _texts(y)
    dots = list(zip(across, down, strict=True)) if marked else []
    return Mark(_color(line.color), line.label, _points(across, down), line.faint, band, bars, dots)


def _color(number: int | None) -> str:
    return "rest" if number is None else f"c{number % 10}"


def _texts(pixels: np.ndarray) -> list[str]:
    return [f"{pixel:.1f}".removesuffix(".0") for pixel in pixels]


def _points(across: Sequence[str], down: Sequence[str]) -> str:
    return " ".join(f"{x},{y}" for x, y in zip(across, down, strict=True))


def _range(parts: Sequence[np.ndarray], log: bool) -> tuple[float, float]:
    """From the lowest to the highest number with some air; never empty."""
    low, high = float(min(part.min() for part in parts)), float(max(part.max() for part in parts))
    if log:
        return (low / 1.2, high * 1.2)
    spread = high - low if high - low > max(SMALLEST, EQUAL * abs(high)) else abs(high)
    air = 0.05 * spread if spread > SMALLEST else 0.5
    return (0.0 if 0 <= low <= 0.3 * high else low - air), high + air


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About so many round numbers between two."""
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count + 1)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Round numbers between two on a logarithmic axis: powers of ten, between few of them also 2 and 5 times those."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every, factors = max(1, (last - first) // 4), (1, 2, 5) if last - first <= 2 else (1,)
    numbers = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    return [number for number in numbers if low <= number <= high] or [low, high]


def labels(numbers: Sequence[float]) -> list[str]:
    """Short, in one unit for all of them."""
    largest = max((abs(number) for number in numbers), default=0.0)
    _, divisor, unit = next((entry for entry in UNITS if entry[0] <= largest < 1e12), (0.0, 1.0, ""))
    return [_label(number / divisor, unit) for number in numbers]


def _label(number: float, unit: str) -> str:
    if number == 0:
        return "0"
    if 1e-3 <= abs(number) < 1e5:
        return f"{number:.4g}{unit}"
    mantissa, _, exponent = f"{number:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
