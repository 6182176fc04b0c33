"""One run through ray.tune.Tuner: start Ray, train, end cleanly, leave a summary."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # ours ends with a checkpoint, Tune's without one
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's own tables, even with verbose=0
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths in a config mean what they meant at the command line

from ray import tune
from rich.console import Console

from vlarl_rllib.algorithm import VLAPPO
from vlarl_rllib.checkpoints import CheckpointStore, write_atomically
from vlarl_rllib.config import VLAPPOConfig
from vlarl_rllib.errors import one_line
from vlarl_rllib.observability.metrics import FAULTS, SECONDS
from vlarl_rllib.observability.table import LiveTable
from vlarl_rllib.ray_session import ray_session
from vlarl_rllib.run_directory import RowLog, RunDirectory, installed_versions
from vlarl_rllib.settings import Settings, calculate_runtime_args

logger = logging.getLogger(__name__)
logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a failure is reported once, by `_finish`


class StopAfter(tune.Stopper):
    """Ends the trial after so many iterations, or after the running one when asked to."""

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations
        self.requested: int | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self.requested is not None or result["training_iteration"] >= self.iterations

    def stop_all(self) -> bool:
        return False


def run_training(settings: Settings, run: RunDirectory, resume_from: Path | None) -> int:
    """Train and write `summary.json`; the process's exit code.

    0 = done or ended by SIGTERM, 130 = ended by Ctrl-C (both with a checkpoint), 1 = failed.
    """
    console = Console(highlight=False, soft_wrap=True)
    began = time.time()
    log = RowLog(run)
    earlier_seconds = sum(sum(row["seconds"].values()) for row in log.rows)
    config = VLAPPOConfig.from_settings(settings, run.path)
    config.restore_from = str(CheckpointStore.resolve(resume_from).absolute()) if resume_from else None
    if log.rows:
        config.faults, config.policy_version = log.rows[-1]["faults"], log.rows[-1]["policy_version"]
    stopper = StopAfter(settings.run.iterations)
    plan = calculate_runtime_args(settings)
    console.print(
        f"run directory {os.path.relpath(run.path)}: {plan.num_slots} slots, {settings.engines.num} engine(s), {settings.learners.num} learner(s)"
    )
    # ray.init() installs a handler of its own, which aborts on SIGTERM; so ours come after it.
    with ray_session(plan, settings), _signals(stopper, log, console):
        error = _fit_through_failures(config, settings, run, stopper, log, console)
    summary = summarize(settings, log.rows, earlier_seconds + time.time() - began)
    write_atomically(run.path / "summary.json", json.dumps(summary, indent=2) + "\n")
    return _finish(run, stopper, error, console)


def _fit_through_failures(
    config: VLAPPOConfig, settings: Settings, run: RunDirectory, stopper: StopAfter, log: RowLog, console: Console
) -> Exception | None:
    """Start the trial anew from its newest checkpoint when it fails; the error that ended it for good, or None.

    A failure before the first iteration of this process is a mistake in the set-up rather than a fault, and final.
    """
    table = LiveTable(settings.run.iterations, console, log.add)
    furthest, fruitless = 0, 0
    while True:
        known = len(log.rows), log.rows[-1:]
        error = _fit(config, settings, run, stopper, table)
        if error is None or stopper.requested is not None:
            return error
        if furthest == 0 and (len(log.rows), log.rows[-1:]) == known:
            return error
        iteration = log.rows[-1]["iteration"]
        fruitless = 1 if iteration > furthest else fruitless + 1
        furthest = max(furthest, iteration)
        if fruitless > settings.run.max_restarts:
            return error
        config = config.copy(copy_frozen=False)
        config.faults = log.rows[-1]["faults"] | {"trial_restarts": log.rows[-1]["faults"]["trial_restarts"] + 1}
        config.policy_version = log.rows[-1]["policy_version"]
        (run.path / "error.txt").write_text(str(error))
        console.print(f"the trial failed after iteration {iteration}: {one_line(error)}; it starts anew from its newest checkpoint", style="yellow")


def _fit(config: VLAPPOConfig, settings: Settings, run: RunDirectory, stopper: StopAfter, table: LiveTable) -> Exception | None:
    """Run the one trial; what it failed with, or None."""
    callbacks: list[Any] = [table]
    if settings.run.wandb:
        from ray.air.integrations.wandb import WandbLoggerCallback

        callbacks.append(WandbLoggerCallback(project=settings.run.wandb, log_config=False))
    tuner = tune.Tuner(
        VLAPPO,
        param_space=config,
        tune_config=tune.TuneConfig(trial_dirname_creator=_trial_dirname),
        run_config=tune.RunConfig(
            name=run.path.name,
            storage_path=str(run.path.parent),
            stop=stopper,
            checkpoint_config=tune.CheckpointConfig(
                num_to_keep=settings.run.keep_checkpoints,  # of our pointers; Tune holds the whole result of each one it keeps
                checkpoint_frequency=settings.run.checkpoint_every,
                checkpoint_at_end=True,
            ),
            failure_config=tune.FailureConfig(max_failures=0),  # `_fit_through_failures` asks for progress between restarts
            callbacks=callbacks,
            verbose=0,
        ),
    )
    return tuner.fit()[0].error


def _trial_dirname(trial: Any) -> str:
    return f"trial_{time.strftime('%Y%m%d-%H%M%S')}"


@contextmanager
def _signals(stopper: StopAfter, log: RowLog, console: Console) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the run after its iteration with a checkpoint; before the first iteration, and the second time, at once."""

    def handle(number: int, frame: Any) -> None:
        if stopper.requested is not None or not log.rows:
            raise KeyboardInterrupt
        stopper.requested = number
        console.print(f"{signal.Signals(number).name}: ending after this iteration with a checkpoint; once more to end at once")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def summarize(settings: Settings, rows: list[dict[str, Any]], wall_seconds: float) -> dict[str, Any]:
    """`summary.json`: sums and ends over all iterations of the run."""
    last = rows[-1] if rows else {}
    evaluations = [row[key]["success_rate"] for row in rows for key in ("initial_evaluation", "evaluation") if row[key]]
    gaps = [row["logprob_gap_mean"] for row in rows]
    initial, final = (evaluations[0], evaluations[-1]) if len(evaluations) > 1 else (None, None)
    return {
        "iterations": len(rows),
        "env_steps": last.get("env_steps", 0),
        "episodes": sum(row["episodes"] for row in rows),
        "success_rate_initial": initial,
        "success_rate_final": final,
        "wall_seconds": wall_seconds,
        "seconds": {name: sum(row["seconds"][name] for row in rows) for name in SECONDS},
        "policy_version": last.get("policy_version", 0),
        "sync_bytes": last.get("sync_bytes", 0),
        "logprob_gap": {"mean": sum(gaps) / len(gaps), "max": max(row["logprob_gap_max"] for row in rows)} if rows else None,
        "engine": "vllm" if settings.engines.num else "huggingface",
        "device": {"engines": "cuda" if settings.engines.gpus else "cpu", "learners": "cuda" if settings.learners.gpus else "cpu"},
        "versions": installed_versions(),
        "faults": {
            **(last["faults"] if last else dict.fromkeys(FAULTS, 0)),
            "skipped_updates": int(sum(row["skipped_updates"] for row in rows)),
        },
    }


def _finish(run: RunDirectory, stopper: StopAfter, error: Exception | None, console: Console) -> int:
    where = os.path.relpath(run.path)
    if error is not None:
        (run.path / "error.txt").write_text(str(error))
        console.print(f"the run failed: {one_line(error)} (whole traceback in {where}/error.txt)", style="red")
        return 1
    if behind := _checkpoint_is_behind(run):
        console.print(behind, style="red")
        return 1
    if stopper.requested is not None:
        console.print(f"stopped with a checkpoint; continue with: vlarl train --resume --run-dir {where}")
        return 130 if stopper.requested == signal.SIGINT else 0
    console.print(f"done: {where}/summary.json")
    return 0


def _checkpoint_is_behind(run: RunDirectory) -> str | None:
    """Says so where the last iteration has no checkpoint, because writing it failed."""
    rows, newest = run.read_rows(), run.newest_checkpoint()
    last = rows[-1]["iteration"] if rows else 0
    kept = CheckpointStore.read_facts(newest)["iteration"] if newest else 0
    if kept >= last:
        return None
    return f"iteration {last} has no checkpoint (writing it failed), the newest is of iteration {kept}; make room and run vlarl train --resume again"
