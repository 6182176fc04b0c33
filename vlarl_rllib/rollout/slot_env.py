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


def all_spaces(image_size: int, actions: ActionFormat, num_envs: int) -> dict[str, Any]:
    """What RLlib asks a runner for."""
    single = slot_spaces(image_size, actions)
    both = tuple(gym.vector.utils.batch_space(space, num_envs) for space in single)
    return {"__env__": both, "__env_single__": single, "default_policy": single}


class SlotVectorEnv(gym.vector.VectorEnv):
    """The slots as RLlib wants to see an environment: spaces and a size. The event loop plays them, without `step`."""

    def __init__(self, processes: SlotProcesses, num_envs: int, image_size: int, actions: ActionFormat) -> None:
        self.processes = processes
        self.num_envs = num_envs
        self.spaces = all_spaces(image_size, actions, num_envs)
        self.single_observation_space, self.single_action_space = self.spaces["__env_single__"]
        self.observation_space, self.action_space = self.spaces["__env__"]

    def close_extras(self, **kwargs: Any) -> None:
        self.processes.close()
