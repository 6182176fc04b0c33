"""Where the commands write for a reader."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def make_console(*, stderr: bool = False) -> Console:
    """A console that prints text as it is: a path may hold square brackets, which Rich would take for markup, and is
    never broken over lines.

    Colours go by the argument `style`.
    """
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)


def pasted(path: Path) -> str:
    """A path, from here, as a shell takes it: for commands that a person copies."""
    return shlex.quote(os.path.relpath(path))
