"""Rewards that need no model: penalties, all of them at most 0."""

from __future__ import annotations

import numpy as np

from vlarl_rllib.rewards.base import Reward, RewardEpisode

ARM = slice(0, 6)


class MalformedReply(Reward):
    """-1 at a decision whose reply is not action tokens alone (a stop token in between, another id).

    The samplers of this package choose among the action ids alone, and runners take no other reply: in a run it is
    always 0. It is for scoring episodes from elsewhere.

    Args:
        action_token_ids: the ids that a reply may hold.
    """

    name = "malformed"

    def __init__(self, action_token_ids: range) -> None:
        super().__init__()
        self._ids = action_token_ids

    def __call__(self, episode: RewardEpisode) -> np.ndarray:
        outside = (episode.tokens < self._ids.start) | (episode.tokens >= self._ids.stop)
        return np.where(outside.any(axis=1), np.float32(-1.0), np.float32(0.0))


class Length(Reward):
    """-1 at every environment step: the sooner the better."""

    name = "length"

    def __call__(self, episode: RewardEpisode) -> np.ndarray:
        return episode.per_decision(-np.ones(len(episode.actions), np.float32))


class Smoothness(Reward):
    """Minus the mean squared change of the arm's six normalised numbers since the environment step before; in [-4, 0],
    0 at a fragment's first one."""

    name = "smoothness"

    def __call__(self, episode: RewardEpisode) -> np.ndarray:
        change = np.diff(episode.actions[:, ARM], axis=0, prepend=episode.actions[:1, ARM])
        return episode.per_decision(-np.square(change).mean(axis=1))
