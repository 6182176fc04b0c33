"""One run through ray.tune.Tuner: start Ray, train, end cleanly, leave a summary."""

from __future__ import annotations

import json
import shutil
import time
from functools import partial
from typing import Any

from ray import tune
from ray.exceptions import RayActorError
from rich.console import Console

from vlarl_rllib.algorithm import VLAPPO
from vlarl_rllib.config import VLAPPOConfig
from vlarl_rllib.envs.registry import eval_options
from vlarl_rllib.errors import FinalError, cause_of, one_line
from vlarl_rllib.observability.metrics import FAULTS, SECONDS
from vlarl_rllib.observability.table import LiveTable
from vlarl_rllib.observability.wandb_logger import wandb_logger
from vlarl_rllib.process.console import make_console, pasted, shown
from vlarl_rllib.process.lost_output import KEEP_TRYING_SECONDS, LOST, keep_trying
from vlarl_rllib.process.own_files import replace_file
from vlarl_rllib.process.signals import END
from vlarl_rllib.process.storage import Place
from vlarl_rllib.runs.checkpoints import CheckpointStore, number_of
from vlarl_rllib.runs.directory import ERROR_FILE, RowLog, RunDirectory, how_to_go_on
from vlarl_rllib.runs.pulse import FROZEN_SECONDS, TrialWatch
from vlarl_rllib.runs.ray_session import ray_session
from vlarl_rllib.runs.tune_output import fit, loggers
from vlarl_rllib.runs.versions import installed_versions
from vlarl_rllib.settings import Settings, SettingsError, calculate_runtime_args

HURRY_SECONDS = 5.0
"""Of trying to write the summary where a signal has asked for the end."""


class StopAfter(tune.Stopper):
    """Ends the trial after so many iterations, or after the running one when a signal has come; at once where the watch
    has given it up."""

    def __init__(self, iterations: int, watch: TrialWatch) -> None:
        self.iterations, self._watch = iterations, watch

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return END.signal is not None or result["training_iteration"] >= self.iterations

    def stop_all(self) -> bool:
        return self._watch.abandoned

    def __getstate__(self) -> dict[str, Any]:
        """See `DriverCallback.__getstate__`."""
        return {}


def run_training(settings: Settings, run: RunDirectory, resume_from: Place | None) -> int:
    """Train and write `summary.json`; the process's exit code.

    0 = done or ended by SIGTERM, 130 = ended by Ctrl-C (both can be resumed), 1 = failed.
    """
    if run.storage and settings.run.wandb:
        raise SettingsError("run.wandb: W&B keeps files in the run's directory; give a --run-dir that is no URI")
    console = make_console()
    began = time.time()
    log = RowLog(run)
    earlier_seconds = sum(sum(row["seconds"].values()) for row in log.rows)
    origin = CheckpointStore.resolve(resume_from).absolute() if resume_from else None
    plan = calculate_runtime_args(settings)
    console.print(
        f"run directory {shown(run.place)}: {plan.num_slots} slots, {settings.engines.num} engine(s), "
        f"{settings.learners.num} learner(s)"
    )

    def keep(seconds: float = 0.0) -> OSError | None:
        """Write the rows that are not written yet, and the summary; what went wrong for so long, or None."""
        return keep_trying(
            lambda: _write(run, log, summarize(settings, log.rows, earlier_seconds + time.time() - began)), seconds
        )

    def keep_at_least(cause: str) -> None:
        run.write_error(cause)
        keep()

    END.limit_seconds, END.words, END.sigterm_code = settings.run.stop_seconds, partial(how_to_go_on, run), 0
    END.on_loss = keep_at_least
    with (
        ray_session(plan, settings, run.place, {"--resume-from": origin}),
        END.polled(partial(_notice, console, settings)),
    ):
        error, abandoned = _fit_through_failures(_config(settings, run, log, origin), settings, run, log, console)
        # All is written and said before Ray ends, which takes seconds: `ray job stop` grants three.
        unwritten = keep(HURRY_SECONDS if END.signal else KEEP_TRYING_SECONDS)
        if lost := _lost_output(log.rows):
            console.print(f"{lost} write(s) of output and reports failed, and training went on without", style="yellow")
        if error is not None:
            return _finish_failed(run, error, console)
        if unwritten is not None:
            console.print(
                f"summary.json and the last rows could not be written ({unwritten}); make room. {how_to_go_on(run)}",
                style="red",
            )
            return 1
        return _finish(settings, run, log, abandoned, console)


