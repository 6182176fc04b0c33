"""`vlarl doctor CONFIG --deep`: start what the config plans, play a few decisions, and compare sampler and learner.

Two iterations. The first is judged before anything has changed, as with a learning rate of 0. Its update is large on
purpose, and thrown away: the second iteration tells whether the weights that it made reach the sampler.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune
from rich.console import Console

from vlarl_rllib.algorithm import VLAPPO
from vlarl_rllib.config import VLAPPOConfig
from vlarl_rllib.errors import one_line
from vlarl_rllib.models.family import read_facts
from vlarl_rllib.models.presets import resolve_model
from vlarl_rllib.observability.driver_callback import DriverCallback
from vlarl_rllib.observability.metrics import iteration_row
from vlarl_rllib.observability.self_test import Expectation, expectation, tell
from vlarl_rllib.process.console import make_console
from vlarl_rllib.process.signals import END
from vlarl_rllib.runs.pulse import TrialWatch
from vlarl_rllib.runs.ray_session import ray_session
from vlarl_rllib.runs.tune_output import fit, loggers
from vlarl_rllib.settings import Settings, calculate_runtime_args

DECISIONS = 4
"""Of each slot and iteration."""
ITERATIONS = 2
LEAST_RATE = 1e-4
"""Learning rate of the update that is thrown away: a smaller one would drown in bfloat16's rounding."""


def run_deep_check(settings: Settings) -> int:
    """Run the check and print what it finds; the process's exit code, 0 where everything is within its bounds."""
    console = make_console()
    short = shortened(settings)
    plan = calculate_runtime_args(short)
    console.print(
        f"deep check: {plan.num_slots} slots, {short.engines.num} engine(s), {short.learners.num} learner(s); "
        "nothing of it is kept"
    )
    END.words = lambda: "nothing was kept"
    with tempfile.TemporaryDirectory(prefix="vlarl-doctor-", ignore_cleanup_errors=True) as scratch:
        with ray_session(plan, short), END.polled(partial(_notice, console)):
            rows, error = _play(short, Path(scratch), console)
        if END.signal is not None:
            return END.code
    if error is not None:
        console.print(f"the check ended: {one_line(error)}", style="bold red")
        return 1
    facts = read_facts(resolve_model(short.model.path), short.model.family_reference)
    line, good = verdict(rows, expectation(short, facts.actions))
    console.print(line, style="" if good else "bold red")
    return 0 if good else 1


def shortened(settings: Settings) -> Settings:
    """The same engines, runners and learners, for a few decisions and an update that moves the policy."""
    training, num_slots = settings.training, settings.rollout.num_runners * settings.env.num_envs
    return settings.replaced(
        rollout={
            "steps_per_iteration": DECISIONS, "episodes_per_iteration": None, "group_size": 1, "filter_groups": False,
        },
        training={
            "lr": max(training.lr, LEAST_RATE), "value_lr": max(training.value_lr, LEAST_RATE), "num_epochs": 2,
            "minibatch_size": max(1, num_slots * DECISIONS // 2), "advantages": "gae", "critic_warmup_iterations": 0,
        },
        curriculum={"kind": "fixed"},
        evaluation={"episodes": 0, "every": 0},
        run={"iterations": ITERATIONS, "wandb": None},
    )  # fmt: skip


def verdict(rows: Sequence[dict[str, Any]], expected: Expectation) -> tuple[str, bool]:
    """What the two iterations say, in a line, and whether that is good.

    Had the update's weights not travelled, the second gap would be about what the update did to a token's log-prob:
    with a KL divergence of k for the tokens of a ratio, sqrt(2 k / tokens) in the root mean square.
    """
    if failed := [name for row in rows for name in (row["self_test"] or {"failed": ()})["failed"]]:
        return f"deep check failed: {', '.join(dict.fromkeys(failed))}; see the line above", False
    first, second = rows
    moved = math.sqrt(2 * max(0.0, first["approx_kl"]) / expected.tokens_per_ratio)
    what = f"the update moved a token by about {moved:.1e} nats, and the gap is {second['logprob_gap_mean']:.1e}"
    if moved <= expected.bounds.gap_mean:
        return f"deep check passed but for the weights' travel: {what}, so it cannot be told; raise training.lr", True
    return f"deep check passed: {what}, so the sampler has the new weights", True


class _Watcher(DriverCallback):
    """Keeps the rows, and prints each self-test."""

    def __init__(self, console: Console) -> None:
        self.rows: list[dict[str, Any]] = []
        self._console = console

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        row = iteration_row(result)
        self.rows.append(row)
        tell(row, self._console)


def _play(settings: Settings, scratch: Path, console: Console) -> tuple[list[dict[str, Any]], Exception | None]:
    watcher = _Watcher(console)
    watch = TrialWatch(str(scratch), calculate_runtime_args(settings), partial(console.print, style="dim"))
    tuner = tune.Tuner(
        VLAPPO,
        param_space=VLAPPOConfig.from_settings(settings, scratch),
        run_config=tune.RunConfig(
            name=scratch.name,
            storage_path=str(scratch.parent),
            stop={"training_iteration": ITERATIONS},
            failure_config=tune.FailureConfig(max_failures=0),
            callbacks=[watcher, watch, *loggers()],
            verbose=0,
        ),
    )
    errors = fit(tuner)
    if not errors and len(watcher.rows) < ITERATIONS and END.signal is None:
        errors.append(RuntimeError("the trial ended before its second iteration"))
    return watcher.rows, errors[0] if errors else None


def _notice(console: Console, name: str) -> None:
    """What a signal is answered with."""
    console.print(f"{name}: ending; once more to end at once")
