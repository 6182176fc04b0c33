"""Classes that a setting names: ours, those that an installed package adds through entry points, and `module:Class`."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any


@cache
def added_by_packages(group: str) -> dict[str, str]:
    """`module:Class` by name, of all installed packages that have entry points of this group."""
    from importlib.metadata import entry_points

    return {entry.name: entry.value for entry in entry_points(group=group)}


def load_class(reference: str) -> Any:
    """The class behind `module:Class`.

    Raises:
        ValueError: the module cannot be imported, or has no such class; the text is half a line for others to finish.
    """
    module_name, _, class_name = reference.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # somebody else's module may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{module_name} cannot be imported ({reason})") from error
    if not hasattr(module, class_name):
        raise ValueError(f"{module_name} has no class {class_name}")
    return getattr(module, class_name)