def _config(settings: Settings, run: RunDirectory, log: RowLog, origin: Place | None) -> VLAPPOConfig:
    """Of the run's first trial."""
    config = VLAPPOConfig.from_settings(settings, str(run.place))
    config.restore_from = str(origin) if origin else None
    if log.rows:
        config.faults, config.policy_version = log.rows[-1]["faults"], log.rows[-1]["policy_version"]
    return config


def _write(run: RunDirectory, log: RowLog, summary: dict[str, Any]) -> None:
    log.write()
    replace_file(run.path / "summary.json", json.dumps(summary, indent=2) + "\n")
    run.send()


def _notice(console: Console, settings: Settings, name: str) -> None:
    """What a signal is answered with."""
    console.print(
        f"{name}: ending within {settings.run.stop_seconds:g} s, with a checkpoint of the last iteration; once "
        "more to end at once"
    )


def _fit_through_failures(
    config: VLAPPOConfig, settings: Settings, run: RunDirectory, log: RowLog, console: Console
) -> tuple[Exception | None, bool]:
    """Start the trial anew from its newest checkpoint when it fails; what `_fit` returned in the end.

    A failure before the first iteration of this process is a mistake in the set-up rather than a fault, and final; so
    is a `FinalError`, which would come again.
    """
    table = LiveTable(settings.run.iterations, console, log.add)
    furthest, fruitless = 0, 0
    while True:
        known = len(log.rows), log.rows[-1:]
        error, abandoned = _fit(config, settings, run, table, console)
        if error is None or END.signal is not None:
            return error, abandoned
        if (furthest == 0 and (len(log.rows), log.rows[-1:]) == known) or isinstance(cause_of(error), FinalError):
            return error, False
        iteration = log.rows[-1]["iteration"]
        fruitless = 1 if iteration > furthest else fruitless + 1
        furthest = max(furthest, iteration)
        if fruitless > settings.run.max_restarts:
            return error, False
        config = config.copy(copy_frozen=False)
        config.faults = log.rows[-1]["faults"] | {"trial_restarts": log.rows[-1]["faults"]["trial_restarts"] + 1}
        config.policy_version = log.rows[-1]["policy_version"]
        run.write_error(str(error))
        console.print(
            f"the trial failed after iteration {iteration}: {one_line(error)}; it starts anew from its newest "
            "checkpoint",
            style="yellow",
        )


def _fit(
    config: VLAPPOConfig, settings: Settings, run: RunDirectory, table: LiveTable, console: Console
) -> tuple[Exception | None, bool]:
    """Run the one trial; what it failed with, or None, and whether it was killed because the run is to end."""
    watch = TrialWatch(str(run.place), calculate_runtime_args(settings), partial(console.print, style="dim"))
    callbacks: list[Any] = [table, watch, *loggers()]
    if settings.run.wandb:
        callbacks.append(wandb_logger(settings.run.wandb))
    for outdated in run.path.glob("trial_*/checkpoint_*"):  # pointers of trials before this one, to what may be gone
        shutil.rmtree(outdated, ignore_errors=True)
    tuner = tune.Tuner(
        VLAPPO,
        param_space=config,
        tune_config=tune.TuneConfig(trial_dirname_creator=_trial_dirname),
        run_config=tune.RunConfig(
            name=run.place.name,
            storage_path=str(run.place.parent),
            stop=StopAfter(settings.run.iterations, watch),
            checkpoint_config=tune.CheckpointConfig(
                # of our pointers; Tune holds the whole result of each one it keeps
                num_to_keep=settings.run.keep_checkpoints,
                checkpoint_frequency=settings.run.checkpoint_every,
                checkpoint_at_end=True,
            ),
            failure_config=tune.FailureConfig(
                max_failures=0
            ),  # `_fit_through_failures` asks for progress between restarts
            callbacks=callbacks,
            verbose=0,
        ),
    )
    errors = fit(tuner)
    if watch.abandoned or watch.is_complete:
        return None, watch.abandoned
    if END.signal is not None and any(
        isinstance(error, RayActorError) for error in errors
    ):  # sent to all processes at once
        return None, True
    if watch.is_frozen:
        errors = [RuntimeError(f"the trial's process gave no sign of life for {FROZEN_SECONDS:g} s, and was killed")]
    return errors[0] if errors else None, False


