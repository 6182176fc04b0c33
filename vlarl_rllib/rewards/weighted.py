"""The sum that a run learns from: each reward with its weight, each called safely."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vlarl_rllib.process.plugins import added_by_packages, load_class
from vlarl_rllib.process.storage import Place
from vlarl_rllib.rewards.base import Reward, RewardEpisode, safe_get_reward
from vlarl_rllib.rewards.heuristics import Length, MalformedReply, Smoothness
from vlarl_rllib.rewards.process import ProcessReward
from vlarl_rllib.rewards.success import Success

if TYPE_CHECKING:
    from vlarl_rllib.settings import RewardSettings


GROUP = "vlarl_rllib.rewards"
"""Entry points of other packages."""
LARGEST = 1e30
"""Absolute value of a weighted reward: a sum of larger ones may be infinite, and its square in a loss is."""


class WeightedRewards:
    """Adds up rewards; those that fail, or are too large to be added, count as zero.

    Args:
        rewards: (weight, reward).
        timeout_seconds, traceback_dir: see `safe_get_reward`.
    """

    def __init__(
        self, rewards: Sequence[tuple[float, Reward]], *, timeout_seconds: float, traceback_dir: Place
    ) -> None:
        self._rewards = list(rewards)
        self._timeout_seconds, self._traceback_dir = timeout_seconds, traceback_dir
        self.failures: Counter[str] = Counter()
        """`reward_zeros` and `reward_cpu_retries`, since they were last taken."""

    @property
    def every_frame(self) -> bool:
        """Whether one of them looks at the frames between the actions of a decision."""
        return any(reward.every_frame for _, reward in self._rewards)

    def attach(self, worker: Any) -> None:
        """Have the process reward, where there is one, ask this reward worker."""
        for _, reward in self._rewards:
            if isinstance(reward, ProcessReward):
                reward.attach(worker)

    def __call__(self, episode: RewardEpisode) -> np.ndarray:
        """[T] float32."""
        total = np.zeros(len(episode.tokens), np.float32)
        for weight, reward in self._rewards:
            result = safe_get_reward(
                reward, episode, timeout_seconds=self._timeout_seconds, traceback_dir=self._traceback_dir
            )
            with np.errstate(over="ignore"):
                weighted = np.float32(weight) * result.value
            fits = bool((np.abs(weighted) <= LARGEST).all())
            if fits:
                total += weighted
            self.failures["reward_zeros"] += result.source == "zero" or not fits
            self.failures["reward_cpu_retries"] += result.source == "cpu_retry"
        return total


def make_reward(name: str) -> Reward:
    """What `rewards.others` names: what an installed package adds, or `module:Class`; made without arguments.

    Raises ValueError: there is none such, in one line.
    """
    found = added_by_packages(GROUP)
    if name not in found and ":" not in name:
        known = f"choose one of {', '.join(found)}" if found else "no installed package adds one"
        raise ValueError(f"rewards.others names {name!r}; {known}, or name it as module:Class")
    try:
        made = load_class(found.get(name, name))()
    except Exception as error:  # somebody else's class may raise anything
        reason = error if isinstance(error, ValueError) else f"it cannot be made ({type(error).__name__}: {error})"
        raise ValueError(f"rewards.others names {name!r}, but {reason}") from error
    if not isinstance(made, Reward):
        raise ValueError(f"rewards.others names {name!r}, but that is no vlarl_rllib.rewards.Reward")
    return made


def make_rewards(settings: RewardSettings, action_token_ids: range, traceback_dir: Place) -> WeightedRewards:
    """The rewards that the settings give a weight."""
    known = (
        (settings.success, Success()),
        (settings.malformed, MalformedReply(action_token_ids)),
        (settings.length, Length()),
    )
    chosen: list[tuple[float, Reward]] = [
        (weight, reward) for weight, reward in (*known, (settings.smoothness, Smoothness())) if weight
    ]
    if settings.process and settings.judge:
        chosen.append(
            (settings.process, ProcessReward(settings.judge, settings.timeout_seconds, settings.judge_cpu_copy))
        )
    chosen += [(weight, make_reward(name)) for name, weight in settings.others.items() if weight]
    return WeightedRewards(chosen, timeout_seconds=settings.timeout_seconds, traceback_dir=traceback_dir)
