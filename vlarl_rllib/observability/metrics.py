"""The numbers of one iteration, flat and few: `result["vlarl"]`, and `result["vlarl_details"]` for what is not always
there.

docs/metrics.md gives the formula of each.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.rllib.utils import metrics as names

from vlarl_rllib.rollout.players import success_by_task
from vlarl_rllib.types import EpisodeResult, WeightManifest

logger = logging.getLogger(__name__)

EPISODE_MEANS = (
    names.EPISODE_RETURN_MEAN, names.EPISODE_RETURN_MIN, names.EPISODE_RETURN_MAX,
    names.EPISODE_LEN_MEAN, names.EPISODE_LEN_MIN, names.EPISODE_LEN_MAX, names.EPISODE_DURATION_SEC_MEAN,
)  # fmt: skip
"""RLlib's numbers of the episodes that ended lately."""
LEARNER_METRICS = (
    "policy_loss",
    "value_loss",
    "entropy",
    "approx_kl",
    "clip_fraction",
    "first_clip_fraction",
    "first_policy_loss",
    "first_value_loss",
    "first_ratio_deviation",
    "explained_variance",
    "grad_norm",
    "grad_norm_critic",
    "logprob_gap_mean",
    "logprob_gap_max",
    "logprob_gap_samples",
    "importance_weight",
    "importance_capped",
    "advantage_abs_mean",
    "reward_mean",
    "value_mean",
    "optimizer_steps",
    "skipped_updates",
    "trained_samples",
)
"""What `VLALearner` logs for its policy."""
VALUE_GAPS = ("value_gap_mean", "value_gap_max")
"""The same, of runs whose engines give values."""
APPLIED = ("lr", "value_lr", "weight_decay", "clip_low", "clip_high", "minibatch_size", "temperature")
"""What the update was made with, as the learner's optimisers and loss had it; logged as `applied_...`."""
RUNNER_SUMS = (
    "decisions",
    "env_seconds",
    "sampler_seconds",
    "rollout_seconds",
    "env_deaths",
    "dropped_steps",
    "engine_failures",
    "reward_zeros",
    "reward_cpu_retries",
    "token_checksum",
    "uniform_groups",
)
"""What `VLAEnvRunner` logs as sums over an iteration."""
SECONDS = ("startup", "sample", "update", "sync", "evaluation", "recovery", "other")
"""Where wall time goes; the first only in the first iteration, `recovery` where the learners started anew."""
FAULTS = (
    "node_losses",
    "env_deaths",
    "runner_restarts",
    "engine_restarts",
    "reward_worker_restarts",
    "learner_restarts",
    "trial_restarts",
    "dropped_steps",
    "stale_steps",
    "reward_zeros",
    "reward_cpu_retries",
    "repeated_iterations",
    "failed_checkpoints",
    "damaged_checkpoints",
    "lost_output",
    "failed_self_tests",
)
"""What can go wrong and was mended or told, counted since the run began."""


@dataclass
class LastRates:
    """How episodes ended, as it was known last, so that there is a number in every iteration: Tune's `stop`, schedulers
    and CSV need one."""

    training: float = 0.0
    """Of the last iteration in which an episode ended; 0 before the first."""
    evaluation: float = 0.0
    """Of the last evaluation; 0 before the first."""
    best_evaluation: float = 0.0
    return_mean: float = 0.0
    """As `training`."""
    episode_length: float = 0.0
    """As `training`."""

    def add(self, details: dict[str, Any]) -> None:
        """Take what `iteration_details` has."""
        if details["success_rate"] is not None:
            self.training = details["success_rate"]
            self.return_mean, self.episode_length = details["return_mean"], details["episode_length"]
        for evaluation in (details["initial_evaluation"], details["evaluation"]):
            if evaluation:
                self.evaluation = evaluation["success_rate"]
                self.best_evaluation = max(self.best_evaluation, self.evaluation)


def iteration_details(
    episodes: Sequence[EpisodeResult],
    initial_evaluation: dict[str, Any] | None,
    evaluation: dict[str, Any] | None,
    git_revision: str | None,
    staleness: Mapping[int, int],
    manifest: WeightManifest | None,
) -> dict[str, Any]:
    """`result["vlarl_details"]`: what is not there in every iteration, or no number.

    Args:
        episodes: those that ended in the iteration; None is the success rate of none.
        initial_evaluation: what `evaluation_metrics` made before the first iteration, else None.
        evaluation: the same behind this iteration, None where none was due.
        git_revision: `source_revision` of the trial's process.
        staleness: decisions by how many updates their policy was behind.
        manifest: of the last push.
    """
    return {
        **_success(episodes),
        "return_mean": float(np.mean([episode.reward for episode in episodes])) if episodes else None,
        "episode_length": float(np.mean([episode.length for episode in episodes])) if episodes else None,
        "initial_evaluation": initial_evaluation,
        "evaluation": evaluation,
        "git_revision": git_revision,
        "staleness": {str(behind): staleness[behind] for behind in sorted(staleness)},
        "weights_transport": manifest.transport if manifest else None,
    }


