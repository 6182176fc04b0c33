"""Commands about the machine, and about what is to run on it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlarl_rllib.cli.app import app
from vlarl_rllib.cli.options import PATH, Family, Overrides, expanded
from vlarl_rllib.settings import Settings, SettingsError

if TYPE_CHECKING:
    from vlarl_rllib.runs.capacity import Machine

OF_A_CONFIG = ("--set", "--deep", "--cpus", "--gpus", "--memory", "--node")
OF_A_CHECKPOINT = ("--suite", "--env", "--family")
OF_A_CLUSTER = ("--address", "--run-dir")

DASHBOARD_FILES = "Where the files go."
HEAD = "URL of a cluster's dashboard, http://head:8265; default every Ray that runs on this machine."
CLUSTER = "Ask every node of the running cluster, with CONFIG whether it fits there."
GCS = "host:port of that cluster; default RAY_ADDRESS."
WRITTEN = "With --cluster: whether every node sees this directory and can write to it."
CPUS = "Plan CONFIG for a machine with so many CPUs, not this one."
NODE = (
    "Plan CONFIG for a cluster with this node; give it for each of them. cpus=, gpus=, memory= (GB), gpu-memory= (GB), "
    "and what else it is started with: a number is a custom resource (farm=4), a word a label (zone=a)."
)


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
    cluster: Annotated[bool, typer.Option("--cluster", help=CLUSTER)] = False,
    address: Annotated[str | None, typer.Option(help=GCS, show_default=False)] = None,
    run_dir: Annotated[Path | None, typer.Option(help=WRITTEN, show_default=False, **PATH)] = None,
    cpus: Annotated[float | None, typer.Option(help=CPUS, min=1)] = None,
    gpus: Annotated[int | None, typer.Option(help="The same: GPUs.", min=0)] = None,
    memory: Annotated[float | None, typer.Option(help="The same: memory in GB.", min=0)] = None,
    gpu_memory: Annotated[float, typer.Option(help="The same: memory of each GPU in GB.", min=0)] = 80.0,
    node: Annotated[list[str] | None, typer.Option(help=NODE, show_default=False)] = None,
    suite: Annotated[str | None, typer.Option(help="LIBERO suite that CHECKPOINT is for.", show_default=False)] = None,
    env: Annotated[str | None, typer.Option(help="Environment that it is for.", show_default=False)] = None,
    family: Family = None,
) -> None:
    """Check this machine or a cluster; with CONFIG print the plan of a run, with CHECKPOINT what a policy is."""
    stated = {"--cpus": cpus, "--gpus": gpus, "--memory": memory}
    given = {option: value is not None for option, value in stated.items()}
    given |= {"--set": bool(overrides), "--deep": deep, "--node": bool(node)}
    given |= {"--suite": suite is not None, "--env": env is not None, "--family": family is not None}
    given |= {"--address": address is not None, "--run-dir": run_dir is not None}
    _refuse_what_does_not_go_together(subject, given, cluster)
    if subject is not None and not is_config(subject):
        from vlarl_rllib.commands.checkpoint import report_checkpoint

        raise typer.Exit(0 if report_checkpoint(subject, suite=suite, env=env, family=family) else 1)
    settings = Settings.from_yaml(expanded(subject), overrides or []) if subject is not None else None
    if cluster:
        from vlarl_rllib.commands.doctor_cluster import report_on_cluster

        raise typer.Exit(0 if report_on_cluster(settings, address, run_dir) else 1)
    if settings is not None and (machines := _machines(cpus, gpus, memory, gpu_memory, node or [])):
        from vlarl_rllib.commands.doctor import report_on, report_on_nodes

        good = report_on_nodes(settings, machines) if node else report_on(settings, machines[0])
        raise typer.Exit(0 if good else 1)

    from vlarl_rllib.commands.doctor import report

    if not report(settings):
        raise typer.Exit(1)
    if deep and settings is not None:
        from vlarl_rllib.commands.deep_check import run_deep_check

        raise typer.Exit(run_deep_check(settings))


def _refuse_what_does_not_go_together(subject: str | None, given: dict[str, bool], cluster: bool) -> None:
    if subject is None or is_config(subject):
        _refuse(given, OF_A_CHECKPOINT, "CHECKPOINT")
    if subject is None or not is_config(subject):
        _refuse(given, OF_A_CONFIG, "CONFIG")
    stated = [given[option] for option in ("--cpus", "--gpus", "--memory")]
    if any(stated) and not all(stated):
        raise SettingsError("--cpus, --gpus, --memory: give all three, or none for this machine")
    if given["--node"] and any(stated):
        raise SettingsError("--node: describes a machine of its own; leave --cpus, --gpus and --memory out")
    if given["--deep"] and (any(stated) or given["--node"]):
        raise SettingsError("--deep: starts on this machine; leave --cpus, --gpus, --memory and --node out")
    if not cluster:
        _refuse(given, OF_A_CLUSTER, "--cluster")
        return
    if subject is not None and not is_config(subject):
        raise SettingsError("--cluster: takes a config, not a policy; leave one of the two out")
    if given["--deep"] or given["--node"] or any(stated):
        raise SettingsError(
            "--cluster: asks the nodes that there are; leave --deep, --node, --cpus, --gpus, --memory out"
        )


def _machines(
    cpus: float | None, gpus: int | None, memory: float | None, gpu_memory: float, nodes: Sequence[str]
) -> list[Machine]:
    """Those that are described; none = this one is meant."""
    from vlarl_rllib.runs.capacity import Machine

    if nodes:
        return [Machine.parsed(text, gpu_memory) for text in nodes]
    if cpus is None or gpus is None or memory is None:
        return []
    return [Machine(cpus, gpus, memory, gpu_memory)]


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
