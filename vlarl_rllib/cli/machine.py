"""Commands about the machine, and about what is to run on it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from vlarl_rllib.cli.app import app
from vlarl_rllib.cli.options import PATH, Family, Overrides, expanded
from vlarl_rllib.settings import Settings, SettingsError

OF_A_CONFIG = ("--set", "--deep", "--cpus", "--gpus", "--memory", "--gpu-memory")
OF_A_CHECKPOINT = ("--suite", "--env", "--family")

DASHBOARD_FILES = "Where the files go."
HEAD = "URL of a cluster's dashboard, http://head:8265; default every Ray that runs on this machine."


@app.command()
def doctor(
    subject: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG_OR_CHECKPOINT",
            show_default=False,
            help="A YAML file (*.yaml, *.yml), or a policy: a run's directory, a training checkpoint, a model's or "
            "adapter's directory, published name, hub id or preset.",
        ),
    ] = None,
    overrides: Overrides = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Start what CONFIG plans, and compare sampler and learner; trains nothing.")
    ] = False,
    cpus: Annotated[
        float | None, typer.Option(help="Plan CONFIG for a machine with so many CPUs, not this one.", min=1)
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="The same: GPUs.", min=0)] = None,
    memory: Annotated[float | None, typer.Option(help="The same: memory in GB.", min=0)] = None,
    gpu_memory: Annotated[float, typer.Option(help="The same: memory of each GPU in GB.", min=0)] = 80.0,
    suite: Annotated[str | None, typer.Option(help="LIBERO suite that CHECKPOINT is for.", show_default=False)] = None,
    env: Annotated[str | None, typer.Option(help="Environment that it is for.", show_default=False)] = None,
    family: Family = None,
) -> None:
    """Check this machine; with CONFIG print the plan of a run, with CHECKPOINT what a policy is."""
    stated = [value is not None for value in (cpus, gpus, memory)]
    given = {"--set": bool(overrides), "--deep": deep, "--cpus": cpus is not None, "--gpus": gpus is not None}
    given |= {"--memory": memory is not None, "--suite": suite is not None, "--env": env is not None}
    given["--family"] = family is not None
    if subject is None or is_config(subject):
        _refuse(given, OF_A_CHECKPOINT, "CHECKPOINT")
    if subject is None or not is_config(subject):
        _refuse(given, OF_A_CONFIG, "CONFIG")
    if any(stated) and not all(stated):
        raise SettingsError("--cpus, --gpus, --memory: give all three, or none for this machine")
    if deep and any(stated):
        raise SettingsError("--deep: starts on this machine; leave --cpus, --gpus and --memory out")
    if subject is not None and not is_config(subject):
        from vlarl_rllib.commands.checkpoint import report_checkpoint

        raise typer.Exit(0 if report_checkpoint(subject, suite=suite, env=env, family=family) else 1)
    settings = Settings.from_yaml(expanded(subject), overrides or []) if subject is not None else None
    if cpus is not None and gpus is not None and memory is not None and settings is not None:
        from vlarl_rllib.commands.doctor import report_on
        from vlarl_rllib.runs.capacity import Machine

        raise typer.Exit(0 if report_on(settings, Machine(cpus, gpus, memory, gpu_memory)) else 1)

    from vlarl_rllib.commands.doctor import report

    if not report(settings):
        raise typer.Exit(1)
    if deep and settings is not None:
        from vlarl_rllib.commands.deep_check import run_deep_check

        raise typer.Exit(run_deep_check(settings))


def is_config(subject: str) -> bool:
    """Whether it is a config rather than a policy: by its suffix, or since it is a file, which no policy is."""
    return subject.lower().endswith((".yaml", ".yml")) or os.path.isfile(os.path.expanduser(subject))


def _refuse(given: dict[str, bool], options: tuple[str, ...], subject: str) -> None:
    for option in options:
        if given.get(option):
            raise SettingsError(f"{option}: is about {subject}, which is not what was given; leave it out")


@app.command()
def dashboard(
    out: Annotated[Path, typer.Option(help=DASHBOARD_FILES, **PATH)] = Path("vlarl-dashboard"),
    address: Annotated[str | None, typer.Option(help=HEAD, show_default=False)] = None,
) -> None:
    """Write what Prometheus and Grafana need to show runs, and say how to start them."""
    from vlarl_rllib.commands.dashboard import write_dashboard

    write_dashboard(out, address)
