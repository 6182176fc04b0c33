"""`curves.png` and `report.html` of a run: everything in one file, to be sent to somebody or looked at in a year."""

from __future__ import annotations

import base64
import importlib.resources
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from vlarl_rllib.envs.registry import task_instructions
from vlarl_rllib.evaluation.report import wilson_interval
from vlarl_rllib.observability.curves import draw_curves, evaluation_points
from vlarl_rllib.process.own_files import is_inside, replace_file
from vlarl_rllib.runs.directory import RunDirectory
from vlarl_rllib.runs.files import STAGES_FILE, RunFiles, read_run

__all__ = ["CURVES_FILE", "REPORT_FILE", "STAGES_FILE", "compare", "stage_cells", "write_report"]

CURVES_FILE, REPORT_FILE = "curves.png", "report.html"
MAX_VIDEO_BYTES = 16 * 2**20
"""Of all videos together; further ones stay beside the report."""


def write_report(path: Path) -> Path:
    """Write both files into a run's directory; returns the report's path. Nothing outside of it is read or written.

    Raises:
        SettingsError: no run there, one without an iteration, or one with a damaged file or a link that leads out.
    """
    found = read_run(path)
    run, rows = found.run, found.rows
    names = _task_names(run, rows)
    curves = _draw(rows, names)
    replace_file(run.path / CURVES_FILE, curves)
    replace_file(run.path / REPORT_FILE, _to_html(found, curves, names))
    return run.path / REPORT_FILE


def compare(paths: Sequence[Path]) -> Table:
    """One line for each run. Raises as `write_report`."""
    table = Table("run", "iterations", "env steps", "success before", "after", "wall time", "faults")
    for found in map(read_run, paths):
        rows, summary = found.rows, found.summary
        points = [evaluation for _, evaluation in evaluation_points(rows)]
        before, after = (_rate(points[0]), _rate(points[-1])) if len(points) > 1 else ("-", "-")
        wall = f"{summary['wall_seconds']:.0f} s" if summary else "running or killed"
        faults = sum(rows[-1]["faults"].values())
        table.add_row(
            found.run.path.name, str(len(rows)), f"{rows[-1]['env_steps']:,}", before, after, wall, str(faults)
        )
    return table


def _draw(rows: list[dict[str, Any]], names: dict[str, str]) -> bytes:
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a matplotlibrc in the working directory may ask for LaTeX
        return draw_curves(rows, wilson_interval, names)


def _task_names(run: RunDirectory, rows: list[dict[str, Any]]) -> dict[str, str]:
    """The instruction of each task id; "task 3" where the environment is not installed here."""
    try:
        env = run.settings().env
        instructions = task_instructions(env.suite, name=env.name)
    except (
        ImportError,
        ValueError,
    ):  # no LIBERO here, or settings of another version: neither keeps a report from being written
        instructions = []
    evaluations = [evaluation for _, evaluation in evaluation_points(rows)]
    ids = {int(task) for row in (*rows, *evaluations) for task in row["success_rate_by_task"]}
    return {str(task): instructions[task] if task < len(instructions) else f"task {task}" for task in sorted(ids)}


def _to_html(found: RunFiles, curves: bytes, task_names: dict[str, str]) -> str:
    import jinja2

    run, rows, summary = found.run, found.rows, found.summary

    template = importlib.resources.files("vlarl_rllib").joinpath("templates/report.html.j2").read_text()
    points = evaluation_points(rows)
    faults = [(name, count) for name, count in rows[-1]["faults"].items() if count]
    return (
        jinja2.Environment(autoescape=True)
        .from_string(template)
        .render(
            name=run.path.name,
            subtitle=f"{len(rows)} iterations"
            + ("" if summary else "; no summary.json, so the run goes on or was killed"),
            tiles=_tiles(rows, summary, points),
            stages=[stage_cells(stage) for stage in found.stages],
            evaluations=_evaluation_table(points, task_names),
            curves=base64.b64encode(curves).decode(),
            videos=_videos(run.path, task_names),
            faults=faults,
            settings=found.config,
            versions=", ".join(f"{name} {version}" for name, version in (summary or {}).get("versions", {}).items()),
        )
    )


