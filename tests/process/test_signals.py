"""What a command does with Ctrl-C, SIGTERM and a closed terminal."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from queue import Queue

import psutil
import pytest

from vlarl_rllib.process.signals import END, children_outlive_the_terminal

HANGS = """
import hashlib, subprocess, sys
from vlarl_rllib.process import signals
from vlarl_rllib.process.signals import END
signals.GRACE_SECONDS = 0.5
with END.listening():
    END.words, END.limit_seconds, END.sigterm_code = (lambda: "go on with X"), float(sys.argv[1]), 0
    with END.polled():
        child = subprocess.Popen(["sleep", "60"])
        print(child.pid, flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in C: Python's handlers do not run
"""


@pytest.mark.parametrize(
    ("number", "counts_as", "code"),
    [
        (signal.SIGINT, signal.SIGINT, 130),
        (signal.SIGTERM, signal.SIGTERM, 143),
        (signal.SIGHUP, signal.SIGTERM, 143),
        (signal.SIGUSR1, signal.SIGTERM, 75),
        (signal.SIGUSR2, signal.SIGTERM, 75),
    ],
)
def test_the_first_signal_is_remembered_whatever_is_being_done(
    number: signal.Signals, counts_as: signal.Signals, code: int
) -> None:
    handler, told = signal.getsignal(number), Queue[str]()
    with END.listening():
        with END.polled(told.put):
            signal.raise_signal(number)
            assert told.get(timeout=10) == number.name  # a thread tells it
        assert (END.signal, END.code) == (counts_as, code) and told.empty()
        with pytest.raises(KeyboardInterrupt):
            END.check()
    with END.listening():
        assert END.signal is None, "of the command before"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        assert END.signal == counts_as
    with END.listening():
        with pytest.raises(KeyboardInterrupt):
            start_something(number, told)
        assert told.get_nowait() == "goes on"
    assert signal.getsignal(number) is handler


def start_something(number: signal.Signals, told: Queue[str]) -> None:
    with END.deferred():
        signal.raise_signal(number)
        told.put("goes on")


def test_handlers_of_what_was_started_meanwhile_are_replaced() -> None:
    with END.listening():
        with END.deferred():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))  # as ray.init() does
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_one_that_arrives_twice_at_once_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[tuple[int, str]] = []
    monkeypatch.setattr(END, "now", lambda code, line: ended.append((code, line)))
    with END.listening(), END.polled():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.03)
        assert END.signal == signal.SIGINT and ended == []
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
    assert ended == [(130, "SIGTERM again: ended at once")]


def test_behind_a_schedulers_warning_sigterm_is_no_second_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm sends SIGUSR1 some time before, SIGTERM at the limit, and each of them perhaps twice."""
    ended: list[tuple[int, str]] = []
    monkeypatch.setattr(END, "now", lambda code, line: ended.append((code, line)))
    with END.listening(), END.polled():
        for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
            time.sleep(0.2)
        assert END.signal == signal.SIGTERM and END.code == 75 and ended == []
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
    assert ended == [(75, "SIGTERM again: ended at once")]


def test_a_warning_may_come_from_a_thread_and_in_words() -> None:
    told = Queue[str]()
    END.warn("nobody listens")
    with END.listening(), END.polled(told.put):
        END.warn("the node at 10.0.0.3 is going to be taken away")
        assert told.get(timeout=10) == "the node at 10.0.0.3 is going to be taken away"
        assert (END.signal, END.code) == (signal.SIGTERM, 75)


def start_hanging(limit_seconds: float) -> tuple["subprocess.Popen[str]", psutil.Process]:
    process = subprocess.Popen([sys.executable, "-c", HANGS, str(limit_seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    time.sleep(0.3)
    return process, child


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_the_second_ends_a_process_that_hangs_and_its_children(number: signal.Signals, code: int) -> None:
    process, child = start_hanging(60)
    process.send_signal(number)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=5)
    assert (process.returncode, output) == (code, "SIGINT again: ended at once; go on with X\n")
    assert psutil.wait_procs([child], timeout=5)[1] == []


def test_an_end_that_takes_too_long_is_broken_off() -> None:
    process, child = start_hanging(0.5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=5)
    assert (process.returncode, output) == (0, "the end took longer than 1 s: broken off; go on with X\n")
    assert psutil.wait_procs([child], timeout=5)[1] == []


def test_under_nohup_a_closed_terminal_is_nothing(tmp_path: Path) -> None:
    code = "import signal\nfrom vlarl_rllib.process.signals import END\n"
    code += "with END.listening():\n  signal.raise_signal(signal.SIGHUP)\n  assert not END.signal"
    assert subprocess.run(["nohup", sys.executable, "-c", code], cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_children_do_not_see_a_closed_terminal_or_a_warning_and_this_process_does(number: signal.Signals) -> None:
    with END.listening(), END.polled():
        with children_outlive_the_terminal():
            child = subprocess.Popen(["sleep", "60"])
            os.kill(os.getpid(), number)  # which the thread takes
            time.sleep(0.2)
        assert END.signal == signal.SIGTERM
        child.send_signal(number)
        time.sleep(0.2)
        assert child.poll() is None
        child.kill()
        child.wait()


BLOCKED = """
import os, sys, time
from vlarl_rllib.process.signals import END
with END.listening():
    END.sigterm_code = 0
    with END.polled(print):
        print("ready", flush=True)
        while True:
            print("x" * 1000)  # which nobody reads: a write that waits holds the buffer's lock
"""


def test_a_reader_that_stands_still_holds_up_no_end() -> None:
    process = subprocess.Popen([sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None, "the first only asks"
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 0
    process.stdout.close()


def test_words_that_fail_hold_up_no_end(capfd: pytest.CaptureFixture[str]) -> None:
    with END.listening():
        END.words = lambda: str(1 / 0)
        assert END.sentence("stopped") == "stopped"
