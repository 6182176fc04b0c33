"""`--set section.key=value` on the nested mapping of a config file."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from vlarl_rllib.errors import SettingsError
from vlarl_rllib.settings.yaml_text import parse_yaml, shortened


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one key in place; the value is YAML. Raises `SettingsError`."""
    key, equals, text = override.partition("=")
    where = f"--set {shortened(override)}"
    if not equals or not key.strip():
        raise SettingsError(f"{where}: must read section.key=value, for example training.lr=1e-5")
    set_key(values, key.strip(), parse_yaml(text, where), where)


def set_key(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set a dotted key of a nested mapping in place. Raises `SettingsError`, beginning with `where`."""
    *parents, leaf = key.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        below = values[parent]
        if not isinstance(below, dict):
            raise SettingsError(f"{where}: {parent} is a value, not a section")
        values = below
    values[leaf] = value


def with_keys(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested settings with other values for dotted keys; a mapping under any name sets several of them.

    Raises `SettingsError`.
    """
    changed = deepcopy(dict(values))
    for key, wanted in dotted(changes).items():
        set_key(changed, key, wanted, key)
    return changed


def dotted(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key; a section, or a set of dotted keys under some name, is taken apart."""
    found: dict[str, Any] = {}
    for name, value in changes.items():
        if isinstance(value, Mapping) and "." not in name:
            found |= {key if "." in key else f"{name}.{key}": wanted for key, wanted in value.items()}
        else:
            found[name] = value
    return found
