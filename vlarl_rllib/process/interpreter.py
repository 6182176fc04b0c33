"""How a Python of our own is started: from the same packages, and from nothing that lies in the working directory,
which may hold a download."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SAFE_PATH = "PYTHONSAFEPATH"
"""As `python -P`, for a program that somebody else starts: it looks for no modules in the working directory (Python
3.11)."""


def python_command(*arguments: str) -> list[str]:
    """This interpreter, with neither the working directory nor a script's in front of its search path."""
    return [sys.executable, "-P", *arguments]


def search_path() -> str:
    """`PYTHONPATH` for it: where this process finds its modules, without what stands for the working directory; last,
    where this package is."""
    return os.pathsep.join(path for path in (*sys.path, str(Path(__file__).parents[2])) if os.path.isabs(path))


def given_path() -> str:
    """`PYTHONPATH` for one that needs installed packages alone: the user's, without what stands for the working
    directory."""
    return os.pathsep.join(path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(path))


@contextmanager
def safe_path() -> Iterator[None]:
    """Programs that are started inside, such as multiprocessing's, run as with `-P`."""
    before = os.environ.get(SAFE_PATH)
    os.environ[SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SAFE_PATH]
        else:
            os.environ[SAFE_PATH] = before
