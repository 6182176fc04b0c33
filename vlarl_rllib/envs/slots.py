"""Many episodes on few simulators, inside one process.

A slot is one stream of episodes. Slots that play the same task share one environment (for LIBERO: one MuJoCo model,
about a gigabyte): before a slot acts, the state of the slot that acted last is put aside and its own is put back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vlarl_rllib.envs.base import VLAEnv, check_action, check_observation, check_start, check_step
from vlarl_rllib.envs.registry import make_env
from vlarl_rllib.types import EnvSpec


@dataclass
class _Episode:
    """A slot's episode in progress."""

    task_id: int
    saved: Any = None
    """Snapshot; None while the state is in the environment itself."""


@dataclass(frozen=True)
class Played:
    """What came of a decision."""

    image: np.ndarray
    """[S, S, 3] uint8: the frame behind the last action."""
    rewards: tuple[float, ...]
    """Of each action that was played."""
    frames: tuple[np.ndarray, ...]
    """Behind each of them but the last, where asked for."""
    terminated: bool
    truncated: bool
    success: bool


class SlotTable:
    """The slots and the environments of one process.

    Args:
        spec: how to build an environment.
        max_models: environments kept at a time, one per task.

    `render_seconds` is what drawing took in the last call of `reset` or `play`.
    """

    def __init__(self, spec: EnvSpec, max_models: int) -> None:
        self._spec, self._max_models = spec, max_models
        self._envs: dict[int, VLAEnv] = {}
        """By task, least recently used first."""
        self._episodes: dict[int, _Episode] = {}
        self._loaded: dict[int, int] = {}
        """By task: the slot whose state is in the environment."""
        self.render_seconds = 0.0

    def prepare(self, task_id: int) -> None:
        """Build a task's model, which else the first episode waits for."""
        try:
            self._env(task_id).reset(seed=0, options={"task_id": task_id, "initial_state": 0})
        except Exception:
            self._envs.pop(task_id, None)  # the first episode meets the same, and not a half-built model
            raise

    def reset(
        self, slot: int, task_id: int, initial_state: int, seed: int
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin an episode; whatever the slot was playing ends.

        Raises:
            RuntimeError: the task needs one model more than allowed, and other slots are in the middle of episodes on
                all of them.
            ValueError: what the environment returns is not what `VLAEnv` says.
        """
        self._drop(slot)
        env = self._env(task_id)
        self._put_aside(task_id)
        self._loaded.pop(task_id, None)
        env.draws = True
        result = env.reset(seed=seed, options={"task_id": task_id, "initial_state": initial_state})
        where = f"slot {slot}, task {task_id}: {self._spec.name}.reset"
        check_observation(result[0], self._spec.image_size, where)
        check_start(result[1], where)
        self._episodes[slot], self._loaded[task_id] = _Episode(task_id), slot
        self.render_seconds = env.render_seconds
        return result

    def play(self, slot: int, actions: np.ndarray, *, every_frame: bool = False) -> Played:
        """Play actions [k, 7] of the slot's episode, one after the other, until it ends.

        Args:
            every_frame: draw behind each action. Else only the last frame is drawn, and the one at a cut.

        Raises:
            RuntimeError: the slot has no episode, or its episode is over.
            ValueError: an action is not 7 finite numbers, which the environment does not get to see then; or what it
                returns is not what `VLAEnv` says.
        """
        if slot not in self._episodes:
            raise RuntimeError(f"slot {slot} has no episode in progress; reset it first")
        episode = self._episodes[slot]
        env = self._env(episode.task_id)
        if self._loaded.get(episode.task_id) != slot:
            self._put_aside(episode.task_id)
            env.restore(episode.saved)
            episode.saved, self._loaded[episode.task_id] = None, slot
        try:
            played = self._play(env, actions, every_frame, f"slot {slot}, task {episode.task_id}")
        except BaseException:
            self._drop(slot)
            raise
        if played.terminated or played.truncated:
            self._drop(slot)
        return played

    def _play(self, env: VLAEnv, actions: np.ndarray, every_frame: bool, where: str) -> Played:
        if not len(actions):
            raise ValueError(f"{where}: a decision without actions")
        rewards: list[float] = []
        images: list[np.ndarray] = []
        self.render_seconds = 0.0
        for index, action in enumerate(actions):
            check_action(action, f"{where}: the policy's action")
            env.draws = every_frame or index == len(actions) - 1 or env.steps_left in (None, 1)
            result = env.step(action)
            check_step(result, self._spec.image_size, f"{where}: {self._spec.name}.step")
            observation, reward, terminated, truncated, info = result
            rewards.append(float(reward))
            images.append(observation["image"].copy() if every_frame else observation["image"])
            self.render_seconds += env.render_seconds
            if terminated or truncated:
                if not env.draws and (image := env.present_image()) is not None:
                    images[-1] = image
                break
        frames = tuple(images[:-1]) if every_frame else ()
        return Played(images[-1], tuple(rewards), frames, bool(terminated), bool(truncated), bool(info["success"]))

    def close(self) -> None:
        """Close every environment."""
        for env in self._envs.values():
            env.close()
        self._envs.clear()
        self._episodes.clear()
        self._loaded.clear()

    def _env(self, task_id: int) -> VLAEnv:
        """The environment of a task, built if need be, now the most recently used."""
        if task_id not in self._envs:
            if len(self._envs) >= self._max_models:
                self._evict(task_id)
            self._envs[task_id] = make_env(self._spec)
        self._envs[task_id] = self._envs.pop(task_id)
        return self._envs[task_id]

    def _evict(self, wanted: int) -> None:
        playing = {episode.task_id for episode in self._episodes.values()}
        idle = [task_id for task_id in self._envs if task_id not in playing]
        if not idle:
            raise RuntimeError(
                f"task {wanted} needs a model more, but env.models_per_process is {self._max_models} and slots "
                "here are in "
                f"the middle of episodes on task(s) {sorted(playing)}; raise env.models_per_process, or give the "
                "slot one of them"
            )
        self._envs.pop(idle[0]).close()
        self._loaded.pop(idle[0], None)

    def _put_aside(self, task_id: int) -> None:
        """Save the episode whose state is in the task's environment, if it goes on."""
        occupant = self._loaded.get(task_id)
        if occupant is not None and occupant in self._episodes:
            self._episodes[occupant].saved = self._envs[task_id].snapshot()

    def _drop(self, slot: int) -> None:
        """The slot's episode is over."""
        episode = self._episodes.pop(slot, None)
        if episode is not None and self._loaded.get(episode.task_id) == slot:
            del self._loaded[episode.task_id]