def _trial_dirname(trial: Any) -> str:
    return f"trial_{time.strftime('%Y%m%d-%H%M%S')}"


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
        "snapshot_bytes": last.get("snapshot_bytes", 0),
        "weights_transport": last.get("weights_transport"),
        "logprob_gap": {"mean": sum(gaps) / len(gaps), "max": max(row["logprob_gap_max"] for row in rows)}
        if rows
        else None,
        "engine": "vllm" if settings.engines.num else "torch",
        "device": {
            "engines": "cuda" if settings.engines.gpus else "cpu",
            "learners": "cuda" if settings.learners.gpus else "cpu",
        },
        "versions": installed_versions(),
        "faults": {
            **(last["faults"] if last else dict.fromkeys(FAULTS, 0)),
            "skipped_updates": int(sum(row["skipped_updates"] for row in rows)),
            "lost_output": _lost_output(rows),
        },
    }


def _lost_output(rows: list[dict[str, Any]]) -> int:
    """The trials', which is in the rows, and this process's."""
    return LOST.count + (rows[-1]["faults"]["lost_output"] if rows else 0)


def _finish_failed(run: RunDirectory, error: Exception, console: Console) -> int:
    run.write_error(str(error))
    console.print(f"the run failed: {one_line(error)} (whole traceback in {shown(run.path)}/{ERROR_FILE})", style="red")
    console.print(how_to_go_on(run))
    return 1


def _finish(settings: Settings, run: RunDirectory, log: RowLog, abandoned: bool, console: Console) -> int:
    """What is said behind a run that has not failed, and the exit code; 1 where the last iteration's checkpoint could
    not be written."""
    newest, last = run.checkpoints().newest(contents=False), log.rows[-1] if log.rows else None
    kept, done = number_of(newest) if newest else 0, last["iteration"] if last else 0
    if kept < done and not abandoned:
        console.print(
            f"iteration {done} has no checkpoint (writing it failed), the newest is of iteration {kept}; make "
            f"room. {how_to_go_on(run)}",
            style="red",
        )
        return 1
    if END.signal is None:
        console.print(f"done: {shown(run.place / 'summary.json')}")
        return 0
    if kept < done:
        lost = f"iteration {done} has" if kept + 1 == done else f"iterations {kept + 1} to {done} have"
        console.print(f"{lost} no checkpoint: a resumed run plays them again", style="yellow")
    if last is None or kept < settings.run.iterations:
        console.print(f"stopped{f' with a checkpoint of iteration {kept}' if newest else ''}; {how_to_go_on(run)}")
    else:
        dropped = calculate_runtime_args(settings).evaluation_episodes and not last["evaluation"]
        where = eval_options(settings.env.name, settings.env.suite)
        missing = f"; its evaluation was dropped: vlarl eval {pasted(run.place)} {where}" if dropped else ""
        console.print(f"stopped behind the last iteration{missing}")
        return 0 if END.is_warned else END.code  # nothing is left that the same command would do
    return END.code
