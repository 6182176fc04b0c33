"""The `vlarl` command. Its commands import Ray and torch, so that `--help` and a mistake are answered at once."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from vlarl_rllib.envs.registry import DEFAULT_ENVIRONMENT
from vlarl_rllib.process.command_line import Commands, run
from vlarl_rllib.process.console import pasted
from vlarl_rllib.process.signals import END
from vlarl_rllib.settings import Settings, SettingsError

app = typer.Typer(
    cls=Commands,
    name="vlarl",
    help="PPO fine-tuning of vision-language-action models with RLlib, vLLM and FSDP.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _expanded(text: str) -> Path:
    """A path from the command line; shells leave `--run-dir=~/x` as it is."""
    if not text:
        raise SettingsError("an empty path; give one (a variable of the shell may not be set)")
    return Path(os.path.expanduser(text))


PATH: dict[str, Any] = {"parser": _expanded, "metavar": "PATH"}
ConfigPath = Annotated[
    Path | None,
    typer.Argument(
        help="YAML file, such as configs/libero_smoke_cpu.yaml.", show_default=False, parser=_expanded, metavar="CONFIG"
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


@app.command()
def train(
    config: ConfigPath = None,
    overrides: Overrides = None,
    run_dir: NewRunDirectory = None,
    resume: Resume = False,
    resume_from: Annotated[
        Path | None, typer.Option(help="Start a new run from this checkpoint; any number of learners.", **PATH)
    ] = None,
) -> None:
    """Train a policy: one run through ray.tune.Tuner."""
    from vlarl_rllib.runs.continuation import check_resume, check_resume_from
    from vlarl_rllib.runs.directory import (
        check_unfinished,
        find_checkpoint,
        how_to_go_on,
        new_run_directory,
        open_run_directory,
    )

    END.sigterm_code = 0  # a scheduler's way to end a run is no failure
    if resume:
        if run_dir is None or config is not None or resume_from is not None or overrides:
            raise SettingsError(
                "--resume: needs --run-dir, and takes no CONFIG, --set or --resume-from (a changed config is a "
                "new run: use --resume-from)"
            )
        run = open_run_directory(run_dir)
        settings = run.settings()
    else:
        settings, name = _load(config, overrides, "configs/libero_smoke_cpu.yaml")
        run = new_run_directory(run_dir, name, resume_from)
    END.words = lambda: how_to_go_on(run)
    checkpoint = run.newest_checkpoint() if resume else resume_from and find_checkpoint(resume_from)
    _preflight(settings)
    if checkpoint is not None:
        (check_resume if resume else check_resume_from)(checkpoint, settings)
        check_unfinished(checkpoint, settings)
    with run.claimed(settings):
        from vlarl_rllib.commands.train import run_training

        code = run_training(settings, run, resume_from=checkpoint)
        if run.read_rows():
            _report(run.path)
    raise typer.Exit(code)


@app.command()
def sft(
    config: ConfigPath = None,
    overrides: Overrides = None,
    run_dir: NewRunDirectory = None,
    resume: Resume = False,
) -> None:
    """Fine-tune a policy on demonstrations (RLDS); leaves a checkpoint that train and eval take."""
    from vlarl_rllib.runs.directory import check_sft_unfinished, how_to_go_on, new_run_directory, open_run_directory
    from vlarl_rllib.runs.preflight import check_sft, sft_doubts

    if resume:
        if run_dir is None or config is not None or overrides:
            raise SettingsError(
                "--resume: needs --run-dir, and takes no CONFIG or --set (a changed config is a new run)"
            )
        run = open_run_directory(run_dir, "step")
        settings = run.settings()
        check_sft_unfinished(run, settings)
    else:
        settings, name = _load(config, overrides, "configs/quickstart.yaml")
        run = new_run_directory(run_dir, name, None)
    END.words = lambda: how_to_go_on(run, "step")
    check_sft(settings)
    _remark(sft_doubts(settings))
    with run.claimed(settings):
        from vlarl_rllib.commands.sft import run_sft

        code = run_sft(settings, run, resume=resume)
    raise typer.Exit(code)


@app.command()
def doctor(config: ConfigPath = None, overrides: Overrides = None) -> None:
    """Check this machine and, with CONFIG, print the plan of a run."""
    settings = Settings.from_yaml(config, overrides or []) if config else None

    from vlarl_rllib.commands.doctor import report

    raise typer.Exit(0 if report(settings) else 1)


@app.command(name="make-checkpoint")
def make_checkpoint(
    preset: Annotated[str, typer.Argument(help="tiny, small or mini.")],
    directory: Annotated[Path, typer.Argument(help="Where to write it.", parser=_expanded, metavar="DIRECTORY")],
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


@app.command()
def quickstart(
    config: ConfigPath = None,
    overrides: Overrides = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where everything goes; default runs/<config>-<time>.", **PATH)
    ] = None,
) -> None:
    """Collect demonstrations, fine-tune on them and improve the policy with PPO, one after the other."""
    from vlarl_rllib.runs.directory import new_run_directory
    from vlarl_rllib.runs.preflight import check_quickstart, doubts, sft_doubts

    settings, name = _load(config, overrides, "configs/quickstart.yaml")
    run = new_run_directory(run_dir, name, None)
    check_quickstart(settings, run.path)
    _remark([*doubts(settings), *sft_doubts(settings)])

    from vlarl_rllib.commands.quickstart import run_quickstart

    code = run_quickstart(settings, run)
    if run.read_rows():
        _report(run.path)
    raise typer.Exit(code)


@app.command()
def collect(
    config: ConfigPath = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="The data set goes into OUT/<environment>/1.0.0.", show_default=False, **PATH)
    ] = None,
) -> None:
    """Have a scripted expert play, and keep what succeeds as an RLDS data set (env, collect)."""
    settings, _ = _load(config, overrides, "configs/quickstart.yaml")
    if out is None:
        raise SettingsError("--out: missing; give a directory for the data set")
    from vlarl_rllib.runs.preflight import check_collect

    check_collect(settings, out)

    from vlarl_rllib.commands.collect import run_collect

    raise typer.Exit(run_collect(settings, out))


@app.command(name="reward-model")
def reward_model(
    data: Annotated[Path, typer.Option(help="RLDS data set of successful demonstrations.", **PATH)],
    out: Annotated[Path, typer.Option(help="A new directory, for rewards.judge.", **PATH)],
    split: Annotated[str, typer.Option(help="TFDS split of the data, also a part such as train[:95%].")] = "train",
    image_size: Annotated[int, typer.Option(help="Side that frames are brought to, in pixels.")] = 56,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 400,
    batch_size: Annotated[int, typer.Option(help="Frames per optimiser step.")] = 64,
    lr: Annotated[float, typer.Option(help="AdamW learning rate.")] = 2e-3,
    near: Annotated[int, typer.Option(help="Last frames of each episode that count as solved.")] = 2,
    held_out: Annotated[float, typer.Option(help="Share of the episodes that measure and do not train.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of weights, batches and the choice of held-out episodes.")] = 0,
) -> None:
    """Train a classifier that tells solved frames from others: the learned process reward."""
    from vlarl_rllib.commands.reward_model import run_reward_model

    raise typer.Exit(run_reward_model(data, out, split, image_size, steps, batch_size, lr, near, held_out, seed))


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
            parser=_expanded,
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new directory.", parser=_expanded)],
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
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Directories of runs.", parser=_expanded)],
) -> None:
    """Write curves.png and report.html of runs, and print one line for each."""
    from vlarl_rllib.commands.report import compare, write_report
    from vlarl_rllib.process.console import make_console

    written = [write_report(run) for run in runs]
    make_console().print(compare(runs))
    for file in written:
        typer.echo(f"wrote {os.path.relpath(file)}")


def _report(run: Path) -> None:
    """At a run's end; a picture that cannot be drawn is no reason to fail."""
    from vlarl_rllib.commands.report import write_report

    END.words = lambda: f"no report; write it with: vlarl report {pasted(run)}"
    try:
        typer.echo(f"report: {os.path.relpath(write_report(run))}")
    except (SettingsError, ImportError, OSError) as error:
        typer.echo(f"no report: {error}", err=True)


def _load(config: Path | None, overrides: list[str] | None, example: str) -> tuple[Settings, str]:
    """The settings, and what to call a run of them. Raises `SettingsError`."""
    if config is None:
        raise SettingsError(f"CONFIG: missing; give a YAML file, for example {example}")
    return Settings.from_yaml(config, overrides or []), config.stem


def _preflight(settings: Settings) -> None:
    from vlarl_rllib.runs.preflight import check, doubts

    check(settings)
    _remark(doubts(settings))


def _remark(doubts: list[str]) -> None:
    for doubt in doubts:
        typer.echo(f"note: {doubt}", err=True)


def main() -> None:
    """Entry point."""
    run(app)
