"""A run's first charts as one picture, to be pasted somewhere. matplotlib is imported in the function that draws."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

from vlarl_rllib.reports.series import AXES, Chart

COLUMNS, MAX_CHARTS = 3, 6
MAX_LABEL = 40
"""Longer names of tasks are too much for a small picture."""


def draw_curves(charts: Sequence[Chart], axis: str) -> bytes:
    """A PNG of the first `MAX_CHARTS` charts of one run.

    Args:
        axis: which of `AXES` they are over.
    """
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    shown = charts[:MAX_CHARTS]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a matplotlibrc in the working directory may ask for LaTeX
        figure = Figure(figsize=(15, 8), layout="constrained")
        for number, chart in enumerate(shown, start=1):
            _draw(figure.add_subplot(-(-len(shown) // COLUMNS), COLUMNS, number), chart, AXES[axis])
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _draw(plot: object, chart: Chart, label: str) -> None:
    names = {color: textwrap.shorten(name, MAX_LABEL, placeholder="...") for color, name in chart.legend}
    for line in chart.lines:
        color = f"C{line.color or 0}"
        if line.bars:
            spread = [line.y - line.low, line.high - line.y]  # type: ignore[operator]
            plot.errorbar(line.x, line.y, yerr=spread, fmt="o-", color=color, capsize=4)  # type: ignore[attr-defined]
        else:
            style = {"alpha": 0.35, "linewidth": 0.8} if line.faint else {"label": names.get(line.color or 0)}
            plot.plot(line.x, line.y, color=color, **style)  # type: ignore[attr-defined]
    if chart.log:
        plot.set_yscale("log")  # type: ignore[attr-defined]
    plot.set(title=chart.title, xlabel=label, **({"ylim": (-0.02, 1.02)} if chart.is_rate else {}))  # type: ignore[attr-defined]
    if names:
        plot.legend(loc="best", fontsize="small")  # type: ignore[attr-defined]
