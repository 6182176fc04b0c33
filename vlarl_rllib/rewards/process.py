"""The learned process reward: what a decision does to a judge's score.

T = decisions of a fragment of an episode, S = image side in pixels.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from vlarl_rllib.errors import one_line
from vlarl_rllib.rewards.base import Reward, RewardEpisode
from vlarl_rllib.rewards.judge import Judge, judge_kind
from vlarl_rllib.rewards.judges import load_judge

WAIT_SHARE = 0.9
"""Of the reward's time-out, for the worker's answer: the call ends by itself before it is given up."""


class ProcessReward(Reward):
    """Score of the frame behind a decision minus score of the frame before it, by the run's reward worker.

    The differences of an episode add up to its last score minus its first, at most 1, in however many fragments it is
    handed over.

    Args:
        judge_directory: what the worker has loaded.
        timeout_seconds: see `safe_get_reward`.
        cpu_copy: whether `on_cpu` loads it in this process; None = where it is a classifier.
    """

    name = "process"

    def __init__(self, judge_directory: str, timeout_seconds: float, cpu_copy: bool | None = None) -> None:
        super().__init__()
        self._directory, self._wait_seconds, self._cpu_copy = judge_directory, WAIT_SHARE * timeout_seconds, cpu_copy
        self._worker: Any = None
        self._was_late = False
        self._local = LocalProcessReward(judge_directory)

    def attach(self, worker: Any) -> None:
        """Ask this `RewardWorker` actor from now on, also where it was late before."""
        self._worker, self._was_late = worker, False

    def __call__(self, episode: RewardEpisode) -> np.ndarray:
        """[T] float32.

        Raises:
            RuntimeError: there is no worker.
            TimeoutError: it gave no answer in time, now or since it was attached: each call would cost as much again.
            ValueError: it gave something that is no score.
            Exception: Ray's, or what the judge raised.
        """
        import ray

        if self._worker is None:
            raise RuntimeError("no reward worker is attached")
        if self._was_late:
            raise TimeoutError(
                "the reward worker was late before, and is asked again when the next round of sampling begins"
            )
        try:
            scores = ray.get(self._worker.score.remote(episode.images, episode.instruction), timeout=self._wait_seconds)
        except ray.exceptions.GetTimeoutError as error:
            self._was_late = True
            raise TimeoutError(f"the reward worker gave no answer within {self._wait_seconds:g} s") from error
        return differences(scores, len(episode.tokens))

    def on_cpu(self) -> Reward | None:
        """The same judge in this process, loaded at its first call; None where it is too large for that.

        Raises ValueError as `judge_kind`.
        """
        if self._cpu_copy is None:
            self._cpu_copy = judge_kind(self._directory) == "classifier"
        return self._local if self._cpu_copy else None


class LocalProcessReward(Reward):
    """`ProcessReward` by a judge in this process, loaded at the first call, within its time-out.

    A failure to load is remembered.
    """

    name = "process"

    def __init__(self, judge_directory: str) -> None:
        super().__init__()
        self._directory = judge_directory
        self._loading = threading.Lock()
        self._judge: Judge | Exception | None = None

    def __call__(self, episode: RewardEpisode) -> np.ndarray:
        """[T] float32. Raises RuntimeError where the judge cannot be loaded here, else what it raises."""
        return differences(self._load().score(episode.images, episode.instruction), len(episode.tokens))

    def _load(self) -> Judge:
        with (
            self._loading
        ):  # a call that was given up may still be loading: the next one waits for it instead of loading too
            if self._judge is None:
                try:
                    self._judge = load_judge(self._directory)
                except Exception as error:
                    self._judge = error
            if isinstance(self._judge, Exception):
                raise RuntimeError(f"the judge cannot be loaded here: {one_line(self._judge)}") from self._judge
            return self._judge


def differences(scores: np.ndarray, num_decisions: int) -> np.ndarray:
    """[T+1] scores -> [T] float32 changes. Raises ValueError for another shape, or scores outside [0, 1]."""
    array = np.asarray(scores, dtype=np.float32)
    if array.shape != (num_decisions + 1,):
        raise ValueError(
            f"a judge's scores of {num_decisions} decisions have shape ({num_decisions + 1},), got {array.shape}"
        )
    if not ((array >= 0.0) & (array <= 1.0)).all():
        raise ValueError(f"a judge's scores lie in [0, 1], got {array.min():g} to {array.max():g}")
    return np.diff(array)
