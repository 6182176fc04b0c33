"""An experiment of many runs through ray.tune.Tuner: start Ray, train, rank, name the best checkpoint."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from ray import tune
from rich.console import Console
from rich.table import Table

from vlarl_rllib.algorithm import VLAPPO
from vlarl_rllib.commands.train import summarize
from vlarl_rllib.config import resolved
from vlarl_rllib.errors import FinalError, cause_of, one_line
from vlarl_rllib.observability.experiment_table import (
    ExperimentTable,
    directory_name,
    label_of,
    short,
)
from vlarl_rllib.observability.wandb_logger import wandb_logger
from vlarl_rllib.process.console import make_console, pasted
from vlarl_rllib.process.lost_output import LOST
from vlarl_rllib.process.own_files import replace_file
from vlarl_rllib.process.signals import END
from vlarl_rllib.rllib_compat import give_up, restored_tuner, tolerant_tune, trial_path
from vlarl_rllib.runs.checkpoints import CheckpointStore, local
from vlarl_rllib.runs.directory import RunDirectory
from vlarl_rllib.runs.experiment_watch import ExperimentWatch
from vlarl_rllib.runs.experiments import EXPERIMENT_FILE
from vlarl_rllib.runs.ranking import Outcome, Ranked, rank
from vlarl_rllib.runs.ray_session import ray_session
from vlarl_rllib.runs.sealing import DamagedCheckpointError
from vlarl_rllib.runs.tune_objects import ITERATION, MODE, param_space, scheduler, searcher, tuned_metric
from vlarl_rllib.runs.tune_output import loggers
from vlarl_rllib.settings import RuntimeArgs, SettingsError, calculate_runtime_args
from vlarl_rllib.settings.experiment import Experiment
from vlarl_rllib.settings.overrides import dotted

RANKING_FILE, TABLE_FILE = "ranking.json", "ranking.csv"

DONORS_MARGIN = 3
"""Checkpoints of a trial under population based training, beside those of the interval that it may be ahead of another
one that is about to go on from an older one."""


def run_experiment(experiment: Experiment, directory: Path, *, restore: bool = False) -> int:
    """Play all trials and write the ranking; the process's exit code.

    0 = done, or ended by SIGTERM, 130 = ended by Ctrl-C (both can be restored), 1 = a trial failed.

    Args:
        directory: of the experiment; each trial gets a run's directory in it.
        restore: go on with what an earlier process has left there.
    """
    console = make_console()
    settings = experiment.base
    console.print(
        f"experiment {os.path.relpath(directory)}: {experiment.num_trials} trial(s) of {settings.run.iterations} "
        f"iterations, best by {experiment.metric}"
    )
    END.limit_seconds, END.words, END.sigterm_code = settings.run.stop_seconds, partial(how_to_restore, directory), 0
    with (
        ray_session(plan_of_all(experiment), settings, directory),
        END.polled(partial(_notice, console, settings.run.stop_seconds)),
    ):
        if not restore:
            replace_file(directory / EXPERIMENT_FILE, yaml.safe_dump(experiment.to_dict(), sort_keys=False))
        results, watch = _fit(experiment, directory, console, restore)
        outcomes = [_outcome(experiment, result) for result in results]
        ranked = rank(outcomes)
        _write(experiment, directory, ranked)
        if watch.interrupted.is_set():
            console.print(f"stopped; {how_to_restore(directory)}")
            return END.code
        _tell(experiment, directory, ranked, console)
        return int(any(outcome.state == "failed" for outcome in outcomes))


def how_to_restore(directory: Path) -> str:
    """The command that goes on with an experiment."""
    return f"go on with: vlarl tune --restore --run-dir {pasted(directory)}"


def plan_of_all(experiment: Experiment) -> RuntimeArgs:
    """The resources of as many trials as are to run at once, each as large as the largest; of one, where the cluster
    says how many."""
    plans = map(calculate_runtime_args, experiment.combinations())
    plan = max(plans, key=lambda plan: (plan.total_gpus, plan.total_cpus))
    at_once = min(experiment.concurrent or 1, experiment.num_trials)
    if at_once == 1:
        return plan
    return replace(plan, bundles=plan.bundles * at_once, strategy=None)  # each trial has a group of its own


def make_tuner(experiment: Experiment, directory: Path, callbacks: Sequence[Any] = ()) -> tune.Tuner:
    """The experiment as `ray.tune.Tuner`: `make_tuner(experiment, Path("runs/mine").resolve()).fit()`.

    Args:
        directory: absolute; where results go.
        callbacks: of Tune.
    """
    spec, run = experiment.spec, experiment.base.run
    keep = run.keep_checkpoints
    if pbt := spec.scheduler.pbt:
        keep = max(keep, pbt.perturb_every // run.checkpoint_every + DONORS_MARGIN)
    return tune.Tuner(
        VLAPPO,
        param_space=_space(experiment),
        tune_config=tune.TuneConfig(
            metric=tuned_metric(experiment),
            mode=MODE,
            num_samples=spec.samples,
            max_concurrent_trials=experiment.concurrent if spec.sampler == "optuna" else None,
            scheduler=scheduler(experiment),
            search_alg=searcher(experiment),
            reuse_actors=spec.reuse_actors,
            trial_dirname_creator=directory_name,
        ),
        run_config=tune.RunConfig(
            name=directory.name,
            storage_path=str(directory.parent),
            stop={ITERATION: run.iterations},
            checkpoint_config=tune.CheckpointConfig(
                num_to_keep=keep,
                checkpoint_score_attribute=tuned_metric(experiment),
                checkpoint_score_order=MODE,
                checkpoint_frequency=run.checkpoint_every,
                checkpoint_at_end=True,
            ),
            failure_config=tune.FailureConfig(max_failures=run.max_restarts),
            callbacks=list(callbacks),
            verbose=0,
        ),
    )


def _fit(
    experiment: Experiment, directory: Path, console: Console, restore: bool
) -> tuple[Sequence[Any], ExperimentWatch]:
    """Tune's results, and what watched it."""

    def tell_error(trial: Any, error: Any) -> None:
        if final := _is_final(error):
            give_up(trial)
        what = "ends there" if final else "starts anew from its newest checkpoint, if it may"
        console.print(f"{label_of(trial)} failed: {one_line(error)}; it {what}", style="yellow")

    def tell_frozen(trial: Any) -> None:
        console.print(f"{label_of(trial)} gave no sign of life, and was killed", style="yellow")

    watch = ExperimentWatch(partial(console.print, style="dim"), _plan_of, tell_frozen, _write_summary)
    table = ExperimentTable(experiment.base.run.iterations, console)
    callbacks: list[Any] = [table, watch, *loggers()]
    if experiment.base.run.wandb:
        callbacks.append(wandb_logger(experiment.base.run.wandb, directory.name))
    with tolerant_tune(tell_error, watch.interrupted, watch.to_write), table:
        if restore:
            tuner = restored_tuner(str(directory), VLAPPO, _space(experiment), callbacks)
        else:
            tuner = make_tuner(experiment, directory, callbacks)
        return tuner.fit(), watch


