"""The line between the driver and its busy trial, with Ray's key-value store replaced."""

import itertools
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from vlarl_rllib.process.calls import EndRequested, call_unless
from vlarl_rllib.process.signals import END
from vlarl_rllib.runs import pulse
from vlarl_rllib.runs.pulse import FROZEN_SECONDS, LOST_SECONDS, TrialWatch
from vlarl_rllib.settings import Settings, calculate_runtime_args

PLAN = calculate_runtime_args(Settings())


class Line:
    """What both ends say, and a clock."""

    def __init__(self) -> None:
        self.store: dict[str, str] = {}
        self.killed: list[int] = []
        self.now = 1000.0
        self.lacking: str | None = None
        self.trial = SimpleNamespace(
            is_finished=lambda: False,
            temporary_state=SimpleNamespace(ray_actor="actor"),
        )

    def beat(self, count: int) -> None:
        self.store["run:beat"] = f"node 77 {count} 2 engine(s)"

    def pass_time(self, watch: TrialWatch, seconds: float, *, alive: bool) -> None:
        for second in range(int(seconds)):
            self.now += 1.0
            if alive:
                self.beat(int(self.now))
            watch.on_step_end(second, [self.trial])


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Line:
    line = Line()
    monkeypatch.setattr(pulse.Notes, "put", lambda key, text: line.store.update({key: text}))
    monkeypatch.setattr(pulse.Notes, "get", lambda key: line.store.get(key))
    monkeypatch.setattr(pulse.Notes, "remove", lambda key: line.store.pop(key, None))
    monkeypatch.setattr(pulse.time, "monotonic", lambda: line.now)
    monkeypatch.setattr(pulse.Word, "last", line.now)
    monkeypatch.setattr(pulse.os, "kill", lambda pid, number: line.killed.append(pid))
    monkeypatch.setattr(pulse.ray, "kill", lambda actor: line.killed.append(actor))
    monkeypatch.setattr(pulse, "waits_for_places", lambda plan: line.lacking if plan is PLAN else "another's")
    monkeypatch.setattr(pulse.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node"))
    END._reset()
    yield line
    END._reset()


def signalled(line: Line, limit_seconds: float = 25.0) -> None:
    END.signal, END._since, END.limit_seconds = 15, line.now, limit_seconds  # type: ignore[assignment]


def test_a_start_says_every_few_seconds_whom_it_waits_for(line: Line) -> None:
    said: list[tuple[float, str]] = []
    watch = TrialWatch("run", PLAN, lambda text: said.append((line.now - 1000, text.partition(" ...")[0])))
    line.lacking = "a place for: engine (1 CPU, 1 GPU) (free: 10.0.0.1: 1 CPU)"
    line.pass_time(watch, 12, alive=False)
    line.lacking = None
    line.pass_time(watch, 12, alive=False)
    line.pass_time(watch, 12, alive=True)
    watch.on_trial_result(0, [line.trial], line.trial, {})
    line.pass_time(watch, 30, alive=True)
    words = [text for _, text in said]
    assert words == sorted(words, key=words.index) and list(dict.fromkeys(words)) == [
        "waiting for a place for: engine (1 CPU, 1 GPU) (free: 10.0.0.1: 1 CPU)",
        "waiting for the trial's process",
        "waiting for 2 engine(s)",
    ]
    times = [0.0, *(when for when, _ in said), 36.0]
    assert max(later - earlier for earlier, later in itertools.pairwise(times)) <= 8


def test_what_a_lost_node_leaves_without_a_place_is_told_while_the_run_goes_on(line: Line) -> None:
    said: list[str] = []
    watch = TrialWatch("run", PLAN, said.append)
    watch.on_trial_result(0, [line.trial], line.trial, {})
    line.pass_time(watch, 2 * LOST_SECONDS, alive=True)
    assert said == []
    line.lacking = "a place for: runner (1 CPU)"
    line.pass_time(watch, 2 * LOST_SECONDS, alive=True)
    assert said == ["waiting for a place for: runner (1 CPU)"] * 2


def test_a_trial_with_something_to_keep_is_asked_to_end_and_has_its_time(line: Line) -> None:
    watch = TrialWatch("run", PLAN)
    watch.on_trial_result(0, [line.trial], line.trial, {})
    line.pass_time(watch, 3, alive=True)
    assert "run:end" not in line.store
    signalled(line)
    line.pass_time(watch, 20, alive=True)
    assert line.store["run:end"] == "1" and line.killed == [] and not watch.abandoned
    line.pass_time(watch, 10, alive=True)
    assert watch.abandoned and line.killed == ["actor"]


def test_a_trial_that_has_nothing_to_keep_is_ended_at_once(line: Line) -> None:
    watch = TrialWatch("run", PLAN)
    signalled(line)
    line.pass_time(watch, 1, alive=True)
    assert watch.abandoned and line.killed == ["actor"] and "run:end" not in line.store


def test_a_frozen_trial_is_killed_and_one_that_was_stopped_together_with_the_driver_is_not(line: Line) -> None:
    watch = TrialWatch("run", PLAN)
    line.pass_time(watch, 100, alive=False)
    assert not watch.is_frozen, "it has not begun to beat"
    line.pass_time(watch, 10, alive=True)
    line.pass_time(watch, 4, alive=False)
    line.now += 1000.0
    line.pass_time(watch, FROZEN_SECONDS - 14, alive=False)
    assert not watch.is_frozen
    line.pass_time(watch, 12, alive=False)
    assert watch.is_frozen and line.killed == [77, "actor"] and not watch.abandoned


def test_a_watch_begins_with_nothing_said(line: Line) -> None:
    line.store |= {"run:end": "1", "run:beat": "node 5 5", "other:end": "1"}
    TrialWatch("run", PLAN)
    assert line.store == {"other:end": "1"}


def test_a_call_is_left_behind_when_the_run_is_to_end() -> None:
    ended = threading.Event()
    assert call_unless(ended, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        call_unless(ended, lambda: 1 // 0)
    threading.Timer(0.2, ended.set).start()
    began = time.monotonic()
    with pytest.raises(EndRequested):
        call_unless(ended, lambda: time.sleep(5))
    assert time.monotonic() - began < 1.0
    called: list[Any] = []
    with pytest.raises(EndRequested):
        call_unless(ended, lambda: called.append(1))
    assert called == [], "nothing new is begun"
