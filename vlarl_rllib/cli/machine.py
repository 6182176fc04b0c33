"""Commands about the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlarl_rllib.cli.app import app
from vlarl_rllib.cli.options import PATH, ConfigPath, Overrides
from vlarl_rllib.settings import Settings

DASHBOARD_FILES = "Where the files go."
HEAD = "URL of a cluster's dashboard, http://head:8265; default every Ray that runs on this machine."


@app.command()
def doctor(config: ConfigPath = None, overrides: Overrides = None) -> None:
    """Check this machine and, with CONFIG, print the plan of a run."""
    settings = Settings.from_yaml(config, overrides or []) if config else None

    from vlarl_rllib.commands.doctor import report

    raise typer.Exit(0 if report(settings) else 1)


@app.command()
def dashboard(
    out: Annotated[Path, typer.Option(help=DASHBOARD_FILES, **PATH)] = Path("vlarl-dashboard"),
    address: Annotated[str | None, typer.Option(help=HEAD, show_default=False)] = None,
) -> None:
    """Write what Prometheus and Grafana need to show runs, and say how to start them."""
    from vlarl_rllib.commands.dashboard import write_dashboard

    write_dashboard(out, address)