def _plan_of(trial: Any) -> RuntimeArgs:
    return calculate_runtime_args(VLAPPO.get_default_config().update_from_dict(trial.config).settings())


def _space(experiment: Experiment) -> dict[str, Any]:
    return param_space(experiment, resolved(experiment.base).to_dict())


def _is_final(error: Any) -> bool:
    """Whether the same would happen again: a mistake in the trial's settings, or numbers that left the finite ones."""
    return isinstance(cause_of(error), FinalError) or "SettingsError" in one_line(error)


def _notice(console: Console, seconds: float, name: str) -> None:
    console.print(
        f"{name}: ending within {seconds:g} s, with a checkpoint of each running trial; once more to end at once"
    )


def _outcome(experiment: Experiment, result: Any) -> Outcome:
    """What became of a trial, from its own directory."""
    directory = Path(result.path)
    config, metrics = result.config or {}, result.metrics or {}
    rows: list[dict[str, Any]] = []
    broken: str | None = None
    try:
        rows = RunDirectory(directory).read_rows()
    except SettingsError as error:  # somebody has damaged it: the others are ranked
        broken = str(error)
    iterations = rows[-1]["iteration"] if rows else 0
    scores = [row[experiment.metric] for row in rows if row[experiment.metric] is not None]
    if result.error is not None or broken:
        state = "failed"
    elif iterations >= experiment.base.run.iterations:
        state = "done"
    else:
        state = "stopped early" if metrics.get("done") else "unfinished"
    return Outcome(
        directory,
        dotted(config.get("sampled", {})),
        float(scores[-1]) if scores and math.isfinite(scores[-1]) else None,
        iterations,
        state,
        one_line(result.error) if result.error is not None else broken,
        *_best_checkpoint(result),
    )


