"""What a runner tells of its environments: read once a second from the numbers that its loop keeps, and of the episodes
behind each call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlarl_rllib.rollout.contribution import REWARD_FAULTS, Contribution
from vlarl_rllib.rollout.loop import SlotLoop
from vlarl_rllib.telemetry.recorder import Telemetry
from vlarl_rllib.types import EpisodeResult


class RunnerTelemetry:
    """Of one runner.

    Args:
        telemetry: of its process.
        num_slots: that it plays at once.
    """

    def __init__(self, telemetry: Telemetry, loop: SlotLoop, num_slots: int) -> None:
        self._telemetry, self._loop, self._num_slots = telemetry, loop, num_slots
        telemetry.watch(self._read)

    def _read(self) -> None:
        self._telemetry.set("slots", self._num_slots)
        self._telemetry.total("env_busy_seconds", self._loop.env_seconds)
        self._telemetry.total("sampler_wait_seconds", self._loop.sampler_seconds)
        for (task, purpose), steps in list(self._loop.env_steps.items()):
            self._telemetry.total("env_steps", steps, task=str(task), purpose=purpose)

    def tell_of(self, episodes: Sequence[EpisodeResult]) -> None:
        """Of episodes of training that ended."""
        for episode in episodes:
            task = str(episode.task_id)
            self._telemetry.count("episodes", task=task, outcome="success" if episode.success else "failure")
            self._telemetry.observe("episode_length_steps", episode.length, task=task)

    def take_sums(self, contribution: Contribution, *, dropped: int, failures: Mapping[str, int]) -> dict[str, float]:
        """What RLlib's metrics add up over calls and runners (`metrics.RUNNER_SUMS`), since the last call.

        Args:
            dropped: environment steps that were lost.
            failures: of rewards, by kind.
        """
        sums = {
            "env_seconds": self._loop.env_seconds,
            "sampler_seconds": self._loop.sampler_seconds,
            "rollout_seconds": contribution.seconds,
            "env_deaths": float(self._loop.env_deaths),
            "decisions": float(contribution.num_decisions),
            "dropped_steps": float(dropped),
            "engine_failures": float(contribution.engine_error is not None),
            "token_checksum": float(contribution.token_checksum),
            "uniform_groups": float(sum(portion.uniform for portion in contribution.portions)),
            **{name: float(failures[name]) for name in REWARD_FAULTS},
        }
        self.forget_counts()
        return sums

    def forget_counts(self) -> None:
        """Have the loop count anew, with nothing told twice or not at all."""
        self._read()
        self._loop.forget_counts()
        self._read()
