"""Settings from YAML, dictionaries and command lines: what goes together, and one line for what does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError, model_validator

from vlarl_rllib.errors import SettingsError
from vlarl_rllib.settings import messages
from vlarl_rllib.settings.in_place import flat
from vlarl_rllib.settings.overrides import apply_override
from vlarl_rllib.settings.rules import impossible_combinations
from vlarl_rllib.settings.schema import Sections
from vlarl_rllib.settings.yaml_text import read_yaml


class Settings(Sections):
    """All sections. Build it with `from_yaml` or `from_dict`."""

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> Settings:
        """Read a YAML file and apply `a.b=value` overrides (values are YAML). Raises `SettingsError`."""
        values = read_yaml(path)
        values = {} if values is None else values
        if not isinstance(values, dict):
            raise SettingsError(f"{path}: holds {type(values).__name__}, must hold sections such as `model:`")
        for override in overrides:
            apply_override(values, override)
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """Validate a nested mapping. Raises `SettingsError`."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise SettingsError(messages.one_line(error, Settings)) from None

    @classmethod
    def from_checkpoint(cls, values: Mapping[str, Any], where: str) -> Settings:
        """Those that a checkpoint was written with. They may name what installed packages add, and no other code.

        Raises `SettingsError`, beginning with `where`.
        """
        settings = cls.from_dict(values)
        for key, name in settings.named_classes():
            raise SettingsError(
                f"{where}: its settings name {key} {name!r}, and a checkpoint chooses no code; have a package add that "
                "by an entry point, or build the config yourself"
            )
        return settings

    def named_classes(self) -> Iterator[tuple[str, str]]:
        """(key, `module:Class`) of what is named so."""
        named = [("model.family", self.model.family or ""), ("weights.transport", self.weights.transport)]
        named += [("rewards.others", name) for name in self.rewards.others]
        yield from ((key, name) for key, name in named if ":" in name)

    def paths(self) -> Iterator[tuple[str, str]]:
        """(key, path) of what lies on a disk."""
        yield from (pair for pair in flat(self.to_dict()) if str(pair[1]).startswith("/"))

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def replaced(self, **sections: Mapping[str, Any]) -> Settings:
        """A copy with other values for some keys of some sections. Raises `SettingsError`."""
        values = self.to_dict()
        return Settings.from_dict(values | {name: values[name] | dict(changes) for name, changes in sections.items()})

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        for problem in impossible_combinations(self):
            raise ValueError(problem)
        return self


def known_keys() -> dict[str, str]:
    """Every dotted key with its description, in file order."""
    return messages.known_keys(Settings)