def _write_summary(trial: Any) -> None:
    """`summary.json` of a trial that has ended."""
    run = RunDirectory(Path(trial_path(trial)))
    with LOST.counting("summary.json"), suppress(SettingsError):
        if rows := run.read_rows():
            wall = sum(sum(row["seconds"].values()) for row in rows)
            summary = summarize(run.settings(), rows, wall)
            replace_file(run.path / "summary.json", json.dumps(summary, indent=2) + "\n")


def _best_checkpoint(result: Any) -> tuple[Path | None, float | None]:
    """Of those that are there, the one with the best evaluation of its own iteration, and its success; else the
    newest."""
    evaluated = [
        (metrics["vlarl_details"]["evaluation"]["success_rate"], metrics[ITERATION], checkpoint)
        for checkpoint, metrics in result.best_checkpoints or ()
        if metrics.get("vlarl_details", {}).get("evaluation")
    ]
    score, _, best = max(evaluated, key=lambda found: found[:2], default=(None, 0, result.checkpoint))
    if best is None:
        return None, None
    try:
        return local(CheckpointStore.resolve(Path(best.path))), score
    except (FileNotFoundError, DamagedCheckpointError):
        return None, None


def _write(experiment: Experiment, directory: Path, ranked: Sequence[Ranked]) -> None:
    """`ranking.json`, and a row for each trial in `ranking.csv`."""
    samples = [
        {
            "rank": place,
            "sampled": sample.sampled,
            "mean": sample.mean,
            "interval_95": sample.interval,
            "trials": [_relative(trial, directory) for trial in sample.trials],
        }
        for place, sample in enumerate(ranked, start=1)
    ]
    with LOST.counting(RANKING_FILE):
        told = {"metric": experiment.metric, "samples": samples}
        replace_file(directory / RANKING_FILE, json.dumps(told, indent=2) + "\n")
        keys = list(dict.fromkeys(key for sample in ranked for trial in sample.trials for key in trial.sampled))
        with (directory / TABLE_FILE).open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["rank", *keys, experiment.metric, "iterations", "state", "directory", "checkpoint"])
            for place, sample in enumerate(ranked, start=1):
                for trial in (_relative(trial, directory) for trial in sample.trials):
                    values = [trial["sampled"].get(key) for key in keys]
                    found = (trial[name] for name in ("score", "iterations", "state", "directory", "checkpoint"))
                    table.writerow([place, *values, *found])


def _relative(trial: Outcome, directory: Path) -> dict[str, Any]:
    paths = {"directory": trial.directory, "checkpoint": trial.checkpoint}
    return asdict(trial) | {name: path and os.path.relpath(path, directory) for name, path in paths.items()}


def _tell(experiment: Experiment, directory: Path, ranked: Sequence[Ranked], console: Console) -> None:
    """The ranking, whole, and what to do with the best."""
    keys = list(dict.fromkeys(key for sample in ranked for key in sample.sampled))
    table = Table("rank", *keys, f"{experiment.metric} (95 %)", "trials", "iterations", box=None, padding=(0, 2))
    for place, sample in enumerate(ranked, start=1):
        values = (short({key: sample.sampled[key]}).partition("=")[2] if key in sample.sampled else "-" for key in keys)
        iterations = "/".join(str(trial.iterations) for trial in sample.trials)
        states = ", ".join(dict.fromkeys(trial.state for trial in sample.trials))
        table.add_row(str(place), *values, _score(sample), f"{len(sample.trials)} {states}", iterations)
    wide = make_console()
    wide.width = max(console.width, 200)  # a cell that is cut says nothing
    wide.print(table)
    best = ranked[0].best if ranked and ranked[0].mean is not None else None
    if best is not None and best.checkpoint is not None:
        rate = "not evaluated" if best.checkpoint_score is None else f"{100 * best.checkpoint_score:.1f} % greedy"
        console.print(f"best checkpoint of the first: {os.path.relpath(best.checkpoint)} ({rate})")
        console.print(f"export it with: vlarl export {pasted(best.checkpoint)} OUT")
    console.print(f"done: {os.path.relpath(directory)}/{RANKING_FILE}; compare with: vlarl report {pasted(directory)}")


def _score(sample: Ranked) -> str:
    if sample.mean is None:
        return "-"
    interval = f" ({sample.interval[0]:.3f} to {sample.interval[1]:.3f})" if sample.interval else ""
    return f"{sample.mean:.3f}{interval}"
