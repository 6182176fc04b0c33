"""Exit codes and last lines of `vlarl eval`, with the playing left out."""

import importlib.util
import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from vlarl_rllib.evaluation import EvaluationRequest, evaluate_policy, session
from vlarl_rllib.evaluation.output import EvaluationDirectory
from vlarl_rllib.evaluation.session import Watch, run_evaluation
from vlarl_rllib.process.signals import END
from vlarl_rllib.rollout.evaluation import EvaluationRound
from vlarl_rllib.types import EpisodeResult, Start

REQUEST = EvaluationRequest("tiny", env="synthetic", tasks=(1,), trials=4)


class Script:
    """In place of `_play`: plays one start a round; `before[i]` happens in round i."""

    def __init__(self, **before: Any) -> None:
        self.before = {int(name.removeprefix("round_")): action for name, action in before.items()}
        self.played: list[int] = []

    def __call__(
        self, request: EvaluationRequest, directory: EvaluationDirectory, starts: list[Start], watch: Watch
    ) -> None:
        with watch:
            if -1 in self.before:
                self.before[-1]()
            watch.ready()
            for number, start in enumerate(starts):
                if number in self.before:
                    self.before[number]()
                self.played.append(start.initial_state)
                result = EpisodeResult(start.task_id, start.initial_state, 3, start.initial_state % 2 == 0, 1.0)
                directory.add([result])
                if not watch.keep_going(EvaluationRound([result], num_steps=3, env_deaths=1)):
                    break
            watch.mended({"runner_restarts": 2, "engine_restarts": 0})


def run(script: Script, out: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(session, "_play", script)
    with END.listening():
        return run_evaluation(REQUEST, out)


def send(number: signal.Signals) -> Any:
    return lambda: os.kill(os.getpid(), number)


def send_and_play_on(number: signal.Signals, told: threading.Event) -> Any:
    """The notice is shown by a thread, and a round outlasts it."""

    def act() -> None:
        send(number)()
        assert told.wait(10)

    return act


def test_a_whole_evaluation_ends_with_0_and_is_not_played_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert run(Script(), tmp_path, monkeypatch) == 0
    text = capsys.readouterr().out
    assert "50.0 % [15.0, 85.0] 2/4" in text and "report.md" in text.splitlines()[-1]
    assert (
        "4 episodes, 12 steps" in text and "env_deaths 4, runner_restarts 2" in text and "engine_restarts" not in text
    )
    again = Script()
    assert run(again, tmp_path, monkeypatch) == 0 and again.played == []
    assert evaluate_policy(REQUEST, tmp_path).standard.successes == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_after_the_round(
    number: signal.Signals, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    handler, told, notice = signal.getsignal(number), threading.Event(), session._Terminal._notice

    def tell(watch: session._Terminal, name: str) -> None:
        notice(watch, name)
        told.set()

    monkeypatch.setattr(session._Terminal, "_notice", tell)
    assert run(Script(round_1=send_and_play_on(number, told)), tmp_path, monkeypatch) == code
    text = capsys.readouterr().out
    assert (
        f"{number.name}: ending within" in text
        and "plays the other 2 episodes" in text
        and "these rates tend to be too high" in text
    )
    assert "incomplete: 2 of 4" in (tmp_path / "report.md").read_text()
    assert signal.getsignal(number) is handler
    rest = Script()
    assert run(rest, tmp_path, monkeypatch) == 0 and rest.played == [2, 3]


def test_a_signal_while_it_starts_ends_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert run(Script(**{"round_-1": send(signal.SIGTERM)}), tmp_path, monkeypatch) == 143
    assert "plays the other 4 episodes" in capsys.readouterr().out


def test_a_failure_is_one_line_and_what_is_finished_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail() -> None:
        raise RuntimeError("engine 0 failed 3 times in a row")

    assert run(Script(round_1=fail), tmp_path, monkeypatch) == 1
    *_, line, last = capsys.readouterr().out.splitlines()
    assert line == "the evaluation failed: RuntimeError: engine 0 failed 3 times in a row"
    assert last == "1 of 4 episodes are kept; the same command goes on from there"
    assert (tmp_path / "results.json").is_file()
    monkeypatch.setattr(session, "_play", Script(round_0=fail))
    with pytest.raises(RuntimeError, match="engine 0"):
        evaluate_policy(REQUEST, tmp_path)


def test_without_imageio_there_are_no_videos_and_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    starts = REQUEST.starts()
    assert session._to_record(REQUEST, starts) == {starts[0]}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert session._to_record(REQUEST, starts) == frozenset()
    assert caplog.messages == ["no videos: imageio-ffmpeg is not installed; run: pip install imageio-ffmpeg"]
