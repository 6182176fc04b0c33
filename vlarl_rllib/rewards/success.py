"""The environment's own judgement."""

from __future__ import annotations

import numpy as np

from vlarl_rllib.rewards.base import Reward, RewardEpisode


class Success(Reward):
    """1 at the environment step that solves the task, else 0."""

    name = "success"

    def __call__(self, episode: RewardEpisode) -> np.ndarray:
        return episode.per_decision(episode.env_rewards)
