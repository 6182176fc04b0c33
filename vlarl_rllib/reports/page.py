"""The report as one page of HTML: the same sections for one run and for many."""

from __future__ import annotations

import base64
import importlib.resources
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlarl_rllib.envs.registry import task_instructions
from vlarl_rllib.evaluation.report import wilson_interval
from vlarl_rllib.process.own_files import is_inside
from vlarl_rllib.reports.comparison import (
    LAST_SHARE,
    MAX_NAMED_KEYS,
    MIN_SETTINGS,
    Group,
    Outcome,
    differing_keys,
    importances,
    make_groups,
    names_of,
    outcome,
    ranked,
    shown,
    uses_evaluations,
)
from vlarl_rllib.reports.series import (
    FAINT_GROUPS,
    Curves,
    axes_for,
    charts_of,
    evaluation_points,
    evaluation_successes,
    window_of,
)
from vlarl_rllib.reports.svg import picture
from vlarl_rllib.runs.files import SHOWN_SECONDS, RunFiles
from vlarl_rllib.runs.ranking import SEED
from vlarl_rllib.settings import Settings
from vlarl_rllib.settings.in_place import flat

MAX_VIDEO_BYTES = 16 * 2**20
"""Of all videos together; further ones stay beside the report."""
NUM_COLORS = 10
"""Further groups are drawn in grey, behind the others."""
WIDE_TABLE = 5
"""More groups than that are not columns of a table."""
MAX_VALUES = 12
"""Of a setting, named in a table."""
MAX_TASKS = 10
"""Lines of the chart by task."""
UNLIKELY = 0.05


def to_html(runs: Sequence[RunFiles], title: str, told: Sequence[str] = (), *, is_sweep: bool = False) -> str:
    """The whole page.

    Args:
        runs: at least one.
        told: what is to be known about them.
        is_sweep: of a Tune experiment.
    """
    import jinja2

    template = importlib.resources.files("vlarl_rllib").joinpath("templates/report.html.j2").read_text()
    names = names_of(runs)
    ranking = ranked(make_groups(runs, names))
    return (
        jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(
            title=title,
            told=[_subtitle(runs), *told],
            differences=_differences(ranking),
            ranking=_ranking(ranking) if len(runs) > 1 else None,
            importance=_importance(ranking, is_sweep),
            seconds=_seconds([group for group, _ in ranking]),
            faults=_faults([group for group, _ in ranking]),
            versions=sorted({_versions(run) for run in runs}),
            **_charts(ranking, task_names(runs[0]) if len(runs) == 1 else {}),
            **(_of_one_run(runs[0]) if len(runs) == 1 else {}),
        )
    )


def _subtitle(runs: Sequence[RunFiles]) -> str:
    revisions = sorted({str(row["git_revision"]) for run in runs for row in run.rows} - {"None"})
    unfinished = sum(run.summary is None for run in runs)
    if len(runs) == 1:
        words = f"{len(runs[0].rows)} iterations"
        words += "; no summary.json, so the run goes on or was killed" if unfinished else ""
    else:
        words = f"{len(runs)} runs"
        words += f"; {unfinished} without summary.json go on or were killed" if unfinished else ""
    return words + (f"; git {', '.join(revisions)}" if revisions else "")


# Settings


def _differences(ranking: Sequence[tuple[Group, Outcome | None]]) -> dict[str, Any]:
    """What differs among the groups, and what all share that is no default; for one group the latter alone."""
    groups = [group for group, _ in ranking]
    known = [group.settings for group in groups if group.settings is not None]
    defaults = dict(flat(Settings().to_dict()))
    keys = differing_keys(known)
    shared = [
        [key, shown(value), shown(defaults.get(key))]
        for key, value in (known[0].items() if known else ())
        if key not in keys and value != defaults.get(key) and (key != SEED or len(groups[0].runs) == len(groups) == 1)
    ]
    rows = [[key, *(_value(group, key) for group in groups)] for key in keys]
    table = [["setting", *(group.name for group in groups)], *rows] if rows else None
    if table and len(groups) > WIDE_TABLE:
        table = [["setting", "values"], *([row[0], ", ".join(_distinct(row[1:]))] for row in rows)]
    unread = [group.name for group in groups if group.settings is None]
    both = [["setting", "value", "default"], *shared] if shared else None
    return {"table": table, "shared": both, "unread": unread}


def _value(group: Group, key: str) -> str:
    return "-" if group.settings is None else shown(group.settings.get(key))


