"""The parts that `VLAPPO.training_step` drives: collecting an iteration's steps, and moving weights to the engines.

They hold handles of groups of actors, never the Algorithm.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray.rllib.env.env_runner_group import EnvRunnerGroup

from vlarl_rllib.curriculum import Start
from vlarl_rllib.engines.pool import EnginePool
from vlarl_rllib.learner.learner_group import VLALearnerGroup
from vlarl_rllib.rollout.env_runner import Attached, Contribution
from vlarl_rllib.rollout.players import EpisodeResult
from vlarl_rllib.types import WeightManifest

logger = logging.getLogger(__name__)

RUNNER_RESTART_SECONDS = 300.0
"""Longest wait for a restarted runner."""
MAX_FRUITLESS_ROUNDS = 5
"""Rounds of sampling in a row that bring no step at all before the run gives up."""


class WeightSync:
    """Pushes the learners' weights to the engines and counts the pushes.

    The counter is the policy version: it never repeats or decreases, also after a resume. The newest full version stays readable
    until the next one is committed, so that an engine restarted in between loads it without the learners.

    Args:
        version: the newest one that has been used, 0 = none yet.
    """

    def __init__(self, learners: VLALearnerGroup, pool: EnginePool | None, version: int) -> None:
        self.version = version
        self.manifest: WeightManifest | None = None
        self._learners, self._pool = learners, pool

    def push(self, *, above: int = 0) -> WeightManifest:
        """Publish the current weights as the next version, which is also greater than `above`, and load them everywhere."""
        self.version = max(self.version, above) + 1
        manifest = self._learners.publish_weights(self.version)
        if self._pool is not None:
            self._pool.load_weights(manifest)
        self.manifest = manifest
        self._learners.call("retire_weights", self.version)
        return manifest

    def make_engines_current(self) -> None:
        """Replace dead engines and load the newest version into them."""
        assert self.manifest is not None, "push() comes first"
        if self._pool is None:
            return
        try:
            self._pool.ensure_current(self.manifest)
        except FileNotFoundError:  # the learner that had written it is dead, and another run has swept up after it
            self.push()


@dataclass
class Rollout:
    """An iteration's steps."""

    slots: list[tuple[int, Any, int]] = field(default_factory=list)
    """(runner, ref of its chunks, steps) of each slot, in an order that does not depend on who was faster."""
    metrics: list[Any] = field(default_factory=list)
    lost_steps: int = 0
    """Steps that were played and died with their runner before the learners had them."""
    pids: dict[int, Any] = field(default_factory=dict)
    """By runner, its process and those of its environments."""

    def add(self, contribution: Contribution) -> None:
        runner = contribution.runner
        self.slots += [(runner, ref, steps) for ref, steps in zip(contribution.refs, contribution.num_steps, strict=True)]
        self.slots.sort(key=lambda slot: slot[0])
        self.metrics.append(contribution.metrics)
        self.pids[contribution.runner] = contribution.pids

    def drop(self, indices: Sequence[int]) -> None:
        """Forget these slots' steps."""
        self.lost_steps += sum(self.slots[index][2] for index in indices)
        self.slots = [slot for index, slot in enumerate(self.slots) if index not in indices]


