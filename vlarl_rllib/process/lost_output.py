"""What a run tells is not its work: where it cannot be told, it is counted as lost and the work goes on.

That holds for a console whose reader has gone, a terminal that was closed, a disk that is full.
"""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

logger = logging.getLogger(__name__)

KEEP_TRYING_SECONDS = 30.0
"""How long the last writes of a run are tried again: a disk may be full for a moment only."""


class LostOutput:
    """Counts what this process could not write; there is one, `LOST`."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def counting(self, what: str) -> Iterator[None]:
        """An OSError inside means that `what` is lost, no more."""
        try:
            yield
        except OSError as error:
            self.count += 1
            logger.warning("%s: %s", what, error)


LOST = LostOutput()


class _TolerantFile(io.FileIO):
    """A descriptor that takes everything, also what cannot be written."""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        written = None
        with suppress(OSError):
            written = super().write(data)  # None: somebody has made it non-blocking, and it is full
        if written is None:
            LOST.count += 1
            return len(data)
        return written


def tolerate_lost_readers() -> None:
    """From now on nobody who prints is told that stdout or stderr cannot be written to (`| head`, a full disk, a closed
    terminal)."""
    sys.stdout, sys.stderr = _tolerant(sys.stdout, 1), _tolerant(sys.stderr, 2)


def _tolerant(stream: TextIO | None, descriptor: int) -> TextIO:
    if stream is None:  # closed by whoever started the command
        return open("/dev/null", "w")
    if isinstance(getattr(getattr(stream, "buffer", None), "raw", None), _TolerantFile):
        return stream
    try:
        if stream.fileno() != descriptor:
            return stream
    except (OSError, ValueError):  # pytest's and the like
        return stream
    raw = _TolerantFile(descriptor, "w", closefd=False)
    options = {"encoding": stream.encoding, "errors": stream.errors, "line_buffering": True}
    return io.TextIOWrapper(io.BufferedWriter(raw), **options)  # type: ignore[arg-type, type-var]


def keep_trying(write: Callable[[], None], seconds: float = KEEP_TRYING_SECONDS) -> OSError | None:
    """Call `write` until it raises no OSError, for so long at most; the last one it raised, or None."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            write()
            return None
        except OSError as error:
            if time.monotonic() > deadline:
                return error
            time.sleep(min(1.0, seconds))
