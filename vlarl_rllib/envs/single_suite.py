"""What the environments without suites share: tasks, starts and spaces."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium
import numpy as np

from vlarl_rllib.envs.base import VLAEnv
from vlarl_rllib.types import ACTION_SIZE, EnvSpec


class SingleSuiteEnv(VLAEnv):
    """An environment of one suite, whose name is that of the environment; `spec.suite`, `center_crop` and `camera_size`
    have no meaning."""

    SUITE: ClassVar[str]
    INSTRUCTIONS: ClassVar[tuple[str, ...]]
    """By task id."""
    NUM_INITIAL_STATES: ClassVar[int]
    """Of every task."""
    HORIZON: ClassVar[int]

    def __init__(self, spec: EnvSpec) -> None:
        self.env_spec = spec
        self.render_mode = "rgb_array"
        side = spec.image_size
        self.observation_space = gymnasium.spaces.Dict(
            {"image": gymnasium.spaces.Box(0, 255, (side, side, 3), np.uint8)}
        )
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (ACTION_SIZE,), np.float64)

    @property
    def max_steps(self) -> int:
        """Steps after which the running episode is cut off."""
        return self.env_spec.max_steps or self.HORIZON

    @classmethod
    def task_instructions(cls, suite: str) -> list[str]:
        return list(cls.INSTRUCTIONS)

    @classmethod
    def num_initial_states(cls, suite: str, task_id: int) -> int:
        cls._check("task", task_id, len(cls.INSTRUCTIONS))
        return cls.NUM_INITIAL_STATES

    @classmethod
    def horizon(cls, suite: str) -> int:
        return cls.HORIZON

    @classmethod
    def start_info(cls, options: dict[str, Any] | None) -> dict[str, Any]:
        """The info of `reset`: instruction, task_id, initial_state. Raises ValueError for a start that is not there."""
        task_id, index = (int((options or {}).get(name, 0)) for name in ("task_id", "initial_state"))
        cls._check("task", task_id, len(cls.INSTRUCTIONS))
        cls._check("initial state", index, cls.NUM_INITIAL_STATES)
        return {"instruction": cls.INSTRUCTIONS[task_id], "task_id": task_id, "initial_state": index}

    @classmethod
    def _check(cls, what: str, number: int, count: int) -> None:
        if not 0 <= number < count:
            raise ValueError(f"{what} {number} is not in the {cls.SUITE} suite, whose {what}s are 0 to {count - 1}")
