"""`--set section.key=value` on the nested mapping of a config file."""

from __future__ import annotations

from typing import Any

from vlarl_rllib.errors import SettingsError
from vlarl_rllib.settings.yaml_text import parse_yaml, shortened


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one key in place; the value is YAML. Raises `SettingsError`."""
    key, equals, text = override.partition("=")
    where = f"--set {shortened(override)}"
    if not equals or not key.strip():
        raise SettingsError(f"{where}: must read section.key=value, for example training.lr=1e-5")
    *parents, leaf = key.strip().split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        below = values[parent]
        if not isinstance(below, dict):
            raise SettingsError(f"{where}: {parent} is a value, not a section")
        values = below
    values[leaf] = parse_yaml(text, where)