def _distinct(values: Sequence[str]) -> list[str]:
    """Numbers in order, the first `MAX_VALUES` of them."""

    def order(value: str) -> tuple[bool, float, str]:
        try:
            return False, float(value), value
        except ValueError:
            return True, 0.0, value

    found = sorted(set(values), key=order)
    return found if len(found) <= MAX_VALUES else [*found[:MAX_VALUES], f"{len(found) - MAX_VALUES} more"]


# Results


def _ranking(ranking: Sequence[tuple[Group, Outcome | None]]) -> dict[str, Any]:
    by_evaluation = uses_evaluations([group for group, _ in ranking])
    keys = differing_keys([group.settings for group, _ in ranking])
    keys = keys if len(ranking) > WIDE_TABLE and len(keys) > MAX_NAMED_KEYS else []
    head = ["", "settings", "success, last", "95 % interval", *(["before"] if by_evaluation else [])]
    head += ["runs", "iterations", "environment steps", *keys]
    rows = []
    for number, (group, found) in enumerate(ranking, start=1):
        cells = [group.name, *([percent(found.rate), interval(found.low, found.high)] if found else ["-", "-"])]
        if by_evaluation:
            first = [evaluation_points(run.rows)[0][1]["success_rate"] for run in group.runs]
            cells.append(percent(sum(first) / len(first)))
        cells += [str(len(group.runs)), _span(len(run.rows) for run in group.runs)]
        cells += [_span(run.rows[-1]["env_steps"] for run in group.runs), *(_value(group, key) for key in keys)]
        rows.append({"number": number, "color": color_name(number - 1), "cells": cells})
    training = f"training episodes in the last {100 // LAST_SHARE} % of the iterations"
    source = "the last greedy evaluation" if by_evaluation else training
    return {"head": head, "rows": rows, "source": source}


def color_name(number: int) -> str:
    return f"c{number}" if number < NUM_COLORS else "rest"


def _span(numbers: Any) -> str:
    low, *_, high = sorted({*numbers}) * 2
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _importance(ranking: Sequence[tuple[Group, Outcome | None]], is_sweep: bool) -> dict[str, Any] | None:
    keys = differing_keys([group.settings for group, _ in ranking])
    if not keys or not (is_sweep or len(ranking) >= MIN_SETTINGS):
        return None
    rows = [
        {"cells": [one.key, f"{100 * one.share:.0f} %", f"{one.p:.3f}", one.best], "is_clear": one.p <= UNLIKELY}
        for one in importances(ranking)
    ]
    return {"rows": rows, "settings": len(ranking), "needed": MIN_SETTINGS}


