"""`vlarl sft`: supervised fine-tuning on demonstrations, through the learners of PPO. It leaves a checkpoint that `train` and `eval` take.

RUN/config.yaml      the resolved settings
    metrics.jsonl    a line every `sft.report_every` steps
    model/           the fine-tuned checkpoint, with the data's action statistics
    summary.json     written at the end
"""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlarl_rllib.checkpoints import write_atomically
from vlarl_rllib.config import VLAPPOConfig
from vlarl_rllib.data.rlds import fingerprint, read_statistics
from vlarl_rllib.errors import one_line
from vlarl_rllib.export import write_model
from vlarl_rllib.learner.learner_group import LearnerError, LearnerGroupError, VLALearnerGroup
from vlarl_rllib.run_directory import RunDirectory, installed_versions
from vlarl_rllib.settings import Settings, calculate_runtime_args
from vlarl_rllib.training import ray_session
from vlarl_rllib.types import NUM_ACTION_BINS, NUM_ACTION_TOKENS
from vlarl_rllib.weights import make_reader

MODEL_DIRECTORY = "model"
SECONDS_PER_CALL = 5.0
"""About so long learners learn between two looks at what the driver wants."""


class Interrupted:
    """Whether a signal asked for the end; the second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


def run_sft(settings: Settings, run: RunDirectory) -> int:
    """Fine-tune and write `model/`; the process's exit code: 0 = done, 130 = ended early by Ctrl-C, with the model as it was then, 1 = failed."""
    console = Console(highlight=False, soft_wrap=True)
    try:
        return _run(settings, run, console)
    except (LearnerError, LearnerGroupError) as error:
        (run.path / "error.txt").write_text(traceback.format_exc())
        console.print(f"fine-tuning failed: {one_line(error)} (whole traceback in {os.path.relpath(run.path)}/error.txt)", style="red")
        return 1


def _run(settings: Settings, run: RunDirectory, console: Console) -> int:
    began = time.time()
    name, statistics = read_statistics(settings.sft.data or "")
    what = f"{statistics['num_transitions']:,} demonstrated steps of {name}"
    console.print(f"run directory {os.path.relpath(run.path)}: {what}, {settings.learners.num} learner(s)")
    interrupted = Interrupted()
    with _learners(settings) as group, _on_signals(interrupted):
        num_steps = sum(group.call("open_data"))
        rows = _fit(group, settings, run.path / "metrics.jsonl", console, interrupted)
        manifest = group.publish_weights(1)
        tensors = {name: tensor for bucket in make_reader(manifest.transport).buckets(manifest) for name, tensor in bucket.items()}
        model = run.path / MODEL_DIRECTORY
        write_model(tensors, group.config.settings().model.path, model, settings.engines.dtype, {name: statistics})
    summary = {
        "steps": rows[-1]["step"] if rows else 0,
        "demonstrated_steps": num_steps,
        "data": fingerprint(settings.sft.data or ""),
        "unnorm_key": name,
        "last": rows[-1] if rows else None,
        "wall_seconds": time.time() - began,
        "versions": installed_versions(),
    }
    write_atomically(run.path / "summary.json", json.dumps(summary, indent=2) + "\n")
    where = os.path.relpath(model)
    console.print(f"wrote {where}; use it with --set model.path={where} --set model.unnorm_key={name}, or vlarl eval {where} --unnorm-key {name}")
    return 0 if interrupted.signal is None else 128 + interrupted.signal


def _fit(group: VLALearnerGroup, settings: Settings, log: Path, console: Console, interrupted: Interrupted) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    total, every = settings.sft.steps, settings.sft.report_every
    columns = (TextColumn("steps"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress, log.open("w") as file:
        bar = progress.add_task("", total=total, shown="")
        while (done := rows[-1]["step"] if rows else 0) < total and interrupted.signal is None:
            began, chunk = time.perf_counter(), min(every, total - done)
            metrics, chunk = _supervise(group, chunk, interrupted)
            rate = chunk * settings.sft.batch_size / (time.perf_counter() - began)
            rows.append({"step": done + chunk, **metrics, "samples_per_second": rate})
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
            accuracy = f"token accuracy {100 * metrics['token_accuracy']:.1f} %"
            shown = f"loss {metrics['loss']:.3f}  {accuracy}  L1 {metrics['l1']:.3f}  {rate:.0f} samples/s"
            progress.update(bar, completed=done + chunk, shown=shown)
            console.print(f"step {done + chunk:>6}/{total}  {shown}")
    return rows


def _supervise(group: VLALearnerGroup, num_steps: int, interrupted: Interrupted) -> tuple[dict[str, float], int]:
    """Means over that many steps, or fewer after a signal, and how many; in calls of seconds, each far within `learners.timeout_seconds`."""
    sums: dict[str, float] = {}
    done, piece = 0, 1
    while done < num_steps and (done == 0 or interrupted.signal is None):
        began = time.perf_counter()
        metrics = group.call("supervise", piece)[0]
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value * (1 if name == "skipped" else piece)
        done += piece
        piece = min(num_steps - done, max(1, int(piece * SECONDS_PER_CALL / (time.perf_counter() - began))))
    return {name: total if name == "skipped" else total / done for name, total in sums.items()}, done


@contextmanager
def _learners(settings: Settings) -> Iterator[VLALearnerGroup]:
    """The learners alone, in a Ray of their own or the cluster's; or in this process for `learners.num: 0`."""
    from vlarl_rllib.learner.supervised import SupervisedLearner

    settings = settings.model_copy(update={"model": settings.model.model_copy(update={"critic": "shared_head", "critic_path": None})})
    config = VLAPPOConfig.from_settings(settings)
    config.learners(learner_class=SupervisedLearner)
    config.validate()
    learners = settings.learners
    bundle = {"CPU": learners.cpus, "GPU": learners.gpus}
    plan = replace(
        calculate_runtime_args(settings),
        bundles=(bundle,) * learners.num,
        total_cpus=learners.num * learners.cpus,
        total_gpus=learners.num * learners.gpus,
    )
    spaces = (gym.spaces.Box(0, 255, (1, 1, 3), np.uint8), gym.spaces.MultiDiscrete([NUM_ACTION_BINS] * NUM_ACTION_TOKENS))
    with ray_session(plan, settings):
        group: VLALearnerGroup = config.build_learner_group(spaces={"__env__": spaces, "__env_single__": spaces, "default_policy": spaces})
        try:
            yield group
        finally:
            group.shutdown()


@contextmanager
def _on_signals(interrupted: Interrupted) -> Iterator[None]:
    before = {number: signal.signal(number, interrupted) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
