"""Many episodes on few simulators, inside one process.

A slot is one stream of episodes. Slots that play the same task share one environment (for LIBERO: one MuJoCo model,
about a gigabyte): before a slot acts, the state of the slot that acted last is put aside and its own is put back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, SupportsFloat

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


class SlotTable:
    """The slots and the environments of one process.

    Args:
        spec: how to build an environment.
        max_models: environments kept at a time, one per task.

    `render_seconds` is what drawing took in the last call of `reset` or `step`.
    """

    def __init__(self, spec: EnvSpec, max_models: int) -> None:
        self._spec, self._max_models = spec, max_models
        self._envs: dict[int, VLAEnv] = {}
        """By task, least recently used first."""
        self._episodes: dict[int, _Episode] = {}
        self._loaded: dict[int, int] = {}
        """By task: the slot whose state is in the environment."""
        self.render_seconds = 0.0

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
        result = env.reset(seed=seed, options={"task_id": task_id, "initial_state": initial_state})
        where = f"slot {slot}, task {task_id}: {self._spec.name}.reset"
        check_observation(result[0], self._spec.image_size, where)
        check_start(result[1], where)
        self._episodes[slot], self._loaded[task_id] = _Episode(task_id), slot
        self.render_seconds = env.render_seconds
        return result

    def step(
        self, slot: int, policy_action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], SupportsFloat, bool, bool, dict[str, Any]]:
        """One step of the slot's episode with an un-normalised policy action [7].

        Raises:
            RuntimeError: the slot has no episode, or its episode is over.
            ValueError: the action is not 7 finite numbers, which the environment does not get to see then; or what it
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
        where = f"slot {slot}, task {episode.task_id}"
        try:
            check_action(policy_action, f"{where}: the policy's action")
            result = env.step(env.policy_to_env_action(policy_action))
            check_step(result, self._spec.image_size, f"{where}: {self._spec.name}.step")
        except BaseException:
            self._drop(slot)
            raise
        self.render_seconds = env.render_seconds
        if result[2] or result[3]:
            self._drop(slot)
        return result

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
