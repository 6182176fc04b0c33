"""What a reward is, and calling one that may fail: it never ends a run.

T = decisions of a fragment of an episode, N = environment steps of it (T, where a decision is one action), A = tokens
of a decision, S = image side in pixels.
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlarl_rllib.process.storage import Place

logger = logging.getLogger(__name__)

MAX_TRACEBACKS, MAX_ALIKE = 200, 10
"""Files that one process writes, and with the same message: a reward that fails at every step must not fill the disk,
nor hide another failure."""
MAX_HUNG_CALLS = 3
"""Calls of one reward that may be hanging at a time; further ones are not made.

A thread cannot be ended from outside.
"""
_numbers = itertools.count()
_written: Counter[str] = Counter()
"""Files by message."""


@dataclass(frozen=True)
class RewardEpisode:
    """What a reward sees: an uninterrupted piece of one episode."""

    images: np.ndarray
    """[T+1, S, S, 3] uint8: the frame that each decision was made on, and the one behind the last."""
    tokens: np.ndarray
    """[T, A] int64 action token ids."""
    durations: np.ndarray
    """[T] int64: actions of each decision that were played; they sum to N."""
    actions: np.ndarray
    """[N, 7] float64: those that were played, normalised to [-1, 1]."""
    env_rewards: np.ndarray
    """[N] float32: 1 at the step that solved the task, else 0."""
    instruction: str
    terminated: bool
    """Whether the last step solved the task."""
    gamma: float = 1.0
    """Discount of the rewards within a decision."""
    frames: np.ndarray | None = None
    """[N+1, S, S, 3] uint8: also the frames between the actions of a decision, where some `Reward.every_frame`."""

    def per_decision(self, step_rewards: np.ndarray) -> np.ndarray:
        """[N] rewards of environment steps -> [T] float32: the discounted sum of each decision's."""
        first = np.cumsum(self.durations) - self.durations
        place = np.arange(len(step_rewards)) - np.repeat(first, self.durations)
        return np.add.reduceat(np.asarray(step_rewards) * self.gamma**place, first).astype(np.float32)


class Reward(ABC):
    """A number for each decision of a fragment; see `RewardEpisode.per_decision` for what is worth something at each
    environment step."""

    name: str
    every_frame: bool = False
    """Whether it looks at `RewardEpisode.frames`, which costs their drawing."""

    def __init__(self) -> None:
        self.hung: list[threading.Thread] = []
        """Threads of calls that were given up."""

    @abstractmethod
    def __call__(self, episode: RewardEpisode) -> np.ndarray:
        """[T] finite numbers. May raise or hang: `safe_get_reward` is between it and the run."""

    def on_cpu(self) -> Reward | None:
        """The same on the CPU, to try once where this one failed; None = there is no such thing."""
        return None


@dataclass(frozen=True)
class RewardResult:
    """What came of a call."""

    value: np.ndarray
    """[T] float32; zeros where nothing came of it."""
    source: Literal["ok", "cpu_retry", "zero"]
    error: str | None = None
    """One line about what failed first."""


def safe_get_reward(
    reward: Reward, episode: RewardEpisode, *, timeout_seconds: float, traceback_dir: Place
) -> RewardResult:
    """Call a reward; where it raises, hangs or returns something that is no reward, try it on the CPU, else take zero.

    Args:
        timeout_seconds: for each of the two calls.
        traceback_dir: a file there tells of each failure; made when needed.

    Never raises for the reward's sake.
    """
    first_error: str | None = None
    attempt: Reward | None = reward
    source: Literal["ok", "cpu_retry"] = "ok"
    while attempt is not None:
        try:
            return RewardResult(_call(attempt, episode, timeout_seconds), source, first_error)
        except Exception as error:  # a reward is somebody else's code, on hardware that may fail
            first_error = first_error or _one_line(error)
            _write_traceback(attempt, episode, error, traceback_dir)
        attempt, source = (_cpu_copy(reward, episode, traceback_dir), "cpu_retry") if source == "ok" else (None, source)
    return RewardResult(np.zeros(len(episode.tokens), np.float32), "zero", first_error)


def _call(reward: Reward, episode: RewardEpisode, timeout_seconds: float) -> np.ndarray:
    """In a thread that can be given up.

    Raises what the reward raises, TimeoutError, or ValueError for a value that is no reward.
    """
    reward.hung = [thread for thread in reward.hung if thread.is_alive()]
    if len(reward.hung) >= MAX_HUNG_CALLS:
        raise TimeoutError(f"{len(reward.hung)} earlier calls still hang; no further one is made")
    outcome: list[np.ndarray | BaseException] = []

    def run() -> None:
        try:
            outcome.append(reward(episode))
        except BaseException as error:  # handed over to the caller's thread
            outcome.append(error)

    thread = threading.Thread(target=run, name="reward", daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    if not outcome:
        reward.hung.append(thread)
        raise TimeoutError(f"no answer within rewards.timeout_seconds = {timeout_seconds:g}")
    (value,) = outcome
    if isinstance(value, BaseException):
        raise value if isinstance(value, Exception) else RuntimeError(f"{type(value).__name__}: {value}")
    return _checked(value, len(episode.tokens))


def _checked(value: np.ndarray, length: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        array = np.asarray(value, dtype=np.float32)
    if array.shape != (length,):
        raise ValueError(f"a reward of {length} decisions has shape ({length},), got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{int((~np.isfinite(array)).sum())} of {length} rewards are not finite")
    return array


def _cpu_copy(reward: Reward, episode: RewardEpisode, traceback_dir: Place) -> Reward | None:
    try:
        return reward.on_cpu()
    except Exception as error:
        _write_traceback(reward, episode, error, traceback_dir)
        return None


def _one_line(error: BaseException) -> str:
    if isinstance(cause := getattr(error, "cause", None), BaseException):  # Ray's, whose first line names the actor
        error = cause
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _write_traceback(reward: Reward, episode: RewardEpisode, error: Exception, directory: Place) -> None:
    name = getattr(reward, "name", type(reward).__name__)  # whatever it is, it never raises for the reward's sake
    message = f"{name} failed: {_one_line(error)}"
    logger.warning("reward %s", message)
    if _written.total() >= MAX_TRACEBACKS or _written[message] >= MAX_ALIKE:
        return
    _written[message] += 1
    number = next(_numbers)
    text = "".join(traceback.format_exception(error))
    facts = (
        f"reward {name}, {len(episode.tokens)} decisions, instruction {episode.instruction!r}, "
        f"{time.strftime('%Y-%m-%d %H:%M:%S')}"
    )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"reward_{name}_{socket.gethostname()}_{os.getpid()}_{number:04d}.txt").write_text(
            f"{facts}\n\n{text}"
        )
    except OSError as failure:
        logger.warning("no traceback file in %s: %s", directory, failure)
