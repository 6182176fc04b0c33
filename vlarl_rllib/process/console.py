"""Where the commands write for a reader."""

from __future__ import annotations

import os
import shlex
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vlarl_rllib.process.storage import Place, StoragePath

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


SAY_SECONDS = 5.0
"""Between two lines that say what a start waits for: on a busy machine they come later, and nobody should wait for more
than 10 s without a word."""


def make_console(*, stderr: bool = False) -> Console:
    """A console that prints text as it is: a path may hold square brackets, which Rich would take for markup, and is
    never broken over lines.

    Colours go by the argument `style`.
    """
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)


def shown(path: Place) -> str:
    """A path from here, or from the root where it lies elsewhere: a job's working directory is deep in Ray's cache."""
    if isinstance(path, StoragePath):
        return str(path)
    relative = os.path.relpath(path)
    return os.path.abspath(path) if relative.startswith(os.pardir) else relative


def pasted(path: Place) -> str:
    """The same as a shell takes it: for commands that a person copies."""
    return shlex.quote(shown(path))


def make_progress(console: Console, label: str, **options: Any) -> Progress:
    """A bar, gone at its end and not there at all where nobody watches: `label`, bar, count, words, time left.

    Args:
        label: a format of Rich's, such as "steps" or "{task.description}".
        options: Rich's. The words are a task's field `shown`.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal, **options)


class Word:
    """When a start said last what it waits for; at first, when the command began."""

    last = time.monotonic()

    @classmethod
    def is_due(cls) -> bool:
        """Whether it is time for another one, which is said then."""
        due = time.monotonic() - cls.last >= SAY_SECONDS
        if due:
            cls.last = time.monotonic()
        return due


@contextmanager
def saying_so(what: str) -> Iterator[None]:
    """A line on stderr every `SAY_SECONDS`, those of what was waited for before counted: what is being waited for, and
    since when."""
    over, began = threading.Event(), time.monotonic()

    def speak() -> None:
        while not over.wait(max(1.0, Word.last + SAY_SECONDS - time.monotonic())):
            Word.last = time.monotonic()
            make_console(stderr=True).print(f"waiting for {what} ... {Word.last - began:.0f} s", style="dim")

    thread = threading.Thread(target=speak, name="vlarl-waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
