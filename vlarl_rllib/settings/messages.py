"""What is said about a mistake in the settings: one line with key, value, rule and remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import get_args

from pydantic import BaseModel, ValidationError

from vlarl_rllib.settings.yaml_text import shortened


def known_keys(settings: type[BaseModel]) -> dict[str, str]:
    """Every dotted key of the sections below `settings` with its description, in file order."""

    def walk(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
        for name, field in section.model_fields.items():
            below = [
                kind
                for kind in (field.annotation, *get_args(field.annotation))
                if isinstance(kind, type) and issubclass(kind, BaseModel)
            ]
            if not below or field.default is None:
                yield prefix + name, field.description or ""
            for kind in below:
                yield from walk(kind, f"{prefix}{name}.")

    return dict(walk(settings, ""))


def one_line(error: ValidationError, settings: type[BaseModel]) -> str:
    """The first mistake of a pydantic report as `key: value, rule, remedy`."""
    first = error.errors()[0]
    *above, last = first["loc"] or ("",)
    unknown = first["type"] == "extra_forbidden"
    parts = [part for part in above if str(part).isidentifier() or isinstance(part, int)]  # without a union's branches
    key = ".".join(map(str, [*parts, last] if unknown or str(last).isidentifier() or isinstance(last, int) else parts))
    if unknown:
        return f"{key}: unknown key; {nearest(key, known_keys(settings))}"
    message = first["msg"].removeprefix("Value error, ")
    if not key:
        return message
    rule = message[0].lower() + message[1:]
    description = known_keys(settings).get(key)
    return f"{key}: {shortened(repr(first['input']))} is not allowed: {rule}" + (
        f" ({description.rstrip('.')})" if description else ""
    )


def nearest(key: str, known: dict[str, str]) -> str:
    """What to write instead of an unknown key."""
    if key in known:  # written as one word, with a dot in it
        *sections, leaf = key.split(".")
        return (
            f"nest it: {': {'.join(sections)}: {{{leaf}: ...}}{'}' * (len(sections) - 1)}; keys with dots are for --set"
        )
    sections = sorted({name.split(".")[0] for name in known})
    if "." not in key:
        close = difflib.get_close_matches(key, sections, n=1)
        return f"did you mean {close[0]}?" if close else f"sections are {', '.join(sections)}"
    section, leaf = key.rsplit(".", 1)
    below = (name.removeprefix(f"{section}.") for name in known if name.startswith(f"{section}."))
    siblings = list(dict.fromkeys(name.split(".")[0] for name in below))
    elsewhere = [name for name in known if name.rsplit(".", 1)[1] == leaf]
    close = elsewhere or [f"{section}.{name}" for name in difflib.get_close_matches(leaf, siblings, n=1)]
    return f"did you mean {close[0]}?" if close else f"keys of {section} are {', '.join(siblings)}"
