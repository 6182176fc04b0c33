"""A runner's slots as RLlib wants to see an environment."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from vlarl_rllib.envs.vector import SlotProcesses
from vlarl_rllib.models.family import ActionFormat


def slot_spaces(image_size: int, actions: ActionFormat) -> tuple[gym.Space, gym.Space]:
    """What a slot shows, and what it takes: the tokens of a decision."""
    return gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8), gym.spaces.MultiDiscrete(
        [len(actions.token_ids)] * actions.num_tokens
    )


class SlotVectorEnv(gym.vector.VectorEnv):
    """The slots as RLlib wants to see an environment: spaces and a size. The event loop plays them, without `step`."""

    def __init__(self, processes: SlotProcesses, num_envs: int, image_size: int, actions: ActionFormat) -> None:
        self.processes = processes
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = slot_spaces(image_size, actions)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

    def close_extras(self, **kwargs: Any) -> None:
        self.processes.close()