def _seconds(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Where the time of each group's runs went."""
    bars = []
    for group in groups:
        rows = [row for run in group.runs for row in run.rows]
        sums = {name: sum(row["seconds"].get(name, 0.0) for row in rows) for name in ("startup", *SHOWN_SECONDS)}
        total = sum(sums.values())
        parts = [(name, f"{100 * spent / total:.1f}", duration(spent)) for name, spent in sums.items() if spent]
        bars.append({"name": group.name, "total": duration(total), "parts": parts})
    return bars


def _faults(groups: Sequence[Group]) -> list[list[str]]:
    """A row for each kind that a group has had."""
    counts = [Counter[str]() for _ in groups]
    for count, group in zip(counts, groups, strict=True):
        for run in group.runs:
            count.update(run.rows[-1]["faults"])
    kinds = [kind for kind in dict.fromkeys(kind for count in counts for kind in count) if any(c[kind] for c in counts)]
    rows = [[kind, *(str(count[kind]) for count in counts)] for kind in kinds]
    table = [["fault", *(group.name for group in groups)], *rows]
    if len(groups) > WIDE_TABLE:  # turned over, without the groups that had none
        table = [line for line in map(list, zip(*table, strict=True)) if set(line[1:]) != {"0"}]
    return table if rows else []


def _versions(run: RunFiles) -> str:
    return ", ".join(f"{name} {version}" for name, version in (run.summary or {}).get("versions", {}).items())


# Charts


def _charts(ranking: Sequence[tuple[Group, Outcome | None]], names: Mapping[str, str]) -> dict[str, Any]:
    groups = [
        Curves(group.name, number if number < NUM_COLORS else None, [run.rows for run in group.runs])
        for number, (group, _) in enumerate(ranking)
    ]
    groups.reverse()  # the best is drawn last, over the others
    by_task = dict(list(names.items())[:MAX_TASKS]) if len(names) > 1 else {}
    legend = [(color_name(number), group.name, len(group.runs)) for number, (group, _) in enumerate(ranking)]
    return {
        "axes": [
            {"id": axis, "label": label, "charts": [picture(chart) for chart in charts_of(groups, axis, by_task)]}
            for axis, label in axes_for([rows for group in groups for rows in group.runs]).items()
        ],
        "legend": legend[:NUM_COLORS],
        "num_grey": max(0, len(groups) - NUM_COLORS),
        "caption": _how_drawn(groups),
    }


def _how_drawn(groups: Sequence[Curves]) -> str:
    words = ["Error bars of one run's evaluation: Wilson's 95 % interval."]
    are_few = len(groups) <= FAINT_GROUPS
    if any(len(group.runs) > 1 for group in groups):
        thin = "; thin: each run" if are_few else ""
        words.insert(0, f"Several runs: their mean and, as far as all have come, from the lowest to the highest{thin}.")
    if (window := max(window_of(len(rows)) for group in groups for rows in group.runs)) > 1:
        words.insert(0, f"Smoothed over up to {window} iterations{'; raw faint' if are_few else ''}.")
    return " ".join(words)


# One run


def _of_one_run(found: RunFiles) -> dict[str, Any]:
    names, points = task_names(found), evaluation_points(found.rows)
    return {
        "tiles": _tiles(found, points),
        "stages": [stage_cells(stage) for stage in found.stages],
        "evaluations": _evaluation_table(points, names),
        "videos": _videos(found.run.path, names),
        "config": found.config,
    }


def task_names(found: RunFiles) -> dict[str, str]:
    """The instruction of each task id; "task 3" where the environment is not installed here."""
    try:
        env = found.run.settings().env
        instructions = task_instructions(env.suite, name=env.name)
    except (
        ImportError,
        ValueError,
    ):  # no LIBERO here, or settings of another version: neither keeps a report from being written
        instructions = []
    evaluations = [evaluation for _, evaluation in evaluation_points(found.rows)]
    ids = {int(task) for row in (*found.rows, *evaluations) for task in row["success_rate_by_task"]}
    return {str(task): instructions[task] if task < len(instructions) else f"task {task}" for task in sorted(ids)}


def _tiles(found: RunFiles, points: list[tuple[int, dict[str, Any]]]) -> list[tuple[str, str]]:
    rows, summary = found.rows, found.summary
    tiles = [
        ("environment steps", f"{rows[-1]['env_steps']:,}"),
        ("training episodes", f"{sum(row['episodes'] for row in rows):,}"),
    ]
    if len(points) > 1:
        tiles += [("success before", rate_of(points[0][1])), ("success after", rate_of(points[-1][1]))]
    if training := outcome([rows], by_evaluation=False):
        tiles.append((f"in training, last {100 // LAST_SHARE} %", percent(training.rate)))
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


def _evaluation_table(points: list[tuple[int, dict[str, Any]]], names: dict[str, str]) -> list[list[str]]:
    """A column for each evaluation, a row for each task that was evaluated; none without evaluations."""
    if not points:
        return []
    evaluations = [evaluation for _, evaluation in points]
    rows = [
        ["after environment steps", *(f"{steps:,}" for steps, _ in points)],
        ["success", *map(rate_of, evaluations)],
        ["95 % interval", *(interval(*wilson_interval(*evaluation_successes(one))) for one in evaluations)],
        ["episodes", *(str(evaluation["episodes"]) for evaluation in evaluations)],
    ]
    for task, name in names.items():
        rates = [evaluation["success_rate_by_task"].get(task) for evaluation in evaluations]
        if any(rate is not None for rate in rates):
            rows.append([name, *("-" if rate is None else f"{100 * rate:.0f} %" for rate in rates)])
    return rows


def _videos(run: Path, names: dict[str, str]) -> list[dict[str, str]]:
    """Those that lie in the run's directory; links that lead out of it are left out."""
    videos, total = [], 0
    for file in sorted((run / "videos").glob("*.mp4")):
        if not (is_inside(file, run) and file.is_file()):
            continue
        total += file.stat().st_size
        if total > MAX_VIDEO_BYTES:
            break
        videos.append({"name": _caption(file.stem, names), "data": base64.b64encode(file.read_bytes()).decode()})
    return videos


def _caption(stem: str, names: dict[str, str]) -> str:
    """What a film shows, from its file's name (`rollout.video`)."""
    parts = re.fullmatch(r"iteration_(\d+)_task_(\d+)_start_(\d+)_(\w+)", stem)
    if parts is None:
        return stem
    iteration, task, start = map(int, parts.groups()[:3])
    return f"iteration {iteration}: {names.get(str(task), f'task {task}')}, start {start}, {parts[4]}"


def rate_of(evaluation: dict[str, Any]) -> str:
    return percent(evaluation["success_rate"])


def percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"


def interval(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
