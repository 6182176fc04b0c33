"""Groups, ranking and importance, by hand-computed numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_rows import training_row

from vlarl_rllib.reports.comparison import (
    MIN_SETTINGS,
    Group,
    importances,
    make_groups,
    names_of,
    outcome,
    ranked,
    uses_evaluations,
)
from vlarl_rllib.runs.directory import RunDirectory
from vlarl_rllib.runs.files import RunFiles


class Settled(RunFiles):
    """A run whose settings are given."""

    settings: Any = None


def run(name: str, rows: list[dict[str, Any]] | None = None, **settings: Any) -> RunFiles:
    made = Settled(RunDirectory(Path("/runs") / name), rows or [training_row(1)], None, [], "")
    object.__setattr__(made, "settings", {"run.seed": 0, **{key.replace("__", "."): v for key, v in settings.items()}})
    return made


def evaluated(rate: float) -> list[dict[str, Any]]:
    return [training_row(1, evaluation={"episodes": 100, "success_rate": rate, "success_rate_by_task": {}})]


def groups_of(runs: list[RunFiles]) -> list[Group]:
    return make_groups(runs, names_of(runs))


def test_runs_that_differ_in_their_seed_alone_are_one_group() -> None:
    runs = [run("a", t__lr=1.0), run("b", t__lr=1.0, run__seed=1), run("c", t__lr=2.0), run("d", t__lr=2)]
    assert [(group.name, len(group.runs)) for group in groups_of(runs)] == [("lr 1.0", 2), ("c", 1), ("d", 1)]


def test_runs_of_settings_that_cannot_be_read_stand_alone() -> None:
    runs = [run("a"), run("b")]
    for one in runs:
        object.__setattr__(one, "settings", None)
    assert [group.name for group in groups_of(runs)] == ["a", "b"]


def test_names_are_as_long_as_it_takes() -> None:
    assert names_of([run("x/one"), run("y/one"), run("x/two")]) == ["x/one", "y/one", "two"]
    assert names_of([run("same"), run("same")]) == ["//runs/same", "//runs/same"]


def test_outcomes_are_of_evaluations_where_all_have_one_else_of_the_last_episodes() -> None:
    training = [training_row(i, success_rate=float(i > 8), episodes=10) for i in range(1, 11)]
    found = outcome([training], by_evaluation=False)
    assert found is not None and found.rate == 1.0 and found.low == pytest.approx(0.839, abs=1e-3)  # Wilson, 20 of 20
    assert not uses_evaluations(groups_of([run("a", evaluated(0.5)), run("b", training)]))
    assert outcome([[training_row(1, success_rate=None, episodes=0)]], by_evaluation=False) is None


def test_the_interval_over_seeds_is_students() -> None:
    found = outcome([evaluated(rate) for rate in (0.4, 0.5, 0.6)], by_evaluation=True)
    # 4.303 x 0.1 / sqrt(3) = 0.248
    assert found is not None and (found.rate, found.low, found.high) == pytest.approx((0.5, 0.252, 0.748), abs=1e-3)


def test_the_best_is_first_and_who_has_nothing_is_last() -> None:
    nothing = [training_row(1, success_rate=None, episodes=0)]
    runs = [run("none", nothing, k=0), run("low", [training_row(1, success_rate=0.25)], k=1), run("high", k=2)]
    assert [group.name for group, _ in ranked(groups_of(runs))] == ["high", "low", "none"]


def sweep(rate: Any, count: int = 20) -> list[Any]:
    """Success as a function of a learning rate, with another setting and a name that say nothing."""
    random = np.random.default_rng(1)
    runs = []
    for number in range(count):
        lr, clip = 10 ** random.uniform(-6, -3), random.uniform(0.1, 0.3)
        name = "even" if number % 2 else "odd"
        settings = {"t__lr": lr, "t__clip": clip, "t__kind": name, "out": f"r{number}"}
        runs.append(run(f"r{number}", evaluated(rate(lr, name)), **settings))
    return ranked(groups_of(runs))


def test_a_peak_in_the_middle_is_importance_too() -> None:
    ranking = sweep(lambda lr, name: round(1.0 - abs(np.log10(lr) + 4.5) / 2, 2))
    first, *others = importances(ranking)
    assert first.key == "t.lr" and "out" not in [one.key for one in others], "a name for each run explains nothing"
    assert first.share > 0.8 and first.p < 0.01 and all(one.share < 0.5 for one in others)
    said, best = first.best.removeprefix("best around "), ranking[0][0].settings["t.lr"]
    assert abs(np.log10(float(said)) - np.log10(best)) < 0.5


def test_directions_and_names() -> None:
    rising = importances(sweep(lambda lr, name: round((np.log10(lr) + 6) / 3, 2)))[0]
    assert (rising.key, rising.best) == ("t.lr", "higher is better") and rising.share > 0.95
    named = importances(sweep(lambda lr, name: 0.8 if name == "odd" else 0.2))[0]
    assert (named.key, named.best) == ("t.kind", "odd is best") and named.share == pytest.approx(1.0)


def test_few_settings_say_nothing_and_noise_is_not_called_clear() -> None:
    assert importances(sweep(lambda lr, name: lr, count=MIN_SETTINGS - 1)) == []
    random = np.random.default_rng(3)
    clear = [one.p <= 0.05 for _ in range(20) for one in importances(sweep(lambda lr, name: random.random(), 12))]
    assert len(clear) == 60 and sum(clear) <= 9  # 3 expected; more than 9 in one of 800
