"""What travels between `SlotProcesses` and its subprocesses: commands, events, and the memory that holds the frames.

Apart from `worker.py`, which runs as `__main__` and whose classes would not be the parent's.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlarl_rllib.types import EnvSpec


@dataclass(frozen=True)
class SlotEvent:
    """One thing that happened to a slot.

    `reset` and `step` answer a command. `error` answers a command that raised: the slot has no episode any more. `died`
    comes without a command, once for every slot of a subprocess that ended; the subprocess is being restarted, and the
    slot waits for a reset.
    """

    slot: int
    kind: Literal["reset", "step", "died", "error"]
    image: np.ndarray | None = None
    """[S, S, 3] uint8, the caller's own; None for `died` and `error`."""
    rewards: tuple[float, ...] = ()
    """Of each action that was played, in order; only of `step`."""
    frames: tuple[np.ndarray, ...] = ()
    """[S, S, 3] uint8 behind each of those actions but the last, whose frame is `image`; where they were asked for."""
    terminated: bool = False
    truncated: bool = False
    success: bool = False
    instruction: str = ""
    """This and the next two: of the slot's episode; empty, -1 and -1 for `died` and `error`."""
    task_id: int = -1
    initial_state: int = -1
    seconds: float = 0.0
    """Time in the environment, from the command's arrival to its reply, swapping states included."""
    render_seconds: float = 0.0
    """The part of it that drawing took."""
    error: str | None = None
    """Traceback for `error`, exit code for `died`."""

    @property
    def num_steps(self) -> int:
        """Environment steps that were made: fewer than actions were sent where the episode ended between them."""
        return len(self.rewards)

    @property
    def ended(self) -> bool:
        """Whether the episode is over."""
        return self.terminated or self.truncated


@dataclass(frozen=True)
class WorkerSetup:
    """The first message to a worker."""

    spec: EnvSpec
    max_models: int
    num_slots: int
    """Slots in the frame memory, those of other processes included."""
    prepare: tuple[int, ...] = ()
    """Tasks whose models are built before a command comes."""


@dataclass(frozen=True)
class Reset:
    slot: int
    task_id: int
    initial_state: int
    seed: int


@dataclass(frozen=True)
class Step:
    slot: int
    actions: np.ndarray
    """[k, 7] float64, the environment's own: a decision, played until the episode ends."""
    every_frame: bool
    """Draw the frame behind each action; else only what is seen next."""


class Stop:
    """Close the environments and exit."""


def frame_bytes(spec: EnvSpec) -> int:
    """Bytes of one slot's frame."""
    return spec.image_size * spec.image_size * 3


def map_frames(frames_fd: int, spec: EnvSpec, num_slots: int) -> np.ndarray:
    """[slots, S, S, 3] uint8 view of the shared frame memory."""
    memory = mmap.mmap(frames_fd, num_slots * frame_bytes(spec))
    return np.frombuffer(memory, dtype=np.uint8).reshape(num_slots, spec.image_size, spec.image_size, 3)
