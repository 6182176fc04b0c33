"""Rows to curves, by hand-computed numbers."""

from typing import Any

import numpy as np
import pytest
from made_up_rows import seconds, training_row

from vlarl_rllib.reports.series import MAX_POINTS, PANELS, Curves, axes_for, charts_of, positions, window_of
from vlarl_rllib.reports.svg import labels, picture, ticks

SUCCESS, RETURN = PANELS[0].title, PANELS[1].title


def line_of(groups: list[Curves], title: str, axis: str = "iterations") -> Any:
    """The strong line of the first group."""
    chart = next(chart for chart in charts_of(groups, axis) if chart.title == title)
    return next(line for line in chart.lines if not line.faint)


def test_wall_time_leaves_out_what_lies_between_a_stop_and_a_resume() -> None:
    rows = [
        training_row(1, timestamp=1000.0, seconds=seconds(startup=30.0, sample=10.0)),
        training_row(2, timestamp=1012.0),  # 10 s of work and 2 of a checkpoint
        training_row(3, timestamp=90_000.0, seconds=seconds(startup=20.0, sample=10.0)),  # resumed the next day
        training_row(4, timestamp=90_010.0),
    ]
    assert (positions(rows, "hours") * 3600).round(6).tolist() == [40.0, 52.0, 82.0, 92.0]
    assert list(axes_for([rows])) == ["steps", "iterations", "minutes"]
    assert list(axes_for([rows, [training_row(1, seconds=seconds(sample=11_000.0))]]))[2] == "hours"
    assert positions(rows, "steps").tolist() == [64.0, 128.0, 192.0, 256.0]
    assert positions(rows, "iterations").tolist() == [1.0, 2.0, 3.0, 4.0]


def test_seeds_are_a_mean_and_a_band_as_far_as_all_have_come() -> None:
    first = [training_row(i, return_mean=float(i)) for i in range(1, 6)]
    second = [training_row(i, return_mean=3.0 * i) for i in range(1, 4)]
    line = line_of([Curves("both", 0, [first, second])], RETURN)
    assert line.x.tolist() == [1.0, 2.0, 3.0] and line.y.tolist() == [2.0, 4.0, 6.0]
    assert (line.low.tolist(), line.high.tolist()) == ([1.0, 2.0, 3.0], [3.0, 6.0, 9.0])


def test_a_noisy_curve_is_smoothed_by_the_episodes_in_it() -> None:
    assert [window_of(count) for count in (3, 49, 50, 100)] == [1, 1, 3, 5]
    rows = [training_row(i, success_rate=0.0, episodes=1) for i in range(1, 51)]
    rows[9] = training_row(10, success_rate=1.0, episodes=8)
    line = line_of([Curves("one", 0, [rows])], SUCCESS)
    assert line.y[8:11] == pytest.approx([0.8, 0.8, 0.8]) and line.y[7] == line.y[11] == 0.0


def test_what_is_missing_or_infinite_is_left_out() -> None:
    returns = (None, float("inf"), 2.0)
    rows = [training_row(number, return_mean=mean) for number, mean in enumerate(returns, start=1)]
    line = line_of([Curves("one", 0, [rows])], RETURN)
    assert (line.x.tolist(), line.y.tolist()) == ([3.0], [2.0])
    nothing = [training_row(1, return_mean=None)]
    assert RETURN not in [chart.title for chart in charts_of([Curves("none", 0, [nothing])], "steps")]


def test_long_runs_have_lines_of_bounded_length() -> None:
    rows = [training_row(i, return_mean=float(i % 7)) for i in range(1, 2000)]
    for runs in ([rows], [rows, rows]):
        line = line_of([Curves("long", 0, runs)], RETURN)
        assert len(line.x) <= MAX_POINTS and (line.x[0], line.x[-1]) == (1.0, 1999.0)


def test_evaluations_have_wilsons_interval_or_the_spread_of_seeds() -> None:
    def run(rate: float) -> list[dict[str, Any]]:
        evaluation = {"episodes": 20, "success_rate": rate, "success_rate_by_task": {}}
        return [training_row(1, initial_evaluation=evaluation), training_row(2, evaluation=evaluation)]

    title = "success, held-out starts, greedy"
    line = line_of([Curves("one", 0, [run(0.25)])], title)
    assert line.x.tolist() == [0.0, 2.0]
    assert (line.low[0], line.high[0]) == pytest.approx((0.112, 0.469), abs=1e-3)  # Wilson's, 5 of 20
    line = line_of([Curves("two", 0, [run(0.25), run(0.75)])], title)
    assert (line.y[0], line.low[0], line.high[0]) == (0.5, 0.25, 0.75)


def test_ticks_are_round() -> None:
    assert ticks(0.0, 1.0) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(3.0, 11.0) == [4.0, 6.0, 8.0, 10.0]


def test_labels_are_short_and_in_one_unit() -> None:
    assert labels([0.0, 5e3, 1e4]) == ["0", "5k", "10k"]
    assert labels([1.5e6, 2e6]) == ["1.5M", "2M"]
    assert labels([1e-5, 2.5e-5]) == ["1e-5", "2.5e-5"]
    assert labels([0.2, 0.30000000000000004]) == ["0.2", "0.3"]
    assert labels([1e30]) == ["1e30"]


def test_a_constant_is_drawn_in_the_middle_and_rounding_is_no_curve() -> None:
    values = 1e-4 * (1 + 1e-12 * np.arange(5))
    rows = [training_row(i + 1, entropy=float(value)) for i, value in enumerate(values)]
    chart = next(chart for chart in charts_of([Curves("one", 0, [rows])], "steps") if "entropy" in chart.title)
    heights = {point.split(",")[1] for point in picture(chart).marks[0].points.split()}
    assert len(heights) == 1
