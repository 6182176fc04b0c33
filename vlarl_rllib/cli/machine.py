"""Commands about the machine."""

from __future__ import annotations

import typer

from vlarl_rllib.cli.app import app
from vlarl_rllib.cli.options import ConfigPath, Overrides
from vlarl_rllib.settings import Settings


@app.command()
def doctor(config: ConfigPath = None, overrides: Overrides = None) -> None:
    """Check this machine and, with CONFIG, print the plan of a run."""
    settings = Settings.from_yaml(config, overrides or []) if config else None

    from vlarl_rllib.commands.doctor import report

    raise typer.Exit(0 if report(settings) else 1)