def fill_in_episode_means(runners: dict[str, Any]) -> None:
    """RLlib leaves out its numbers of episodes until one has ended; a CSV's header is the first row's."""
    for name in EPISODE_MEANS:
        runners.setdefault(name, math.nan)


def rllib_evaluation(metrics: dict[str, Any]) -> dict[str, Any]:
    """What `evaluation_metrics` made, under RLlib's names too: the mean return is 1 for a success."""
    means = {
        "success_rate": names.EPISODE_RETURN_MEAN,
        "mean_length": names.EPISODE_LEN_MEAN,
        "episodes": names.NUM_EPISODES,
    }
    return {names.ENV_RUNNER_RESULTS: {name: metrics[ours] for ours, name in means.items()}, "vlarl": metrics}


def iteration_row(result: dict[str, Any]) -> dict[str, Any]:
    """An iteration's line of `metrics.jsonl`, from Tune's or `Algorithm.train`'s result: the numbers, and over them the
    details."""
    return result["vlarl"] | result["vlarl_details"]


def iteration_metrics(
    results: dict[str, Any],
    *,
    num_episodes: int,
    rates: LastRates,
    iteration: int,
    timestamp: float,
    seconds: dict[str, float],
    policy_version: int,
    manifest: WeightManifest | None,
    faults: dict[str, int],
    staleness: Mapping[int, int],
    idle: dict[str, float],
) -> dict[str, Any]:
    """Pick the numbers out of RLlib's result of an iteration: the same keys every time, each of them a number.

    Args:
        num_episodes: that ended in the iteration.
        timestamp: its end, Unix seconds.
        faults: see `FAULTS`.
        staleness: decisions by how many updates their policy was behind.
        idle: see `idle.IdleTime`.
    """
    runners = results["env_runners"]
    learner = results["learners"]["default_policy"]
    return {
        "iteration": iteration,
        "timestamp": timestamp,
        "env_steps": int(runners["num_env_steps_sampled_lifetime"]),
        "episodes": num_episodes,
        "success_rate": rates.training,
        "evaluation_success_rate": rates.evaluation,
        "best_evaluation_success_rate": rates.best_evaluation,
        "return_mean": rates.return_mean,
        "episode_length": rates.episode_length,
        **{name: float(learner[name]) for name in LEARNER_METRICS},
        **{name: float(learner[name]) for name in VALUE_GAPS if name in learner},
        **{name: float(runners[name]) for name in RUNNER_SUMS},
        "env_steps_per_second": _rate(runners[names.NUM_ENV_STEPS_SAMPLED], seconds.get("sample")),
        "decisions_per_second": _rate(runners["decisions"], seconds.get("sample")),
        "trained_samples_per_second": _rate(learner["trained_samples"], seconds.get("update")),
        "staleness_mean": sum(behind * decisions for behind, decisions in staleness.items())
        / max(1, sum(staleness.values())),
        "staleness_max": max(staleness, default=0),
        "idle_seconds": idle,
        "seconds": {name: float(seconds.get(name, 0.0)) for name in SECONDS},
        "policy_version": policy_version,
        "sync_bytes": manifest.num_bytes if manifest else 0,
        "snapshot_bytes": manifest.snapshot_bytes if manifest else 0,
        "faults": faults,
        "applied": {name: float(learner[f"applied_{name}"]) for name in APPLIED},
    }


def evaluation_metrics(results: Sequence[EpisodeResult]) -> dict[str, Any]:
    """Success over all episodes of an evaluation and by task; `failures` are the [task, start] that failed."""
    return {
        "episodes": len(results),
        **_success(results),
        "mean_length": float(np.mean([result.length for result in results])) if results else None,
        "failures": sorted([result.task_id, result.initial_state] for result in results if not result.success),
    }


def _rate(amount: float, seconds: float | None) -> float:
    return float(amount) / seconds if seconds else 0.0


def _success(results: Sequence[EpisodeResult]) -> dict[str, Any]:
    return {
        "success_rate": float(np.mean([result.success for result in results])) if results else None,
        "success_rate_by_task": {str(task): rate for task, rate in success_by_task(list(results)).items()},
    }


def plain_state(metrics: names.metrics_logger.MetricsLogger) -> dict[str, Any]:
    """RLlib's running metrics for a checkpoint, as JSON.

    One of values that are no numbers, which callbacks may log, begins anew on a resume.
    """
    kept: dict[str, Any] = {}
    for name, state in metrics.get_state()["stats"].items():
        try:
            kept[name] = json.loads(json.dumps(state, default=lambda value: value.item()))
        except (AttributeError, TypeError, ValueError) as error:  # no numpy number, or an array of several
            logger.debug("the metric %s is not kept: %s", name, error)
    return {"stats": kept}
