"""Success rates and what is written about them."""

import csv
import io
import json

import pytest
from rich.console import Console

from vlarl_rllib.evaluation.report import (
    EvaluationResult,
    SuccessCount,
    summarize,
    to_csv,
    to_dict,
    to_markdown,
    to_table,
    wilson_interval,
    write_reports,
)

QUESTION = {"checkpoint": "model", "suite": "libero_goal", "env": "libero", "tasks": [0, 3], "trials": 4, "seed": 7}


def test_wilson_intervals_worked_out_by_hand() -> None:
    # z^2 = 3.841459. For 8 of 10: centre (0.8 + 0.1920729)/(1.3841459) = 0.7167402,
    # half width 1.959964/1.3841459 * sqrt(0.016 + 0.0096036) = 1.4160097 * 0.1600114 = 0.2265777.
    assert wilson_interval(8, 10) == pytest.approx((0.4901625, 0.9433179), abs=1e-6)
    # 0 of 50: low end 0, high end z^2/(n + z^2) = 3.841459/53.841459.
    assert wilson_interval(0, 50) == (0.0, pytest.approx(0.0713476, abs=1e-6))
    # 50 of 50 is its mirror image.
    assert wilson_interval(50, 50) == (pytest.approx(0.9286524, abs=1e-6), 1.0)
    # 1 of 1: low end n/(n + z^2) = 1/4.841459.
    assert wilson_interval(1, 1) == (pytest.approx(0.2065493, abs=1e-6), 1.0)


@pytest.mark.parametrize(("successes", "episodes"), [(0, 0), (3, 2), (-1, 5)])
def test_there_is_no_interval_without_episodes(successes: int, episodes: int) -> None:
    with pytest.raises(ValueError, match="no success rate"):
        wilson_interval(successes, episodes)


def result(episodes: list[tuple[int, int, bool, int]]) -> EvaluationResult:
    """(task, trial, success, steps) of each; trial 3 is held out."""
    rows = [
        {"task": task, "trial": trial, "success": success, "steps": steps} for task, trial, success, steps in episodes
    ]
    instructions = {0: "open the drawer", 3: "push the plate"}
    return summarize(QUESTION, rows, instructions, {0: {3}, 3: {3}}, ["4 trial(s) of each task"])


WHOLE = [
    (3, 0, False, 9), (0, 0, True, 4), (0, 1, True, 6), (0, 2, False, 9), (0, 3, True, 5),
    (3, 1, True, 3), (3, 2, False, 9), (3, 3, False, 9),
]  # fmt: skip


def test_successes_are_counted_by_task_and_over_all_and_held_out_starts_apart() -> None:
    found = result(WHOLE)
    assert found.complete and found.num_planned == 8
    first, second = found.tasks
    assert (first.task_id, first.standard, first.held_out, first.mean_steps) == (
        0,
        SuccessCount(3, 4),
        SuccessCount(1, 1),
        6.0,
    )
    assert (second.task_id, second.standard, second.held_out, second.mean_steps) == (
        3,
        SuccessCount(1, 4),
        SuccessCount(0, 1),
        7.5,
    )
    assert found.standard == SuccessCount(4, 8) and found.held_out == SuccessCount(1, 2)
    assert found.standard.success_rate == 0.5 and found.standard.interval == wilson_interval(4, 8)
    assert [(episode["task"], episode["trial"]) for episode in found.episodes] == sorted(
        (task, trial) for task, trial, _, _ in WHOLE
    )


def test_half_an_evaluation_says_so_and_has_no_rate_where_nothing_was_played() -> None:
    found = result(WHOLE[1:3])
    assert not found.complete
    assert found.tasks[1].standard.success_rate is None and found.held_out.interval is None
    assert "incomplete: 2 of 8 episodes" in to_markdown(found) and "these rates tend to be too high" in to_markdown(
        found
    )
    assert "too high" not in to_markdown(result(WHOLE))
    assert to_dict(found)["tasks"][1]["standard"] == {
        "episodes": 0,
        "successes": 0,
        "success_rate": None,
        "low": None,
        "high": None,
    }
    assert to_dict(result([]))["overall"]["mean_steps"] is None


def test_the_files_hold_the_same_numbers(tmp_path) -> None:
    found = result(WHOLE)
    write_reports(tmp_path, found)
    values = json.loads((tmp_path / "results.json").read_text())
    rows = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert [row["task"] for row in rows] == ["0", "3", "all"]
    for row, task in zip(rows, [*values["tasks"], values["overall"]], strict=True):
        for group in ("standard", "held_out"):
            assert {key: float(row[f"{group}_{key}"]) for key in task[group]} == pytest.approx(task[group])
    report = (tmp_path / "report.md").read_text()
    assert "| 0 | open the drawer | 75.0 % [30.1, 95.4] 3/4 | 100.0 % [20.7, 100.0] 1/1 | 6.0 |" in report
    assert "Not the published protocol: 4 trial(s) of each task." in report
    assert to_csv(found) == (tmp_path / "results.csv").read_text()


def test_the_terminals_table_keeps_counts_on_one_line_of_80_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(to_table(result(WHOLE)))
    text = console.export_text()
    assert "75.0 % [30.1, 95.4] 3/4" in text and "50.0 % [21.5, 78.5] 4/8" in text
