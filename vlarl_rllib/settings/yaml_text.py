"""YAML as a user writes it: one loader, which refuses in one line what PyYAML takes silently, or dies of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode

from vlarl_rllib.errors import SettingsError

MAX_BYTES = 1_000_000
"""Of a config; those of this package have 2,000."""
MAX_DEPTH = 20
"""Of sections and lists in each other; ours are 3 deep."""
MAX_DIGITS = 100
"""Of one value that is a number: Python reads longer ones, but in quadratic time, and refuses them at 4,300."""
MAX_CHARACTERS = 120
"""Of a wrong value, in its message."""
TEXT_TAG, INT_TAG, FLOAT_TAG = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float"))


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds; None for an empty one. Raises `SettingsError`, one line with file, line and rule."""
    file = Path(path)
    try:
        if file.is_dir():
            raise SettingsError(f"{path}: is a directory; give the path of a YAML file in it")
        if file.exists() and not file.is_file():
            raise SettingsError(f"{path}: is no regular file; give the path of a YAML file")
        if not file.is_file():
            raise SettingsError(
                f"{path}: no such file; give the path of a YAML file such as configs/libero_smoke_cpu.yaml"
            )
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror}); give a YAML file that can") from None
    if len(content) > MAX_BYTES:
        raise SettingsError(f"{path}: more than {MAX_BYTES:,} bytes, which no config has; give the YAML file of a run")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SettingsError(
            f"{path}: not valid YAML (byte {error.start} is no UTF-8 text); give a YAML file saved as UTF-8"
        ) from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """What YAML text says. Raises `SettingsError`, which begins with `where` and has the line where there are
    several."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark and "\n" in text else ""
        problem = " ".join(str(error.problem or error.context).split())
        if "'\\t'" in problem:
            problem += "; indent with spaces"
        raise SettingsError(f"{where}: not valid YAML ({line}{problem})") from None
    except yaml.YAMLError as error:  # a character that no YAML may hold
        raise SettingsError(f"{where}: not valid YAML ({' '.join(str(error).split())})") from None


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with each key once, no aliases and a bounded depth."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):  # ten lines of them make a billion values
            raise _problem(
                f"*{event.anchor} repeats another value, which is not supported; write it out", event.start_mark
            )
        if self._depth == MAX_DEPTH:
            raise _problem(f"more than {MAX_DEPTH} lists or sections in each other", event.start_mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, MappingNode):
            raise _problem("a section is needed here", node.start_mark)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, ScalarNode) or key.tag != TEXT_TAG:
                shown = key.value if isinstance(key, ScalarNode) else "a list or section"
                raise _problem(f"{shown} is no name of a key; keys are words", key.start_mark)
            if key.value in lines:
                first = lines[key.value]
                where = f"first in line {first}" if first != key.start_mark.line + 1 else "both in this line"
                raise _problem(f"{key.value} stands here twice, {where}; keep one", key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        if isinstance(node, ScalarNode) and node.tag == INT_TAG and len(node.value) > MAX_DIGITS:
            raise _problem(f"a number of {len(node.value)} digits", node.start_mark)
        if isinstance(node, ScalarNode) and node.tag in (INT_TAG, FLOAT_TAG) and ":" in node.value:
            raise _problem(f"{node.value} is a number to the base of 60 in YAML; write it out", node.start_mark)
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
        ):  # !!int x, !!bool maybe, 2025-13-45
            kind = node.tag.rpartition(":")[2]
            raise _problem(f"{_shown(node)} is no {kind}; put text into quotes", node.start_mark) from None


def _problem(text: str, mark: Any) -> ConstructorError:
    return ConstructorError(problem=text, problem_mark=mark)


def _shown(node: Node) -> str:
    return shortened(repr(node.value)) if isinstance(node, ScalarNode) else "this"


def shortened(text: str) -> str:
    """At most `MAX_CHARACTERS` of it, for a message."""
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}..."
