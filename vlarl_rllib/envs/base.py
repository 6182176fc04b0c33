"""What an environment for a vision-language-action policy offers: gymnasium's interface, and state that can be
swapped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import gymnasium
import numpy as np

from vlarl_rllib.types import ACTION_SIZE, EnvSpec


class VLAEnv(gymnasium.Env[dict[str, np.ndarray], np.ndarray], ABC):
    """One task at a time, chosen at reset.

    `reset(seed=, options={"task_id": int, "initial_state": int})` (both 0 when absent) returns `{"image": [S, S, 3]
    uint8}` and the info `{"instruction": str, "task_id": int, "initial_state": int}`. `step(action)` takes 7 numbers:
    position and rotation deltas of the arm, then the gripper, -1 = open, +1 = close; its info holds `"success"`.
    Success pays 1.0 and terminates; the horizon truncates. `render_seconds` is what drawing took in the last call of
    either.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (gymnasium declares it so)
    """Films are shown at `render_fps`: steps of the policy in a second of the robot's time."""
    render_seconds: float = 0.0
    draws: bool = True
    """False before a `step` whose frame nobody sees: an environment may then return any frame of the right size."""

    @property
    def steps_left(self) -> int | None:
        """Steps until the horizon cuts the episode off, so that the last one is drawn; None = not told, every step is
        drawn then."""
        return None

    def present_image(self) -> np.ndarray | None:
        """[S, S, 3] uint8 of the present state, behind an undrawn step that ended the episode: rewards look at it. None
        = what `step` returned is it, for environments that draw every step."""
        return None

    @abstractmethod
    def __init__(self, spec: EnvSpec) -> None: ...

    def proprioception(self) -> np.ndarray | None:
        """[8] float32 as OpenVLA's LIBERO data have it: the gripper's position in metres, axis-angle, two finger
        joints; None = not told."""
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

    @staticmethod
    def describe_frames(image_size: int, *, center_crop: bool) -> str:
        """How a frame comes about, for a person who compares it with how a policy's training data were made."""
        return f"drawn at {image_size} x {image_size} pixels, as they are"


# What passes between an environment and the policy; environments may be somebody else's code


def check_action(action: np.ndarray, where: str) -> None:
    """Raise ValueError unless it is 7 finite numbers."""
    if np.shape(action) != (ACTION_SIZE,):
        raise ValueError(f"{where} has shape {np.shape(action)}; expected ({ACTION_SIZE},)")
    if not np.isfinite(action).all():
        raise ValueError(
            f"{where} is {np.asarray(action).tolist()}, must be finite; see the action statistics and the "
            "weights of the policy"
        )


def check_step(result: Any, image_size: int, where: str) -> None:
    """Raise ValueError unless `step` returned what `VLAEnv` says: a frame, a finite reward, two flags and `success`."""
    if not isinstance(result, tuple) or len(result) != 5:
        raise ValueError(
            f"{where} returned {type(result).__name__}, must be (observation, reward, terminated, truncated, info)"
        )
    observation, reward, terminated, truncated, info = result
    check_observation(observation, image_size, where)
    if np.ndim(reward) != 0 or not np.isreal(reward) or not np.isfinite(reward):
        raise ValueError(f"{where} returned the reward {reward!r}, must be a finite number")
    success = info.get("success") if isinstance(info, dict) else None
    for name, flag in (("terminated", terminated), ("truncated", truncated), ("info['success']", success)):
        if not isinstance(flag, bool | np.bool_):
            raise ValueError(f"{where} returned {name} = {flag!r}, must be True or False")


def check_observation(observation: Any, image_size: int, where: str) -> None:
    """Raise ValueError unless its `image` is [S, S, 3] uint8: copied into a frame's memory, another type would lose its
    values silently."""
    image = observation.get("image") if isinstance(observation, dict) else None
    expected = (image_size, image_size, 3)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape != expected:
        found = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"{where} returned an image of {found}, must be uint8 {list(expected)}")


def check_start(info: Any, where: str) -> None:
    """Raise ValueError unless the info of `reset` says what is to be done, and of which task and start."""
    instruction = info.get("instruction") if isinstance(info, dict) else None
    if not isinstance(instruction, str):
        raise ValueError(f"{where} returned the instruction {instruction!r}, must be a text")
    for name in ("task_id", "initial_state"):
        if not isinstance(info.get(name), int | np.integer):
            raise ValueError(f"{where} returned {name} = {info.get(name)!r}, must be a whole number")
