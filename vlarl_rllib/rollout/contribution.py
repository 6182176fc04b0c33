"""What a runner tells the driver: that it is ready, and what a call of it brought."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from vlarl_rllib.rollout.players import is_uniform, num_env_steps
from vlarl_rllib.types import VERSION_KEY, EpisodeResult, Start

REWARD_FAULTS = ("reward_zeros", "reward_cpu_retries")
"""Rewards of a fragment that came to nothing, and those that a CPU had to give."""


@dataclass(frozen=True)
class Portion:
    """What a slot played of one iteration, or one group of its episodes."""

    ref: Any
    """Of a list of SingleAgentEpisode."""
    iteration: int
    """Whose share it is."""
    num_decisions: int
    env_steps: int
    uniform: bool
    """Whether all episodes of the group succeed or all fail, so that nothing tells what made the difference."""
    versions: Mapping[int, int]
    """Decisions by the policy version that made them."""

    @classmethod
    def of(cls, fragments: list[SingleAgentEpisode], iteration: int, *, is_group: bool) -> Portion:
        """Put the fragments into this node's object store."""
        versions = Counter[int]()
        for fragment in fragments:
            versions.update(map(int, fragment.get_extra_model_outputs(VERSION_KEY)))
        return cls(
            ray.put(fragments),
            iteration,
            num_decisions=sum(map(len, fragments)),
            env_steps=sum(map(num_env_steps, fragments)),
            uniform=is_group and is_uniform(fragments),
            versions=versions,
        )


@dataclass
class Contribution:
    """What one call of a runner brought."""

    portions: list[Portion] = field(default_factory=list)
    """One per slot that has new fragments, or per group of episodes."""
    played: int = 0
    """Decisions that this call played, handed over or not."""
    seconds: float = 0.0
    """That it took."""
    missing: int = 0
    """Decisions or episodes that the iteration still lacks, because an engine failed. Nothing is handed over then: a
    fragment that is cut there has other advantages, and the runner's objects are no safer than the runner."""
    engine_error: str | None = None
    metrics: Any = None
    results: list[EpisodeResult] = field(default_factory=list)
    """Episodes that ended in this call, by slot."""
    token_checksum: int = 0
    """Sum of the CRC-32 of each decision's tokens: equal in two runs that took the same actions, in whatever order.
    """
    runner: int = 0
    """Number of the runner, from 1."""
    pids: dict[str, Any] = field(default_factory=dict)
    """Process ids: `runner`, and `environments` by subprocess."""
    generation: int = 0
    """See `Order.generation`."""
    through: int = -1
    """Under an order: the newest iteration whose share all slots have played."""
    attached: Attached | None = None
    """Where the call also attached."""

    @property
    def num_decisions(self) -> int:
        """Handed over."""
        return sum(portion.num_decisions for portion in self.portions)

    @property
    def env_steps(self) -> int:
        """Handed over."""
        return sum(portion.env_steps for portion in self.portions)

    def add(self, fragments: list[SingleAgentEpisode], iteration: int, *, is_group: bool) -> None:
        """Hand over what a slot played."""
        self.portions.append(Portion.of(fragments, iteration, is_group=is_group))
        self.token_checksum += sum(
            zlib.crc32(tokens.tobytes()) for fragment in fragments for tokens in fragment.get_actions()
        )


@dataclass(frozen=True)
class Order:
    """What a runner is to play next, where sampling runs ahead of the updates."""

    trial: int
    """See `Attached.trial`: a runner that plays for another one does nothing."""
    generation: int
    """A runner that has worked for another one forgets all and begins with the share of iteration `first`."""
    first: int
    last: int
    """Newest iteration whose share a slot may begin."""
    oldest_version: int
    """That a decision may come from."""
    quota: int
    """Of each slot and iteration."""
    weights: Mapping[tuple[int, int], float]
    """See `VLAEnvRunner.sample_slots`."""
    seconds: float
    """After which the runner reports."""


class Attached(NamedTuple):
    """A runner that is ready to sample."""

    pid: int
    tasks: tuple[int, ...]
    """Of each slot, as it begins with."""
    evaluating: tuple[Start, ...]
    """Starts of the evaluation episodes that go on here."""
    failure: str | None = None
    """Traceback of what kept it from making its environments; it cannot sample then."""
    trial: int = 0
    """Number of the trial that it plays for; 0 = the one that it was made for."""
