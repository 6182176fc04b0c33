"""`vlarl report`: a run, or many beside each other, in one file, to be sent to somebody or looked at in a year."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.table import Column, Table

from vlarl_rllib.process.own_files import replace_file
from vlarl_rllib.reports.curves import draw_curves
from vlarl_rllib.reports.page import rate_of, task_names, to_html
from vlarl_rllib.reports.series import Curves, charts_of, evaluation_points
from vlarl_rllib.runs.directory import RUNS
from vlarl_rllib.runs.files import RunFiles, read_run, read_runs, trial_directories
from vlarl_rllib.settings import SettingsError

CURVES_FILE, REPORT_FILE = "curves.png", "report.html"


def write_report(path: Path) -> Path:
    """Write both files into a run's directory; returns the report's path. Nothing outside of it is read or written.

    Raises:
        SettingsError: no run there, one without an iteration, or one with a damaged file or a link that leads out.
    """
    found = read_run(path)
    rows, names = found.rows, task_names(found)
    curves = draw_curves(charts_of([Curves(path.name, 0, [rows])], "steps", names if len(names) > 1 else None), "steps")
    replace_file(found.run.path / CURVES_FILE, curves)
    replace_file(found.run.path / REPORT_FILE, to_html([found], found.run.path.name))
    return found.run.path / REPORT_FILE


def report(paths: Sequence[Path], out: Path | None = None) -> tuple[Path, Table]:
    """The report of runs and of Tune experiments' trials, and a line for each run.

    A single run's goes into its directory, with `curves.png`; an experiment's into its own; any other into
    `runs/compare-TIME.html`.

    Args:
        out: the file to write instead.

    Raises:
        SettingsError: as `write_report`, or `out` cannot be written.
    """
    experiments = [path for path in paths if trial_directories(path)]
    runs, told = read_runs(paths)
    if out is None and len(paths) == 1 and not experiments:
        return write_report(paths[0]), compare(runs)
    title = paths[0].resolve().name if len(paths) == 1 else f"{len(runs)} runs"
    if out is None:
        out = paths[0] / REPORT_FILE if len(paths) == 1 else RUNS / f"compare-{time.strftime('%Y%m%d-%H%M%S')}.html"
    elif out.suffix != ".html":
        raise SettingsError(f"--out: {out} must be called something.html, so that no other file is written over")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, to_html(runs, title, told, is_sweep=bool(experiments)))
    except OSError as error:
        raise SettingsError(f"--out: {out} cannot be written ({error.strerror}); give another file") from None
    return out, compare(runs)


def compare(runs: Sequence[RunFiles]) -> Table:
    """One line for each run."""
    table = Table(
        Column("run", overflow="fold"), "iterations", "env steps", "success before", "after", "wall time", "faults"
    )
    for found in runs:
        rows, summary = found.rows, found.summary
        points = [evaluation for _, evaluation in evaluation_points(rows)]
        before, after = (rate_of(points[0]), rate_of(points[-1])) if len(points) > 1 else ("-", "-")
        wall = f"{summary['wall_seconds']:.0f} s" if summary else "running or killed"
        faults = sum(rows[-1]["faults"].values())
        table.add_row(
            found.run.path.name, str(len(rows)), f"{rows[-1]['env_steps']:,}", before, after, wall, str(faults)
        )
    return table
