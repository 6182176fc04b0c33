"""Ctrl-C, SIGTERM and a closed terminal, from a command's first line to its last.

A scheduler's warning (Slurm's `--signal=USR1`, Ray's notice that a node is drained) is another word for SIGTERM, with
an exit code that says that the run is not done.

The first signal is remembered, whatever the process is doing, and asks for an end; a second one ends the process and
its children at once. So does a thread where the end takes too long: a main thread that hangs in C never sees its
signals.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)

STOP_SECONDS = 25.0
"""Kubernetes and Slurm kill 30 s after SIGTERM by default."""
GRACE_SECONDS = 20.0
"""What comes behind the work itself: Tune's and Ray's end, a report. After so much more the process ends at once."""
DUPLICATE_SECONDS = 0.1
"""One Ctrl-C may arrive twice, from the terminal and from a program in between; nobody presses it twice as fast."""
POLL_SECONDS = 0.5
LAST_WORDS_SECONDS = 1.0
"""How long the last line may take: a reader that stands still would keep it back for ever."""


WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
"""What a scheduler sends a while before it ends a job by SIGTERM."""
AS_SIGTERM = (signal.SIGHUP, *WARNINGS)
WARNED_CODE = 75
"""Exit code behind a warning: EX_TEMPFAIL of sysexits.h, the same command is to be run again."""


class End:
    """What signals have asked of this process; there is one, `END`.

    Attributes:
        signal: SIGINT or SIGTERM (which SIGHUP, SIGUSR1 and SIGUSR2 count as), None before the first.
        is_warned: whether the first was a scheduler's warning.
        limit_seconds: how long the end may take after it.
        sigterm_code: exit code behind SIGTERM; 0 where being ended is no failure.
        words: how to go on, for whoever reads the last line.
        on_loss: keeps what must be kept where the process is about to end for the given cause, without its main thread.
    """

    def __init__(self) -> None:
        self._listens = False
        self._wanted: list[signal.Signals] = []
        self._reset()

    def _reset(self) -> None:
        self.signal: signal.Signals | None = None
        self.is_warned = False
        self._cause = ""
        self.limit_seconds = STOP_SECONDS
        self.sigterm_code = 128 + signal.SIGTERM
        self.words: Callable[[], str] = str
        self.on_loss: Callable[[str], Any] = lambda cause: None
        self._since = 0.0
        self._raises = True
        self._notice: Callable[[str], None] = lambda name: None
        self._ending = threading.Lock()

    @property
    def code(self) -> int:
        """The exit code that the first signal asks for."""
        if self.is_warned:
            return WARNED_CODE
        return self.sigterm_code if self.signal == signal.SIGTERM else 128 + signal.SIGINT

    @property
    def overdue(self) -> bool:
        """Whether `limit_seconds` are over since the first signal."""
        return self.signal is not None and time.monotonic() - self._since > self.limit_seconds

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals from now on.

        Until `deferred` or `polled`, the first one raises KeyboardInterrupt; inside of another, nothing changes.
        """
        if self._listens or threading.current_thread() is not threading.main_thread():
            yield
            return
        self._reset()
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._wanted = _wanted()
        before = self._install()
        self._listens = True
        thread = threading.Thread(
            target=self._watch, args=(reader, frozenset(before)), name="vlarl-signals", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            self._listens = False
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            writer.close()  # which ends the thread
            thread.join()
            reader.close()

    def _install(self) -> dict[signal.Signals, Any]:
        """Set our handlers; those before them."""
        return {number: signal.signal(number, self._handle) for number in self._wanted}

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """For what must not be broken off in the middle, such as Ray's start: the first signal raises KeyboardInterrupt
        behind it.

        It may set handlers of its own, which are replaced.
        """
        with self.polled():
            yield
        if self._listens:
            self._install()
        self.check()

    @contextmanager
    def polled(self, notice: Callable[[str], None] | None = None) -> Iterator[None]:
        """For a loop that looks at `signal` by itself. `notice` is told the name of a signal that comes meanwhile."""
        raises, before = self._raises, self._notice
        self._raises, self._notice = False, notice or before
        try:
            yield
        finally:
            self._raises, self._notice = raises, before

    def check(self) -> None:
        """Raise KeyboardInterrupt where a signal has come."""
        if self.signal is not None:
            raise KeyboardInterrupt

    def warn(self, cause: str) -> None:
        """What a scheduler's warning does, from any thread, for a cause that is no signal; nothing where nobody listens
        to signals."""
        if self._listens:
            self._cause = cause
            os.kill(os.getpid(), WARNINGS[0])

    def now(self, code: int, first: str) -> None:
        """End this process and its children at once, from any thread, with a last line: `first`, and how to go on."""
        if not self._ending.acquire(blocking=False):
            return
        with contextlib.suppress(Exception):
            kill_children()
        speaker = threading.Thread(target=self._say_last, args=(first,), name="vlarl-last-words", daemon=True)
        speaker.start()
        speaker.join(LAST_WORDS_SECONDS)
        os._exit(code)

    def _say_last(self, first: str) -> None:
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            sys.stdout.write(f"{self.sentence(first)}\n")
            sys.stdout.flush()

    def lost(self, cause: str) -> None:
        """`now`, for a cause that no signal has asked for: exit code 1, and what must be kept is kept first."""
        try:
            self.on_loss(cause)
        except Exception:  # whatever it is, the process has to end
            logger.exception("while keeping what is there")
        self.now(1 if self.signal is None else self.code, cause)

    def sentence(self, first: str) -> str:
        """`first`, and how to go on."""
        words = ""
        try:
            words = self.words()
        except Exception:  # whatever it is, the process has to end
            logger.exception("while looking how to go on")
        return "; ".join(filter(None, (first, words)))

    def _handle(self, number: int, frame: Any) -> None:
        signal.alarm(0)  # where Ray has just begun to handle SIGTERM in C++, that calls us, and aborts after 3 s
        if self.signal is not None:
            return  # `_watch` counts them
        self._since = time.monotonic()
        self.is_warned = number in WARNINGS
        self.signal = signal.SIGTERM if number in AS_SIGTERM else signal.Signals(number)
        if self._raises:
            raise KeyboardInterrupt

    def _watch(self, reader: socket.socket, wanted: frozenset[int]) -> None:
        """Python writes the number of each signal to a socket when it arrives, also while the main thread hangs or has
        another's handler."""
        first: tuple[int, float] | None = None
        asked: tuple[int, float] | None = None  # the first that is no warning
        reader.settimeout(POLL_SECONDS)
        while True:
            numbers = b""
            with contextlib.suppress(TimeoutError):
                numbers = reader.recv(64)
                if not numbers:
                    return
            if numbers:
                signal.alarm(0)  # see `_handle`, which comes late where the main thread is in C
            for number in wanted.intersection(numbers):
                now = time.monotonic()
                if first is None:
                    first = number, now
                    # In a thread of its own, which may wait for a reader: the handler would write in the middle of a
                    # write.
                    threading.Thread(
                        target=self._tell, args=(signal.Signals(number).name,), name="vlarl-notice", daemon=True
                    ).start()
                elif (
                    asked and number not in AS_SIGTERM and now - asked[1] > DUPLICATE_SECONDS
                ):  # a shell passes on the kernel's SIGHUP
                    self.now(self._code_of(first[0]), f"{signal.Signals(number).name} again: ended at once")
                if asked is None and number not in WARNINGS:
                    asked = number, now
            if first is not None and time.monotonic() - first[1] > self.limit_seconds + GRACE_SECONDS:
                self.now(
                    self._code_of(first[0]),
                    f"the end took longer than {self.limit_seconds + GRACE_SECONDS:g} s: broken off",
                )

    def _tell(self, name: str) -> None:
        if not self._raises:
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                self._notice(self._cause or name)

    def _code_of(self, number: int) -> int:
        if number in WARNINGS:
            return WARNED_CODE
        return 128 + signal.SIGINT if number == signal.SIGINT else self.sigterm_code


END = End()
"""Signals are the process's, so there is one."""


def _wanted() -> list[signal.Signals]:
    """SIGHUP is ignored under nohup, and stays so."""
    return [
        signal.SIGINT,
        signal.SIGTERM,
        *WARNINGS,
        *([signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []),
    ]


@contextmanager
def children_outlive_the_terminal() -> Iterator[None]:
    """What is started here does not see SIGHUP, which a terminal sends to all at once, nor Slurm's warnings, which it
    sends to all processes of a step: a checkpoint needs them.

    This process still does.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*AS_SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def kill_children() -> None:
    """Kill all descendants of this process."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
