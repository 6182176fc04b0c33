"""What an environment for a vision-language-action policy offers: gymnasium's interface, and state that can be swapped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import gymnasium
import numpy as np

from vlarl_rllib.registry import EnvSpec


class VLAEnv(gymnasium.Env[dict[str, np.ndarray], np.ndarray], ABC):
    """One task at a time, chosen at reset.

    `reset(seed=, options={"task_id": int, "initial_state": int})` (both 0 when absent) returns `{"image": [S, S, 3]
    uint8}` and the info `{"instruction": str, "task_id": int, "initial_state": int}`. `step(action)` takes the
    environment's own action and its info holds `"success"`. Success pays 1.0 and terminates; the horizon truncates.
    `render_seconds` is what drawing took in the last call of either.
    """

    render_seconds: float = 0.0

    @abstractmethod
    def __init__(self, spec: EnvSpec) -> None: ...

    @staticmethod
    def policy_to_env_action(action: np.ndarray) -> np.ndarray:
        """OpenVLA's un-normalised action [7] -> the environment's action [7] float64.

        The arm's six numbers stay. The policy's gripper is 1 = open, 0 = close, robosuite's is -1 = open, +1 = close:
        stretched to [-1, 1], reduced to its sign and negated, as OpenVLA's LIBERO evaluation does.
        """
        converted = np.array(action, dtype=np.float64)
        if converted.shape != (7,):
            raise ValueError(f"the policy's action has shape {converted.shape}; expected (7,)")
        converted[6] = -np.sign(2.0 * converted[6] - 1.0)
        return converted

    def proprioception(self) -> np.ndarray | None:
        """[8] float32 as OpenVLA's LIBERO data have it: the gripper's position in metres, axis-angle, two finger joints; None = not told."""
        return None

    @abstractmethod
    def snapshot(self) -> Any:
        """Everything that the rest of the episode depends on, as a value that later steps do not change."""

    @abstractmethod
    def restore(self, snapshot: Any) -> None:
        """Go on from a snapshot of this environment; its task must be the one that is loaded."""

    @staticmethod
    @abstractmethod
    def task_instructions(suite: str) -> list[str]:
        """Instruction of every task, in task order. Needs no simulator, like the other static methods."""

    @staticmethod
    @abstractmethod
    def num_initial_states(suite: str, task_id: int) -> int:
        """Number of initial states of one task."""

    @staticmethod
    @abstractmethod
    def horizon(suite: str) -> int:
        """Policy steps after which an episode is cut off."""
