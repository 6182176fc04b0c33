"""What a step is worth: success, heuristics, a learned judge, their weighted sum; and how a reward may fail without
ending a run."""

from __future__ import annotations

from vlarl_rllib.rewards.base import Reward, RewardEpisode, RewardResult, safe_get_reward
from vlarl_rllib.rewards.heuristics import Length, MalformedReply, Smoothness
from vlarl_rllib.rewards.judge import Judge
from vlarl_rllib.rewards.judges import load_judge
from vlarl_rllib.rewards.process import ProcessReward
from vlarl_rllib.rewards.success import Success
from vlarl_rllib.rewards.weighted import WeightedRewards, make_rewards

__all__ = [
    "Judge",
    "Length",
    "MalformedReply",
    "ProcessReward",
    "Reward",
    "RewardEpisode",
    "RewardResult",
    "Smoothness",
    "Success",
    "WeightedRewards",
    "load_judge",
    "make_rewards",
    "safe_get_reward",
]
