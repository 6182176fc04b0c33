"""Commands that train something, or make what it is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlarl_rllib.cli.app import app
from vlarl_rllib.cli.options import (
    LIBRARIES,
    PATH,
    PLACE,
    ConfigPath,
    NewRunDirectory,
    Overrides,
    Resume,
    ResumeCommand,
    ResumeWhen,
    continues,
    load_settings,
    preflight,
    remark,
    report_at_the_end,
)
from vlarl_rllib.process.console import saying_so
from vlarl_rllib.process.signals import END
from vlarl_rllib.settings import Settings, SettingsError


@app.command(cls=ResumeCommand)
def train(
    config: ConfigPath = None,
    overrides: Overrides = None,
    run_dir: Annotated[
        Any, typer.Option(help="Where the run goes, a directory or s3://...; default runs/<config>-<time>.", **PLACE)
    ] = None,
    resume: Resume = None,
    resume_from: Annotated[
        Any, typer.Option(help="Start a new run from this checkpoint; any number of learners.", **PLACE)
    ] = None,
) -> None:
    """Train a policy: one run through ray.tune.Tuner."""
    from vlarl_rllib.runs.continuation import check_resume, check_resume_from
    from vlarl_rllib.runs.directory import (
        check_unfinished,
        find_checkpoint,
        how_to_go_on,
        is_complete,
        new_run_directory,
        open_run_directory,
    )

    END.sigterm_code = 0  # a scheduler's way to end a run is no failure
    if goes_on := continues(resume, run_dir, config, overrides, resume_from):
        run = open_run_directory(goes_on)
        settings = Settings.from_yaml(config, overrides or []) if config else run.settings()
    else:
        settings, name = load_settings(config, overrides, "configs/libero_smoke_cpu.yaml")
        run = new_run_directory(run_dir, name, resume_from, again="iteration" if resume is ResumeWhen.AUTO else None)
    END.words = lambda: how_to_go_on(run)
    with saying_so("checks of the settings and the checkpoint"):
        checkpoint = run.newest_checkpoint() if goes_on else resume_from and find_checkpoint(resume_from)
        preflight(settings)
        if checkpoint is not None:
            (check_resume if goes_on else check_resume_from)(checkpoint, settings)
    if checkpoint is not None:
        if goes_on and resume is ResumeWhen.AUTO and is_complete(checkpoint, settings):
            typer.echo(f"{run.place} has all its {settings.run.iterations} iterations: nothing is left to do")
            raise typer.Exit(0)
        check_unfinished(checkpoint, settings)
    with run.claimed(settings):
        with saying_so(LIBRARIES):
            from vlarl_rllib.commands.train import run_training

        code = run_training(settings, run, resume_from=checkpoint)
        if run.read_rows():
            report_at_the_end(run.path)
            run.send()
    raise typer.Exit(code)


@app.command(cls=ResumeCommand)
def sft(
    config: ConfigPath = None,
    overrides: Overrides = None,
    run_dir: NewRunDirectory = None,
    resume: Resume = None,
) -> None:
    """Fine-tune a policy on demonstrations (RLDS); leaves a checkpoint that train and eval take."""
    from vlarl_rllib.runs.continuation import check_same
    from vlarl_rllib.runs.directory import (
        check_sft_unfinished,
        how_to_go_on,
        new_run_directory,
        open_run_directory,
        sft_is_complete,
    )
    from vlarl_rllib.runs.doubts import sft_doubts
    from vlarl_rllib.runs.preflight import check_sft

    if goes_on := continues(resume, run_dir, config, overrides, unit="step"):
        run = open_run_directory(goes_on, "step")
        settings = Settings.from_yaml(config, overrides or []) if config else run.settings()
        check_same(run.settings(), settings)
        if resume is ResumeWhen.AUTO and sft_is_complete(run, settings):
            typer.echo(f"{run.path} has all its {settings.sft.steps} steps: nothing is left to do")
            raise typer.Exit(0)
        check_sft_unfinished(run, settings)
    else:
        settings, name = load_settings(config, overrides, "configs/quickstart.yaml")
        run = new_run_directory(run_dir, name, None, again="step" if resume is ResumeWhen.AUTO else None)
    END.words = lambda: how_to_go_on(run, "step")
    with saying_so("checks of the settings and the data"):
        check_sft(settings)
        remark(sft_doubts(settings))
    with run.claimed(settings):
        with saying_so(LIBRARIES):
            from vlarl_rllib.commands.sft import run_sft

        code = run_sft(settings, run, resume=goes_on is not None)
    raise typer.Exit(code)


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
    from vlarl_rllib.runs.doubts import doubts, sft_doubts
    from vlarl_rllib.runs.preflight import check_quickstart

    settings, name = load_settings(config, overrides, "configs/quickstart.yaml")
    run = new_run_directory(run_dir, name, None)
    check_quickstart(settings, run.path)
    remark([*doubts(settings), *sft_doubts(settings)])

    from vlarl_rllib.commands.quickstart import run_quickstart

    code = run_quickstart(settings, run)
    if run.read_rows():
        report_at_the_end(run.path)
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
    settings, _ = load_settings(config, overrides, "configs/quickstart.yaml")
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
