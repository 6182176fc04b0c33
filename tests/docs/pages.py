"""What the tests of the documentation read: pages, their fenced blocks, and the files that a block says it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NAME = re.compile(r"# (\S+\.\w+)\n")


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: Path
    line: int
    """Of its first line of text."""
    language: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in _BLOCK.finditer(text):
        yield Block(page, text[: found.start(2)].count("\n") + 1, found[1], found[2])


def prose(page: Path) -> str:
    """The page without its fenced blocks, the lines where they were."""
    return _BLOCK.sub(lambda found: "\n" * found[0].count("\n"), page.read_text())


def files_of(page: Path) -> dict[str, str]:
    """Blocks whose first line is a comment with a file's name, by that name, without the line."""
    named = ((_NAME.match(block.text), block.text) for block in blocks(page))
    return {found[1]: text[found.end() :] for found, text in named if found}
