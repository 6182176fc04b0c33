"""`vlarl tune`: many runs as one experiment."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from vlarl_rllib.cli.app import app
from vlarl_rllib.cli.options import LIBRARIES, PATH, Overrides, expanded, preflight
from vlarl_rllib.process.console import saying_so
from vlarl_rllib.process.signals import END
from vlarl_rllib.settings import SettingsError
from vlarl_rllib.settings.experiment import Experiment


@app.command()
def tune(
    experiment: Annotated[
        Path | None,
        typer.Argument(
            help="YAML file, such as tune_experiments/seeds.yaml.",
            show_default=False,
            parser=expanded,
            metavar="EXPERIMENT",
        ),
    ] = None,
    overrides: Overrides = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where it goes; default runs/<experiment>-<time>.", **PATH)
    ] = None,
    restore: Annotated[
        bool, typer.Option("--restore", help="Go on with the experiment in --run-dir where it was stopped or killed.")
    ] = False,
) -> None:
    """Train many runs: seeds, grids, random search, ASHA, population based training; ranks them at the end."""
    from vlarl_rllib.runs.directory import RUNS, claimed
    from vlarl_rllib.runs.experiments import check_searcher, new_experiment, open_experiment

    END.sigterm_code = 0  # a scheduler's way to end an experiment is no failure
    if restore:
        if run_dir is None or experiment is not None or overrides:
            raise SettingsError(
                "--restore: needs --run-dir, and takes no EXPERIMENT or --set (a changed one is a new experiment)"
            )
        directory, found = open_experiment(run_dir)
    else:
        if experiment is None:
            raise SettingsError("EXPERIMENT: missing; give a YAML file, for example tune_experiments/seeds.yaml")
        found = Experiment.from_yaml(experiment, overrides or [])
        directory = new_experiment(run_dir or RUNS / f"{experiment.stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    check_searcher(found)
    with saying_so("checks of the settings and the models"):
        for settings in found.kinds():
            preflight(settings)
    with claimed(directory, "--run-dir"):
        with saying_so(LIBRARIES):
            from vlarl_rllib.commands.tune import run_experiment

        raise typer.Exit(run_experiment(found, directory, restore=restore))
