"""The parts that `VLAPPO.training_step` drives: collecting an iteration's steps, and moving weights to the engines.

They hold handles of groups of actors, never the Algorithm.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ray.rllib.env.env_runner_group import EnvRunnerGroup

from vlarl_rllib.curriculum import Start
from vlarl_rllib.engines.pool import EnginePool
from vlarl_rllib.learner.learner_group import VLALearnerGroup
from vlarl_rllib.rollout.env_runner import Contribution
from vlarl_rllib.rollout.players import EpisodeResult
from vlarl_rllib.types import WeightManifest

logger = logging.getLogger(__name__)

RUNNER_RESTART_SECONDS = 300.0
"""Longest wait for a restarted runner while there is no other."""
MAX_FRUITLESS_ROUNDS = 5
"""Rounds of sampling in a row that bring no step at all before the run gives up."""


class WeightSync:
    """Pushes the learners' weights to the engines and counts the pushes.

    The counter is the policy version: it never repeats or decreases, also after a resume. The newest full version stays readable
    until the next one is committed, so that an engine restarted in between loads it without the learners.
    """

    def __init__(self, learners: VLALearnerGroup, pool: EnginePool | None) -> None:
        self.version = 0
        self.manifest: WeightManifest | None = None
        self._learners, self._pool = learners, pool

    def push(self) -> WeightManifest:
        """Publish the current weights as the next version and load them everywhere."""
        self.version += 1
        manifest = self._learners.publish_weights(self.version)
        if self._pool is not None:
            self._pool.load_weights(manifest)
        self.manifest = manifest
        self._learners.call("retire_weights", self.version)
        return manifest

    def make_engines_current(self) -> None:
        """Replace dead engines and load the newest version into them."""
        assert self.manifest is not None, "push() comes first"
        if self._pool is not None:
            self._pool.ensure_current(self.manifest)


@dataclass
class Rollout:
    """An iteration's steps."""

    refs: list[Any] = field(default_factory=list)
    num_steps: list[int] = field(default_factory=list)
    metrics: list[Any] = field(default_factory=list)


class RolloutCollector:
    """Has the runners sample until the iteration is complete, through failures of engines and runners.

    Args:
        runners: RLlib's group of VLAEnvRunners.
        sync: for the engines' health and the weights' version.
        pool: None with in-process samplers.
        restore_runners: brings restarted runners back into the group.
    """

    def __init__(self, runners: EnvRunnerGroup, sync: WeightSync, pool: EnginePool | None, restore_runners: Callable[[], Any]) -> None:
        self._runners, self._sync, self._pool = runners, sync, pool
        self._restore_runners = restore_runners

    def collect(self, iteration: int, steps_per_slot: int) -> Rollout:
        """All slots' steps of `iteration`.

        Raises:
            RuntimeError: where nothing at all came back several times in a row.
        """
        rollout, fruitless = Rollout(), 0
        while True:
            contributions: list[Contribution] = self._call("sample_slots", iteration=iteration, steps_per_slot=steps_per_slot)
            for contribution in contributions:
                rollout.refs += contribution.refs
                rollout.num_steps += contribution.num_steps
                rollout.metrics.append(contribution.metrics)
            if rollout.refs and not any(contribution.missing_steps for contribution in contributions):
                return rollout
            fruitless = 0 if any(contribution.num_steps for contribution in contributions) else fruitless + 1
            self._check(fruitless, [contribution.engine_error for contribution in contributions])

    def evaluate(self, starts: list[Start]) -> list[EpisodeResult]:
        """One greedy episode from each start, none twice, none left out."""
        results: list[EpisodeResult] = []
        fruitless = 0
        while starts:
            outcomes = self._call("evaluate", per_runner=self._share(starts))
            new = [result for played, _, _ in outcomes for result in played]
            done = {(result.task_id, result.initial_state) for result in new}
            starts = [start for start in starts if (start.task_id, start.initial_state) not in done]
            results += new
            fruitless = 0 if new else fruitless + 1
            self._check(fruitless, [error for _, _, error in outcomes])
        return results

    def _share(self, starts: list[Start]) -> dict[int, dict[str, Any]]:
        """Divide the starts over the runners that have a slot with their task, turn by turn."""
        tasks = dict(self._runners.foreach_env_runner(_slot_tasks, local_env_runner=False))
        shares: dict[int, list[Start]] = {index: [] for index in tasks}
        for start in starts:
            able = [index for index, known in tasks.items() if start.task_id in known]
            if able:
                shares[min(able, key=lambda index: len(shares[index]))].append(start)
        return {index: {"starts": share} for index, share in shares.items()}

    def _call(self, method: str, per_runner: dict[int, dict[str, Any]] | None = None, **kwargs: Any) -> list[Any]:
        """Make engines current, tell the runners about them, then call `method` on all healthy runners."""
        self._sync.make_engines_current()
        handles = self._pool.handles if self._pool is not None else []
        attach = {"engines": handles, "version": self._sync.version, "manifest": self._sync.manifest}
        self._runners.foreach_env_runner("attach", kwargs=attach, local_env_runner=False)
        if per_runner is None:
            return self._runners.foreach_env_runner(method, kwargs=kwargs, local_env_runner=False)
        indices = [index for index in self._runners.healthy_worker_ids() if index in per_runner]
        return self._runners.foreach_env_runner(
            [method] * len(indices), kwargs=[per_runner[index] for index in indices], remote_worker_ids=indices, local_env_runner=False
        )

    def _check(self, fruitless: int, errors: list[str | None]) -> None:
        if fruitless >= MAX_FRUITLESS_ROUNDS:
            raise RuntimeError(
                f"sampling brought no step {fruitless} times in a row; last errors: {[e for e in errors if e] or 'no runner answered'}; "
                "the runners' own logs are in Ray's session directory under logs/"
            )
        if fruitless and not errors:
            self._wait_for_a_runner()

    def _wait_for_a_runner(self) -> None:
        """Ray restarts a dead runner by itself; RLlib takes it back once it answers a ping, which fails at once while it starts."""
        deadline = time.monotonic() + RUNNER_RESTART_SECONDS
        while not self._runners.num_healthy_remote_workers() and time.monotonic() < deadline:
            self._restore_runners()
            time.sleep(0.5)


def _slot_tasks(runner: Any) -> tuple[int, tuple[int, ...]]:
    return runner.worker_index, runner._slot_tasks
