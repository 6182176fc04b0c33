"""`vlarl bench`: how fast the parts are on this machine."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated

import typer

from vlarl_rllib.bench import BENCHMARKS
from vlarl_rllib.cli.app import app
from vlarl_rllib.cli.options import LIBRARIES, PATH, ConfigPath, Overrides
from vlarl_rllib.process.console import saying_so
from vlarl_rllib.settings import SettingsError

NAMES = "; ".join(f"{name}: {what}" for name, what in BENCHMARKS.items())
PROFILE = "Where the time goes: operations by self time (update, sft), seconds by phase (the others)."


@app.command()
def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help=NAMES, show_default=False)],
    config: ConfigPath = None,
    overrides: Overrides = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File for the same numbers, and how they were made.", **PATH)
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help=PROFILE)] = False,
) -> None:
    """Measure a part beside a plain loop and what the machine could do; without CONFIG on a small model."""
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS, 1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise SettingsError(f"NAME: {name!r} is no benchmark{meant}; choose one of {', '.join(BENCHMARKS)}")
    if json_file is not None and json_file.is_dir():
        raise SettingsError(f"--json: {json_file} is a directory; give a file")
    from vlarl_rllib.bench.setup import bench_settings, prepared

    settings = bench_settings(name, config, overrides or [])
    with saying_so("checks of the settings and the model"):
        settings = prepared(name, settings)
    with saying_so(LIBRARIES):
        from vlarl_rllib.commands.bench import run_bench

    run_bench(name, settings, json_file=json_file, profile=profile)