def _tiles(
    rows: list[dict[str, Any]], summary: dict[str, Any] | None, points: list[tuple[int, dict[str, Any]]]
) -> list[tuple[str, str]]:
    tiles = [
        ("environment steps", f"{rows[-1]['env_steps']:,}"),
        ("training episodes", f"{sum(row['episodes'] for row in rows):,}"),
    ]
    if len(points) > 1:
        tiles += [("success before", _rate(points[0][1])), ("success after", _rate(points[-1][1]))]
    sampling = sum(row["seconds"]["sample"] for row in rows)
    if sampling:
        tiles.append(("steps/s while sampling", f"{rows[-1]['env_steps'] / sampling:.1f}"))
    if summary:
        tiles.append(("wall time of training", f"{summary['wall_seconds'] / 60:.1f} min"))
    return tiles


def stage_cells(stage: dict[str, Any]) -> dict[str, str]:
    """A row of `stages.json` in words."""
    success = stage["success"]
    return {
        "stage": stage["stage"],
        "time": f"{stage['seconds']:.0f} s",
        "amount": stage["amount"],
        "greedy success (95 %)": f"{100 * success['rate']:.1f} % of {success['episodes']} "
        f"({100 * success['low']:.0f} to {100 * success['high']:.0f} %)"
        if success
        else "-",
    }


def _evaluation_table(points: list[tuple[int, dict[str, Any]]], task_names: dict[str, str]) -> list[list[str]]:
    """A column for each evaluation, a row for each task that was evaluated; none without evaluations."""
    if not points:
        return []
    evaluations = [evaluation for _, evaluation in points]
    rows = [
        ["after environment steps", *(f"{steps:,}" for steps, _ in points)],
        ["success", *map(_rate, evaluations)],
        ["95 % interval", *map(_interval, evaluations)],
        ["episodes", *(str(evaluation["episodes"]) for evaluation in evaluations)],
    ]
    for task, name in task_names.items():
        rates = [evaluation["success_rate_by_task"].get(task) for evaluation in evaluations]
        if any(rate is not None for rate in rates):
            rows.append([name, *("-" if rate is None else f"{100 * rate:.0f} %" for rate in rates)])
    return rows


def _videos(run: Path, task_names: dict[str, str]) -> list[dict[str, str]]:
    """Those that lie in the run's directory; links that lead out of it are left out."""
    shown, total = [], 0
    for file in sorted((run / "videos").glob("*.mp4")):
        if not (is_inside(file, run) and file.is_file()):
            continue
        total += file.stat().st_size
        if total > MAX_VIDEO_BYTES:
            break
        shown.append({"name": _caption(file.stem, task_names), "data": base64.b64encode(file.read_bytes()).decode()})
    return shown


def _caption(stem: str, task_names: dict[str, str]) -> str:
    """What a film shows, from its file's name (`rollout.video`)."""
    parts = re.fullmatch(r"iteration_(\d+)_task_(\d+)_start_(\d+)_(\w+)", stem)
    if parts is None:
        return stem
    iteration, task, start = map(int, parts.groups()[:3])
    return f"iteration {iteration}: {task_names.get(str(task), f'task {task}')}, start {start}, {parts[4]}"


def _rate(evaluation: dict[str, Any]) -> str:
    return f"{100 * evaluation['success_rate']:.1f} %"


def _interval(evaluation: dict[str, Any]) -> str:
    low, high = wilson_interval(round(evaluation["success_rate"] * evaluation["episodes"]), evaluation["episodes"])
    return f"{100 * low:.1f} to {100 * high:.1f} %"
