"""Which keys a trial can take over from another one without a new process (`VLAPPO.reset_config`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

IN_PLACE = (
    "training.", "curriculum.", "evaluation.", "collect.", "sft.", "run.",
    "rollout.temperature", "rollout.steps_per_iteration", "rollout.episodes_per_iteration", "rollout.group_size",
    "rollout.filter_groups",
    "rewards.success", "rewards.malformed", "rewards.length", "rewards.smoothness", "rewards.value_shaping",
    "rewards.others",
)  # fmt: skip
"""Keys, or sections, that learners and runners read anew. All others say which processes there are, and what is in
them."""
OF_ENGINES = ("training.values",)
"""Keys of those sections that say what is in an engine."""


def can_change_in_place(key: str) -> bool:
    """Whether a running trial can take another value of this dotted key."""
    return key not in OF_ENGINES and any(key == known or key.startswith(f"{known.rstrip('.')}.") for known in IN_PLACE)


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested settings."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def needs_new_processes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys in which two nested settings differ and that cannot change in place."""
    old, new = dict(flat(before)), dict(flat(now))
    changed = (key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key))
    return [key for key in changed if not can_change_in_place(key)]
