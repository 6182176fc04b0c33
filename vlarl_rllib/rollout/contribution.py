"""What a runner tells the driver: that it is ready, and what a call of it brought."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vlarl_rllib.types import EpisodeResult, Start

REWARD_FAULTS = ("reward_zeros", "reward_cpu_retries")
"""Rewards of a fragment that came to nothing, and those that a CPU had to give."""


@dataclass
class Contribution:
    """What one `sample_slots` call brought."""

    refs: list[Any] = field(default_factory=list)
    """One ref per slot that has new fragments, or per group of episodes; each a list of SingleAgentEpisode."""
    num_decisions: list[int] = field(default_factory=list)
    """Behind each ref."""
    env_steps: list[int] = field(default_factory=list)
    """Environment steps behind each ref."""
    uniform: list[bool] = field(default_factory=list)
    """Of each ref, whether all episodes of the group succeed or all fail, so that nothing tells what made the
    difference."""
    played: int = 0
    """Decisions that this call played, handed over or not."""
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
