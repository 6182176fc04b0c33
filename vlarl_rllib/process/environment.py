"""Environment variables of this process for as long as something needs them: it may be a user's script or notebook."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def environment_defaults(**values: str) -> Iterator[None]:
    """Set those variables that are not set; afterwards they are not there again."""
    missing = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


@contextmanager
def environment_without(*names: str) -> Iterator[None]:
    """Without those variables; afterwards they are there again."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
