"""Options and arguments that several commands take, and what they do with them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from vlarl_rllib.process.console import pasted
from vlarl_rllib.process.signals import END
from vlarl_rllib.settings import Settings, SettingsError


def expanded(text: str) -> Path:
    """A path from the command line; shells leave `--run-dir=~/x` as it is."""
    if not text:
        raise SettingsError("an empty path; give one (a variable of the shell may not be set)")
    return Path(os.path.expanduser(text))


PATH: dict[str, Any] = {"parser": expanded, "metavar": "PATH"}
ConfigPath = Annotated[
    Path | None,
    typer.Argument(
        help="YAML file, such as configs/libero_smoke_cpu.yaml.", show_default=False, parser=expanded, metavar="CONFIG"
    ),
]
NewRunDirectory = Annotated[Path | None, typer.Option(help="Where the run goes; default runs/<config>-<time>.", **PATH)]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Continue the run in --run-dir from its newest checkpoint, with its own config."),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Override one key; may be repeated.")
]
Family = Annotated[
    str | None,
    typer.Option(help="Kind of policy, as model.family; default the run's, else the checkpoint's.", show_default=False),
]
PolicyName = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT", help="A run's directory, a training checkpoint, a model's directory, hub id or preset."
    ),
]


def report_at_the_end(run: Path) -> None:
    """At a run's end; a picture that cannot be drawn is no reason to fail."""
    from vlarl_rllib.commands.report import write_report

    END.words = lambda: f"no report; write it with: vlarl report {pasted(run)}"
    try:
        typer.echo(f"report: {os.path.relpath(write_report(run))}")
    except (SettingsError, ImportError, OSError) as error:
        typer.echo(f"no report: {error}", err=True)


def load_settings(config: Path | None, overrides: list[str] | None, example: str) -> tuple[Settings, str]:
    """The settings, and what to call a run of them. Raises `SettingsError`."""
    if config is None:
        raise SettingsError(f"CONFIG: missing; give a YAML file, for example {example}")
    return Settings.from_yaml(config, overrides or []), config.stem


def preflight(settings: Settings) -> None:
    from vlarl_rllib.runs.preflight import check, doubts

    check(settings)
    remark(doubts(settings))


def remark(doubts: list[str]) -> None:
    for doubt in doubts:
        typer.echo(f"note: {doubt}", err=True)
