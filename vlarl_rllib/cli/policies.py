"""Commands about a policy that is there: evaluate it, export it, report what a run did, make a small one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from vlarl_rllib.cli.app import app
from vlarl_rllib.cli.options import PATH, Family, PolicyName, expanded
from vlarl_rllib.envs.registry import DEFAULT_ENVIRONMENT
from vlarl_rllib.settings import SettingsError

RESULTS = "Where results go, or are continued; default runs/eval-<suite>-<time>."
EvaluationDirectory = Annotated[Path | None, typer.Option(help=RESULTS, show_default=False, **PATH)]


@app.command(name="eval")
def evaluate(
    checkpoint: PolicyName,
    suite: Annotated[
        str | None, typer.Option(help="LIBERO suite; none for the other environments.", show_default=False)
    ] = None,
    env: Annotated[
        str, typer.Option(help="libero, tabletop, synthetic, or one that an installed package adds.")
    ] = DEFAULT_ENVIRONMENT,
    tasks: Annotated[
        str | None, typer.Option(metavar="0,3", help="Tasks of the suite; default all.", show_default=False)
    ] = None,
    trials: Annotated[int, typer.Option(help="Initial states of each task, from the first.")] = 50,
    out: EvaluationDirectory = None,
    engine: Annotated[str, typer.Option(help="vllm, or torch = inside each runner.")] = "vllm",
    family: Family = None,
    unnorm_key: Annotated[
        str | None, typer.Option(help="Action statistics; default the run's, else the suite's.", show_default=False)
    ] = None,
    center_crop: Annotated[
        bool, typer.Option(help="Crop 90 % of the frame's area, as the LIBERO checkpoints were trained.")
    ] = True,
    max_steps: Annotated[
        int | None, typer.Option(help="Cut episodes off here; default the suite's horizon.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the poses of fixtures.")] = 7,
    gpus: Annotated[float, typer.Option(help="GPUs of each engine; a fraction shares one, 0 = CPU.")] = 0.0,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32 or bfloat16; default bfloat16 on a GPU, float32 on a CPU.", show_default=False),
    ] = None,
    num_engines: Annotated[int, typer.Option(help="vLLM engines.")] = 1,
    num_runners: Annotated[int, typer.Option(help="Runner actors.")] = 1,
    num_envs: Annotated[
        int | None, typer.Option(help="Slots of each runner; default cores.", show_default=False)
    ] = None,
    num_processes: Annotated[
        int | None, typer.Option(help="Environment processes of each runner; default cores.", show_default=False)
    ] = None,
    videos: Annotated[int, typer.Option(help="Films of each task, of its first episodes.")] = 1,
    fast_render: Annotated[
        bool, typer.Option("--fast-render", help="Faster in software, but not the pictures of the protocol.")
    ] = False,
) -> None:
    """Evaluate a policy under LIBERO's protocol; the same command goes on where it was stopped."""
    from vlarl_rllib.evaluation.libero_protocol import EvaluationRequest
    from vlarl_rllib.evaluation.session import run_evaluation
    from vlarl_rllib.runs.directory import RUNS

    request = EvaluationRequest(
        checkpoint, suite=suite, env=env, tasks=_task_numbers(tasks), trials=trials, seed=seed, max_steps=max_steps,
        family=family, unnorm_key=unnorm_key,
        center_crop=center_crop, fast_render=fast_render, engine=engine, dtype=dtype, gpus=gpus,
        num_engines=num_engines, num_runners=num_runners, num_envs=num_envs, num_processes=num_processes, videos=videos,
    )  # fmt: skip
    raise typer.Exit(run_evaluation(request, out or RUNS / f"eval-{suite or env}-{time.strftime('%Y%m%d-%H%M%S')}"))


def _task_numbers(text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise SettingsError(f"--tasks: {text!r} must be task numbers with commas between them, such as 0,3") from None


@app.command()
def export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_CHECKPOINT",
            help="A run's directory (its newest checkpoint), or one checkpoint.",
            parser=expanded,
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new directory.", parser=expanded)],
    adapter: Annotated[
        bool, typer.Option("--adapter/--merge", help="Only the PEFT adapter, or a whole checkpoint with it merged.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; default: the type that the run's engines used.")
    ] = None,
    family: Family = None,
) -> None:
    """Write a run's policy as a Hugging Face checkpoint, or its adapter."""
    from vlarl_rllib.runs.export import find_training_checkpoint

    try:
        checkpoint = find_training_checkpoint(source, family)
    except (OSError, ValueError) as error:
        raise SettingsError(f"RUN_OR_CHECKPOINT: {error}") from None
    if checkpoint is None:
        raise SettingsError(
            f"RUN_OR_CHECKPOINT: {source} is neither a run with a checkpoint nor one; give a directory such as "
            "runs/latest"
        )
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise SettingsError(f"OUT: {out} exists and is not empty; give a new directory")
    if dtype not in (None, "float32", "bfloat16"):
        raise SettingsError(f"--dtype: {dtype!r} must be float32 or bfloat16")
    if adapter and dtype:
        raise SettingsError("--dtype: an adapter is always float32; leave it out")
    from rich.text import Text

    from vlarl_rllib.process.console import make_console
    from vlarl_rllib.runs.export import export_adapter, export_merged

    console = make_console()
    with console.status(Text(f"exporting iteration {checkpoint.iteration} of {source}")):
        export_adapter(checkpoint, out) if adapter else export_merged(checkpoint, out, dtype)
    console.print(
        f"wrote {out}: the {'adapter' if adapter else 'merged checkpoint'} of iteration {checkpoint.iteration}"
    )


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_DIR...",
            help="Directories of runs, or of Tune experiments with a run in each trial.",
            parser=expanded,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="HTML file; default report.html in the one directory, runs/compare-<time>.html for several.", **PATH
        ),
    ] = None,
) -> None:
    """Write the report of a run, or one of many beside each other, and print one line for each."""
    from vlarl_rllib.commands.report import report as write
    from vlarl_rllib.process.console import make_console, shown

    file, table = write(runs, out)
    make_console().print(table)
    typer.echo(f"wrote {shown(file)}")


@app.command(name="make-checkpoint")
def make_checkpoint(
    preset: Annotated[str, typer.Argument(help="tiny, small or mini.")],
    directory: Annotated[Path, typer.Argument(help="Where to write it.", parser=expanded, metavar="DIRECTORY")],
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
) -> None:
    """Write a small random checkpoint with its own tokenizer, for trying things out."""
    from vlarl_rllib.models.presets import presets, write_checkpoint

    if preset not in presets():
        raise SettingsError(f"PRESET: {preset!r} does not exist; choose from {', '.join(presets())}")
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise SettingsError(f"DIRECTORY: {directory} exists and is not empty; give a new directory")
    write_checkpoint(preset, directory, seed=seed)
    typer.echo(f"wrote {directory}")
