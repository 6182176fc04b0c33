"""What `vlarl tune` tells its trials, and when it lets go of them, with Ray's key-value store replaced."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from vlarl_rllib.process.console import Word
from vlarl_rllib.process.signals import END
from vlarl_rllib.runs import experiment_watch, pulse
from vlarl_rllib.runs.experiment_watch import ExperimentWatch
from vlarl_rllib.runs.pulse import FROZEN_SECONDS, RESTS


class Line:
    """The notes, a clock, and what was heard."""

    def __init__(self) -> None:
        self.store: dict[str, str] = {}
        self.now = 1000.0
        self.said: list[str] = []
        self.lacking: dict[str, str] = {}
        self.frozen: list[str] = []
        self.finished: list[str] = []
        self.killed: list[str] = []

    def begin(self) -> None:
        self.watch = ExperimentWatch(
            self.said.append,
            lambda trial: f"plan of {trial.trial_id}",  # type: ignore[arg-type, return-value]
            lambda trial: self.frozen.append(trial.trial_id),
            lambda trial: self.finished.append(trial.trial_id),
        )

    def pass_time(self, seconds: float, trials: list[Any], *, alive: bool = True) -> None:
        for _ in range(int(seconds)):
            self.now += 1.0
            for trial in trials if alive else ():
                self.store[f"{trial.trial_id}:beat"] = f"node 0 {self.now} 1 runner(s)"
            self.watch.on_step_end(0, trials)


def trial(name: str, status: str, last_result: Any = None) -> Any:
    return SimpleNamespace(
        trial_id=name, status=status, last_result=last_result, is_finished=lambda: status in ("TERMINATED", "ERROR"),
        temporary_state=SimpleNamespace(ray_actor=f"actor of {name}"),
    )  # fmt: skip


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    line = Line()
    monkeypatch.setattr(pulse.Notes, "put", lambda key, text: line.store.update({key: text}))
    monkeypatch.setattr(pulse.Notes, "get", lambda key: line.store.get(key))
    monkeypatch.setattr(pulse.Notes, "remove", lambda key: line.store.pop(key, None))
    monkeypatch.setattr(pulse.time, "monotonic", lambda: line.now)
    monkeypatch.setattr(pulse.ray, "kill", lambda actor: line.killed.append(actor))
    monkeypatch.setattr(pulse.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "elsewhere"))
    monkeypatch.setattr(experiment_watch, "waits_for_places", lambda plan: line.lacking.get(plan))
    monkeypatch.setattr(experiment_watch, "trial_path", lambda trial: trial.trial_id)
    monkeypatch.setattr(Word, "last", line.now)
    END._reset()
    line.begin()
    yield line
    END._reset()


def signalled(line: Line) -> None:
    END.signal, END._since, END.limit_seconds = 15, line.now, 25.0  # type: ignore[assignment]


def test_all_that_train_keep_what_they_have_before_the_end(line: Line) -> None:
    first, second, starts = trial("a", "RUNNING", {"x": 1}), trial("b", "RUNNING", {"x": 1}), trial("c", "RUNNING")
    trials = [first, second, starts, trial("d", "PENDING")]
    line.pass_time(3, trials)
    signalled(line)
    line.pass_time(2, trials)
    assert {"a:end", "b:end"} <= line.store.keys() and not {"c:end", "d:end"} & line.store.keys()
    line.store[f"a:{RESTS}"] = "1"
    line.pass_time(1, trials)
    assert not line.watch.interrupted.is_set()
    line.store[f"b:{RESTS}"] = "1"
    line.pass_time(1, trials)
    assert line.watch.interrupted.is_set()


def test_one_that_ends_by_itself_meanwhile_is_not_waited_for(line: Line) -> None:
    """And no other trial is begun in its place, which would be played to its end."""
    ending = trial("a", "RUNNING", {"x": 1})
    line.pass_time(3, [ending, trial("b", "PENDING")])
    signalled(line)
    line.pass_time(1, [ending, trial("b", "PENDING")])
    assert not line.watch.interrupted.is_set()
    ending.status = "TERMINATED"
    line.pass_time(1, [ending, trial("b", "PENDING")])
    assert line.watch.interrupted.is_set()


def test_the_time_of_an_end_is_limited(line: Line) -> None:
    stubborn = [trial("a", "RUNNING", {"x": 1})]
    signalled(line)
    line.pass_time(24, stubborn)
    assert not line.watch.interrupted.is_set()
    line.pass_time(3, stubborn)
    assert line.watch.interrupted.is_set()


def test_a_frozen_trial_is_killed_and_tunes_state_is_written_when_one_has_ended(line: Line) -> None:
    trials = [trial("a", "RUNNING", {"x": 1}), trial("b", "TERMINATED")]
    line.pass_time(10, trials)
    assert line.finished == ["b"] and line.watch.to_write.is_set() and line.frozen == []
    line.pass_time(FROZEN_SECONDS + 5, trials, alive=False)
    assert line.frozen == ["a"] and line.killed == ["actor of a"]


def test_a_start_is_not_silent(line: Line) -> None:
    line.lacking["plan of a"] = "a place for: engine (1 GPU)"
    line.pass_time(6, [trial("a", "PENDING")], alive=False)
    assert line.said.pop().startswith("waiting for a place for: engine (1 GPU) ...") and not line.said
    line.lacking.clear()
    line.pass_time(6, [trial("a", "PENDING")], alive=False)
    line.pass_time(12, [trial("a", "PENDING")])
    assert line.said[0].startswith("waiting for the next trial's process") and "1 runner(s)" in line.said[-1]
