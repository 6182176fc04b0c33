"""Options and arguments that several commands take, and what they do with them."""

from __future__ import annotations

import os
from enum import StrEnum
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import typer.core

from vlarl_rllib.process.console import pasted, shown
from vlarl_rllib.process.signals import END
from vlarl_rllib.process.storage import URI, Place, place_of
from vlarl_rllib.settings import Settings, SettingsError


def expanded(text: str) -> Path:
    """A path from the command line; shells leave `--run-dir=~/x` as it is."""
    if not text:
        raise SettingsError("an empty path; give one (a variable of the shell may not be set)")
    return Path(os.path.expanduser(text))


def place(text: str) -> Place:
    """A path, or a URI such as s3://bucket/runs/mine."""
    return place_of(text) if URI.match(text) else expanded(text)


LIBRARIES = "Ray, torch and RLlib to be loaded"
"""What a start waits for, in words."""
PATH: dict[str, Any] = {"parser": expanded, "metavar": "PATH"}
ConfigPath = Annotated[
    Path | None,
    typer.Argument(
        help="YAML file, such as configs/libero_smoke_cpu.yaml.", show_default=False, parser=expanded, metavar="CONFIG"
    ),
]
PLACE: dict[str, Any] = {"parser": place, "metavar": "PATH"}
NewRunDirectory = Annotated[Path | None, typer.Option(help="Where the run goes; default runs/<config>-<time>.", **PATH)]


class ResumeWhen(StrEnum):
    """What `--resume` asks for."""

    ALWAYS = "always"
    """Continue; a mistake where there is nothing to continue. The word may be left out."""
    AUTO = "auto"
    """Continue where there is something to continue, else start."""


class ResumeCommand(typer.core.TyperCommand):
    """A command with `--resume` and `--resume auto`: an option of Typer's has a value always, or never."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = [*ResumeWhen]
        given = [
            f"--resume={ResumeWhen.ALWAYS}" if word == "--resume" and following not in words else word
            for word, following in zip_longest(args, args[1:])
        ]
        return super().parse_args(ctx, given)


Resume = Annotated[
    ResumeWhen | None,
    typer.Option(
        "--resume",
        metavar="[auto]",
        show_default=False,
        help="Continue the run in --run-dir from its newest checkpoint, with its own config; auto: or else start it, "
        "from CONFIG.",
    ),
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


def continues(
    resume: ResumeWhen | None,
    run_dir: Place | None,
    config: Path | None,
    overrides: list[str] | None,
    resume_from: Place | None = None,
    unit: Literal["iteration", "step"] = "iteration",
) -> Place | None:
    """The run directory where the command goes on with the run there, None where it starts one.

    Raises `SettingsError` for options that do not go together.
    """
    if resume is None:
        return None
    if resume is ResumeWhen.AUTO:
        if run_dir is None or (overrides and config is None):
            raise SettingsError("--resume auto: needs --run-dir, and CONFIG to start from; --set belongs to CONFIG")
        from vlarl_rllib.runs.checkpoints import CheckpointStore

        return run_dir if CheckpointStore(run_dir.resolve() / "checkpoints", 1, unit).list() else None
    if run_dir is None or config is not None or resume_from is not None or overrides:
        not_from = " or --resume-from" if unit == "iteration" else ""
        remedy = ": use --resume-from" if unit == "iteration" else ""
        raise SettingsError(
            f"--resume: needs --run-dir, and takes no CONFIG, --set{not_from} (a changed config is a new run{remedy}); "
            "with CONFIG, for what may not have begun yet, it is --resume auto"
        )
    return run_dir


def report_at_the_end(run: Path) -> None:
    """At a run's end; a picture that cannot be drawn is no reason to fail."""
    from vlarl_rllib.commands.report import write_report

    END.words = lambda: f"no report; write it with: vlarl report {pasted(run)}"
    try:
        typer.echo(f"report: {shown(write_report(run))}")
    except (SettingsError, ImportError, OSError) as error:
        typer.echo(f"no report: {error}", err=True)


def load_settings(config: Path | None, overrides: list[str] | None, example: str) -> tuple[Settings, str]:
    """The settings, and what to call a run of them. Raises `SettingsError`."""
    if config is None:
        raise SettingsError(f"CONFIG: missing; give a YAML file, for example {example}")
    return Settings.from_yaml(config, overrides or []), config.stem


def preflight(settings: Settings) -> None:
    from vlarl_rllib.runs.doubts import doubts
    from vlarl_rllib.runs.preflight import check

    check(settings)
    remark(doubts(settings))


def remark(doubts: list[str]) -> None:
    for doubt in doubts:
        typer.echo(f"note: {doubt}", err=True)
