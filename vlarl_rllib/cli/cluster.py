"""Commands about runs as jobs of a Ray cluster."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from vlarl_rllib.cli.app import app
from vlarl_rllib.cli.options import PATH, ConfigPath, Overrides, load_settings
from vlarl_rllib.process.command_line import Commands
from vlarl_rllib.settings import SettingsError

jobs = typer.Typer(cls=Commands, help="Jobs of a Ray cluster: list, logs, stop.")
app.add_typer(jobs, name="jobs")

Address = Annotated[
    str | None,
    typer.Option(help="The dashboard's, such as http://head:8265; default RAY_API_SERVER_ADDRESS.", show_default=False),
]
Job = Annotated[str, typer.Argument(metavar="JOB", help="As vlarl submit and vlarl jobs list print it.")]
Follow = Annotated[bool, typer.Option("--follow", help="Print the log until the job ends, with its exit code.")]


@app.command()
def submit(
    config: ConfigPath = None,
    overrides: Overrides = None,
    address: Address = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            help="Absolute: where the run goes, on the cluster; the same one again goes on.", show_default=False, **PATH
        ),
    ] = None,
    code: Annotated[
        bool, typer.Option("--code", help="Upload this package's source, in place of the cluster's.")
    ] = False,
    python: Annotated[
        str, typer.Option(help="Interpreter that has the package and what it needs, as the cluster's head finds it.")
    ] = "python",
    follow: Follow = False,
) -> None:
    """Train as a job of a Ray cluster: vlarl train there, begun or, in the same run directory, continued."""
    settings, _ = load_settings(config, overrides, "configs/libero_smoke_cpu.yaml")
    if run_dir is None:
        raise SettingsError("--run-dir: missing; give an absolute path on a disk that all nodes of the cluster see")
    if not run_dir.is_absolute():
        raise SettingsError(
            f"--run-dir: {run_dir} is relative, and a job's working directory is Ray's cache of the upload, another "
            "one after each change; give an absolute path on a disk that all nodes of the cluster see"
        )
    where = _address(address)
    options = [part for override in overrides or [] for part in ("--set", override)]
    options += ["--code"] * code + (["--python", python] if python != "python" else [])
    command = shlex.join(["vlarl", "submit", str(config), *options, "--run-dir", str(run_dir)])

    from vlarl_rllib.commands.submit import Submission, submit

    submission = Submission(Path(os.path.normpath(run_dir)), command, python=python, code=code, follow=follow)
    raise typer.Exit(submit(settings, submission, where))


@jobs.command(name="list")
def list_jobs(address: Address = None) -> None:
    """The cluster's jobs, the newest first."""
    where = _address(address)

    from vlarl_rllib.commands.jobs import list_jobs

    raise typer.Exit(list_jobs(where))


@jobs.command()
def logs(job: Job, address: Address = None, follow: Follow = False) -> None:
    """What a job has printed."""
    where = _address(address)

    from vlarl_rllib.commands.jobs import Cluster

    cluster = Cluster(where)
    raise typer.Exit(cluster.follow(job) if follow else cluster.show_log(job))


@jobs.command()
def stop(job: Job, address: Address = None) -> None:
    """End a job as SIGTERM does, with a checkpoint of the last iteration, and wait until it has ended."""
    where = _address(address)

    from vlarl_rllib.commands.jobs import Cluster

    raise typer.Exit(Cluster(where).stop(job))


def _address(given: str | None) -> str:
    """`--address`, or what Ray's own client would take."""
    if address := given or os.environ.get("RAY_API_SERVER_ADDRESS"):
        return address
    raise SettingsError("--address: missing; give the address of the cluster's dashboard, such as http://head:8265")
