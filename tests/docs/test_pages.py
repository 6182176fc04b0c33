"""What README and docs say can be typed and found: links, commands and their options, settings."""

import contextlib
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.main
import yaml
from pages import PAGES, ROOT, blocks, prose
from pydantic import BaseModel
from typer.core import TyperGroup

from vlarl_rllib.cli import app
from vlarl_rllib.settings.schema import Sections

LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(#[^)\s]*)?\)")
HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)
SECTIONS = "|".join(Sections.model_fields)
KEY = re.compile(rf"`((?:{SECTIONS})(?:\.[a-z_]+)+)(?:[:=][^`]*)?`")
FILES = (".json", ".jsonl", ".csv", ".yaml", ".py")
"""Of which some begin with a section's name."""
SHELL = ("&", "&&", "|", ";", ">")
OF_OTHERS = ("migrating.md", "metrics.md")
"""Pages whose tables begin with names that are not settings: another system's, and metrics."""


def name(page: Path) -> str:
    return page.name


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    slugs = (re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(prose(page)))
    return {f"#{slug}" for slug in slugs}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for path, anchor in LINK.findall(prose(page)):
        target = (page.parent / path) if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(path + anchor)
    assert broken == []


def commands(page: Path) -> Iterator[tuple[int, list[str]]]:
    """Lines of fenced blocks that call vlarl: line number and arguments. A comment, or what stands behind two spaces,
    explains; brackets are around what may be left out."""
    for block in blocks(page):
        joined = block.text.replace("\\\n", " ")
        for number, line in enumerate(joined.splitlines(), block.line):
            found = re.match(r"(?:[A-Z_]+=\S+ )*(?:\S*/)?vlarl (.*)", line)
            if found and block.language in ("", "sh", "bash"):
                typed = re.sub(r"\[(--[^\]]*)\]", r"\1", re.split(r"\s{2,}", found[1])[0])
                words = shlex.split(typed, comments=True)
                yield number, list(itertools.takewhile(lambda word: word not in SHELL, words))


def parse(arguments: list[str]) -> None:
    """As the command line does; raises typer.TyperException. Nothing is run."""
    command: Any = typer.main.get_command(app)
    context = command.context_class(command, info_name="vlarl")
    while isinstance(command, TyperGroup) and arguments and not arguments[0].startswith("-"):
        _, command, arguments = command.resolve_command(context, arguments)
        context = command.context_class(command, info_name=command.name, parent=context)
    with contextlib.suppress(typer.Exit):  # --help
        command.make_context(command.name, list(arguments), parent=context.parent)


def unknown_keys(keys: list[str]) -> list[str]:
    """Those that are no key, or section, of the settings."""
    return [key for key in keys if not exists(Sections, key.split("."))]


def exists(model: Any, path: list[str]) -> bool:
    if not path:
        return True
    fields = getattr(model, "model_fields", {})
    if path[0] not in fields:
        return False
    inner = fields[path[0]].annotation
    choices = [inner, *get_args(inner)]
    return len(path) == 1 or any(
        exists(choice, path[1:]) for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel)
    )


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_can_be_typed(page: Path) -> None:
    wrong = []
    for line, arguments in commands(page):
        try:
            parse(arguments)
        except typer.TyperException as error:
            wrong.append(f"{page.name}:{line}: vlarl {shlex.join(arguments)}: {error.format_message()}")
        overrides = [value for option, value in itertools.pairwise(arguments) if option == "--set"]
        wrong += [f"{page.name}:{line}: {key}" for key in unknown_keys([text.split("=")[0] for text in overrides])]
    assert wrong == []


def test_a_wrong_command_would_be_noticed() -> None:
    parse(["train", "config.yaml", "--set", "training.lr=1e-5"])
    for arguments in (
        ["trian"],
        ["train", "--no-such-option"],
        ["export", "runs/latest"],
        ["eval", "x", "--trials", "many"],
    ):
        with pytest.raises(typer.TyperException):
            parse(arguments)
    assert unknown_keys(["training.lr", "model.lora.rank", "learners.fsdp.mesh", "training.lrr", "model.rank"]) == [
        "training.lrr",
        "model.rank",
    ]


def own_text(page: Path) -> str:
    text = prose(page)
    return re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE) if page.name in OF_OTHERS else text


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_settings_exist(page: Path) -> None:
    keys = [key for key in KEY.findall(own_text(page)) if not key.endswith(FILES)]
    for block in blocks(page):
        values = yaml.safe_load(block.text) if block.language == "yaml" else None
        if isinstance(values, dict) and set(values) <= set(Sections.model_fields):
            keys += [f"{section}.{key}" for section, inner in values.items() for key in inner]
    assert unknown_keys(keys) == []


def test_migrating_names_many_of_our_keys() -> None:
    ours = set(KEY.findall(own_text(ROOT / "docs" / "migrating.md")))
    assert {"training.clip_low", "learners.fsdp.cpu_offload", "rollout.group_size"} < ours and len(ours) > 50
