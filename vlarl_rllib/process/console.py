"""Where the commands write for a reader."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def make_console(*, stderr: bool = False) -> Console:
    """A console that prints text as it is: a path may hold square brackets, which Rich would take for markup, and is
    never broken over lines.

    Colours go by the argument `style`.
    """
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)


def shown(path: Path) -> str:
    """A path from here, or from the root where it lies elsewhere: a job's working directory is deep in Ray's cache."""
    relative = os.path.relpath(path)
    return os.path.abspath(path) if relative.startswith(os.pardir) else relative


def pasted(path: Path) -> str:
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
