"""What an Algorithm writes down while it works: where the time goes, what went wrong, how episodes end."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, LEARNER_RESULTS

from vlarl_rllib.engines.protocol import EngineStatus
from vlarl_rllib.observability.idle import IdleTime
from vlarl_rllib.observability.metrics import (
    FAULTS,
    LastRates,
    fill_in_episode_means,
    iteration_details,
    iteration_metrics,
)
from vlarl_rllib.observability.self_test import SelfTest
from vlarl_rllib.observability.telemetry import tell_iteration
from vlarl_rllib.process.lost_output import LOST
from vlarl_rllib.process.source_revision import source_revision
from vlarl_rllib.rollout.contribution import REWARD_FAULTS
from vlarl_rllib.telemetry.recorder import Telemetry
from vlarl_rllib.types import EpisodeResult, WeightManifest


class Ledger:
    """Of one trial.

    Args:
        earlier_faults: of earlier starts of the same run, by kind.
        self_test: judges the numerics of each iteration.
        run, suite: labels of the metrics that Prometheus is told.
    """

    def __init__(self, earlier_faults: Mapping[str, int], self_test: SelfTest, run: str, suite: str) -> None:
        self._telemetry = Telemetry(run, suite, "algorithm")
        self.seconds: dict[str, float] = defaultdict(float)
        """Of the running iteration, by what they went to."""
        self.faults = Counter[str]()
        """Of this trial, by kind (`metrics.FAULTS`)."""
        self.rates = LastRates()
        self.episodes: Sequence[EpisodeResult] = ()
        """Those that ended in the running iteration."""
        self.staleness: Mapping[int, int] = {}
        """Of what the running iteration learns from: decisions by how many updates their policy was behind."""
        self.learner_seconds = 0.0
        """Of the running iteration, in which learners were at work."""
        self._idle = IdleTime()
        self.initial_evaluation: dict[str, Any] | None = None
        """What was played before the first iteration."""
        self._earlier_faults, self._lost_before = earlier_faults, LOST.count
        self._self_test = self_test
        self._git_revision = source_revision()

    @contextmanager
    def learners_work(self) -> Iterator[None]:
        """What happens inside keeps the learners busy."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.learner_seconds += time.perf_counter() - began

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """What happens inside goes to this one's seconds."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - began

    def close_iteration(
        self,
        results: dict[str, Any],
        *,
        iteration: int,
        wall_seconds: float,
        evaluation: dict[str, Any] | None,
        policy_version: int,
        manifest: WeightManifest | None,
        restarts: Mapping[str, int],
        engines: Sequence[EngineStatus | None],
        num_processes: int,
    ) -> None:
        """Put `vlarl` and `vlarl_details` into RLlib's results of an iteration; the next one's seconds begin at 0.

        Args:
            restarts: of parts that count them themselves, by kind of fault.
            engines: as they are now.
            num_processes: environment processes of all runners.

        Raises:
            SelfTestError: sampler and learner do not compute the same policy.
        """
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        seconds["other"] = max(0.0, wall_seconds - sum(s for name, s in seconds.items() if name != "startup"))
        fill_in_episode_means(results[ENV_RUNNER_RESULTS])
        initial = self.initial_evaluation if iteration == 1 else None
        self_test = self._self_test.take(iteration, results[LEARNER_RESULTS][DEFAULT_MODULE_ID])
        self.faults["failed_self_tests"] += bool(self_test and self_test["failed"])
        details = iteration_details(self.episodes, initial, evaluation, self._git_revision, self.staleness, manifest)
        results["vlarl_details"] = details | {"self_test": self_test}
        self.rates.add(results["vlarl_details"])
        results["vlarl"] = iteration_metrics(
            results,
            num_episodes=len(self.episodes),
            rates=self.rates,
            iteration=iteration,
            timestamp=time.time(),
            seconds=seconds,
            policy_version=policy_version,
            manifest=manifest,
            faults=self._total_faults(results[ENV_RUNNER_RESULTS], restarts),
            staleness=self.staleness,
            idle=self._idle.take(
                wall_seconds,
                learner_seconds=self.learner_seconds,
                engines=engines,
                env_seconds=results[ENV_RUNNER_RESULTS]["env_seconds"],
                num_processes=num_processes,
            ),
        )
        self.learner_seconds = 0.0
        tell_iteration(self._telemetry, results)

    def close(self) -> None:
        """Tell no more metrics."""
        self._telemetry.close()

    def _total_faults(self, runners: Mapping[str, Any], restarts: Mapping[str, int]) -> dict[str, int]:
        """Since the run began."""
        self.faults.update({name: int(runners[name]) for name in ("env_deaths", "dropped_steps", *REWARD_FAULTS)})
        self.faults["lost_output"] = LOST.count - self._lost_before
        return {name: self._earlier_faults.get(name, 0) + self.faults[name] + restarts.get(name, 0) for name in FAULTS}
