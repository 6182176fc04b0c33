"""What a step is worth: success, heuristics, their weighted sum; and how a reward may fail without ending a run."""

from __future__ import annotations

from vlarl_rllib.rewards.base import Reward, RewardEpisode, RewardResult, safe_get_reward
from vlarl_rllib.rewards.heuristics import Length, MalformedReply, Smoothness
from vlarl_rllib.rewards.success import Success
from vlarl_rllib.rewards.weighted import WeightedRewards, make_rewards

__all__ = [
    "Length",
    "MalformedReply",
    "Reward",
    "RewardEpisode",
    "RewardResult",
    "Smoothness",
    "Success",
    "WeightedRewards",
    "make_rewards",
    "safe_get_reward",
]