class RolloutCollector:
    """Has the runners sample until the learners have an iteration's steps, through failures of engines and runners.

    Args:
        runners: RLlib's group of VLAEnvRunners.
        sync: for the engines' health and the weights' version.
        pool: None with in-process samplers.
        learners: receive what was sampled.
        restore_runners: brings restarted runners back into the group.
        timeout_seconds: a runner that takes longer for a call is frozen; it is killed and started anew.
    """

    def __init__(
        self,
        runners: EnvRunnerGroup,
        sync: WeightSync,
        pool: EnginePool | None,
        learners: VLALearnerGroup,
        *,
        restore_runners: Callable[[], Any],
        timeout_seconds: float,
    ) -> None:
        self._runners, self._sync, self._pool, self._learners = runners, sync, pool, learners
        self._restore_runners, self._timeout_seconds = restore_runners, timeout_seconds
        self.num_restarts = 0
        """Runners that came back as a new process. RLlib counts only those that it saw dead: Ray may be faster than the next call."""
        self._runner_pids: dict[int, int] = {}

    def collect(self, iteration: int, steps_per_slot: int) -> Rollout:
        """All slots' steps of `iteration`, handed to the learners.

        A runner that dies takes what only it has with it: the iteration goes on with the others' steps, or waits for the runner
        where there are no others.

        Raises:
            RuntimeError: where nothing at all came back several times in a row.
        """
        rollout, fruitless = Rollout(), 0
        enough = max(1, len(self._learners))
        while True:
            contributions: list[Contribution] = self._call("sample_slots", iteration=iteration, steps_per_slot=steps_per_slot)
            for contribution in contributions:
                rollout.add(contribution)
            if len(rollout.slots) >= enough and not any(contribution.missing_steps for contribution in contributions):
                lost = self._learners.receive([ref for _, ref, _ in rollout.slots], [steps for _, _, steps in rollout.slots])
                if not lost:
                    return rollout
                rollout.drop(lost)
            fruitless = 0 if any(contribution.played_steps for contribution in contributions) else fruitless + 1
            self._check(fruitless, [contribution.engine_error for contribution in contributions])

    def evaluate(self, starts: list[Start]) -> list[EpisodeResult]:
        """One greedy episode from each start, none twice, none left out."""
        results: list[EpisodeResult] = []
        fruitless = 0
        while starts:
            outcomes = self._call("evaluate", starts=starts)
            new = [result for played, _, _ in outcomes for result in played]
            done = {(result.task_id, result.initial_state) for result in new}
            starts = [start for start in starts if (start.task_id, start.initial_state) not in done]
            results += new
            fruitless = 0 if new else fruitless + 1
            self._check(fruitless, [error for _, _, error in outcomes])
        return results

    def begin_new_episodes(self) -> None:
        """End the running episodes where they are, unseen; at checkpoints, so that a resumed run and this one go on alike."""
        self._foreach("begin_new_episodes", {index: {} for index in self._runners.healthy_worker_ids()})

    @staticmethod
    def _share(starts: list[Start], runners: dict[int, Attached]) -> dict[int, dict[str, Any]]:
        """Divide the starts over the runners that have their tasks, turn by turn."""
        shares: dict[int, list[Start]] = {index: [] for index in runners}
        for start in starts:
            able = [index for index, runner in runners.items() if start.task_id in runner.tasks]
            if able:
                shares[min(able, key=lambda index: len(shares[index]))].append(start)
        return {index: {"starts": share} for index, share in shares.items()}

    def _call(self, method: str, *, starts: list[Start] | None = None, **kwargs: Any) -> list[Any]:
        """Make engines current, tell the runners about them, then call `method` on all healthy runners, where given with their share of `starts`."""
        self._sync.make_engines_current()
        handles = self._pool.handles if self._pool is not None else []
        attach = {"engines": handles, "version": self._sync.version, "manifest": self._sync.manifest}
        attached: dict[int, Attached] = self._foreach("attach", dict.fromkeys(self._runners.healthy_worker_ids(), attach))
        pids = {index: runner.pid for index, runner in attached.items()}
        self.num_restarts += sum(self._runner_pids.get(index, pid) != pid for index, pid in pids.items())
        self._runner_pids.update(pids)
        arguments = dict.fromkeys(attached, kwargs) if starts is None else self._share(starts, attached)
        return list(self._foreach(method, {index: arguments[index] for index in attached if index in arguments}).values())

    def _foreach(self, method: str, arguments: dict[int, dict[str, Any]]) -> dict[int, Any]:
        """Call `method` on the runners with these numbers; answers by number. Those that died or froze are left out."""
        indices = list(arguments)
        if not indices:  # which RLlib would take for all
            return {}
        answers: list[tuple[int, Any]] = self._runners.foreach_env_runner(
            [partial(_numbered, method)] * len(indices),
            kwargs=list(arguments.values()),
            remote_worker_ids=indices,
            timeout_seconds=self._timeout_seconds,
            local_env_runner=False,
        )
        results = dict(sorted(answers, key=lambda answer: answer[0]))
        for index in set(self._runners.healthy_worker_ids()) & set(indices) - results.keys():
            self._end(index, method)
        return results

    def _end(self, index: int, method: str) -> None:
        """Kill a frozen runner. Ray starts another, and RLlib takes it for dead until that answers."""
        logger.warning("runner %d: no answer to %s within rollout.timeout_seconds = %g; it is killed", index, method, self._timeout_seconds)
        manager = self._runners._worker_manager
        ray.kill(manager.actors()[index], no_restart=False)
        manager.set_actor_state(index, healthy=False)

    def _check(self, fruitless: int, errors: list[str | None]) -> None:
        if fruitless >= MAX_FRUITLESS_ROUNDS:
            reasons = ", ".join(error or "no error, and nothing played" for error in errors) or "no runner answered"
            raise RuntimeError(
                f"sampling brought no step {fruitless} times in a row; the runners' last words: {reasons}; "
                "their own logs are in Ray's session directory under logs/"
            )
        if fruitless:
            self._wait_for_a_runner()

    def _wait_for_a_runner(self) -> None:
        """Where runners are down, wait until one more is back.

        Ray restarts a dead runner by itself; RLlib takes it back once it answers a ping, which fails at once while it starts.
        """
        deadline = time.monotonic() + RUNNER_RESTART_SECONDS
        healthy, total = self._runners.num_healthy_remote_workers(), self._runners.num_remote_workers()
        while self._runners.num_healthy_remote_workers() < min(healthy + 1, total) and time.monotonic() < deadline:
            self._restore_runners()
            time.sleep(0.5)


def _numbered(method: str, runner: Any, **kwargs: Any) -> tuple[int, Any]:
    return runner.worker_index, getattr(runner, method)(**kwargs)
