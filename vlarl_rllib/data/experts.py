"""Scripted experts: controllers that see the state behind the image, for demonstrations."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from vlarl_rllib.envs.registry import expert_class
from vlarl_rllib.envs.synthetic import SyntheticEnv
from vlarl_rllib.envs.tabletop import OBJECT_HALF_HEIGHT, POSITION_STEP, TabletopEnv, TabletopFacts

OPEN, CLOSE = -1.0, 1.0
"""The environment's gripper commands."""
_LOW = 0.02
"""Height of the finger tips while they push or grasp; like everything here in metres."""
_TRAVEL = 0.09
"""Height at which nothing is hit."""
_ALIGNED = 0.012
"""Largest horizontal error while descending around an object."""
_GRASPED = 2 * OBJECT_HALF_HEIGHT + 0.006
"""Opening below which the fingers have closed on an object."""
_BEHIND = 0.065
"""Distance from an object's centre at which closed fingers stand free of it."""


class TabletopExpert:
    """Solves every task of `tabletop`, in closed loop: each action follows from the present state alone.

    Args:
        pace: largest position delta, in (0, 1]; 1 = as fast as the environment allows.
        resolution: position deltas are rounded to multiples of it, so that a small model sees few distinct action
            tokens; 0 = not at all.
    """

    def __init__(self, pace: float = 1.0, resolution: float = 0.25) -> None:
        self._pace, self._resolution = pace, resolution

    def act(self, env: TabletopEnv) -> np.ndarray:
        """[7] float64: the environment's action in its present state."""
        facts = env.facts
        goal, gripper = {"touch": _touch, "push": _push, "pick": _pick, "put": _put}[facts.task.verb](facts)
        action = np.zeros(7)
        action[:3] = np.clip((goal - facts.gripper) / POSITION_STEP, -self._pace, self._pace)
        action[6] = gripper
        if self._resolution:
            action[:3] = np.round(action[:3] / self._resolution) * self._resolution
        return action


def _touch(facts: TabletopFacts) -> tuple[np.ndarray, float]:
    """(Where the finger tips should be, gripper command): onto the object from above."""
    return facts.target, CLOSE


def _push(facts: TabletopFacts) -> tuple[np.ndarray, float]:
    """Go behind the object as seen from the zone, down, and through it."""
    assert facts.zone is not None
    direction = (facts.zone - facts.target)[:2]
    direction /= np.linalg.norm(direction)
    offset = facts.gripper[:2] - facts.target[:2]
    along = float(offset @ direction)
    across = offset - along * direction
    behind = facts.target[:2] - _BEHIND * direction
    if along < -OBJECT_HALF_HEIGHT and np.linalg.norm(across) < 0.02:
        if facts.gripper[2] > _LOW + 0.015:
            return np.array([*behind, _LOW]), CLOSE
        return np.array([*(facts.gripper[:2] + 0.05 * direction - 1.5 * across), _LOW]), CLOSE
    return np.array([*behind, _TRAVEL]), CLOSE


def _pick(facts: TabletopFacts) -> tuple[np.ndarray, float]:
    """Over the object, down around it, close, up."""
    error = np.abs(facts.target[:2] - facts.gripper[:2]).max()
    if (
        facts.opening < _GRASPED
        and error < 2 * _ALIGNED
        and abs(facts.gripper[2] - facts.target[2]) < OBJECT_HALF_HEIGHT
    ):
        return np.array([*facts.gripper[:2], _TRAVEL]), CLOSE
    if error > _ALIGNED:
        return np.array([*facts.target[:2], _TRAVEL]), OPEN
    if facts.gripper[2] > _LOW + 0.01:
        return np.array([*facts.target[:2], _LOW]), OPEN
    return np.array([*facts.target[:2], _LOW]), CLOSE


def _put(facts: TabletopFacts) -> tuple[np.ndarray, float]:
    """Pick, over the zone, down, open."""
    assert facts.zone is not None
    error = float(np.abs(facts.target[:2] - facts.zone[:2]).max())
    clearance = facts.target[2] - OBJECT_HALF_HEIGHT
    if error < 0.03 and clearance < 0.012:
        return facts.gripper + np.array([0.0, 0.0, 0.02]), OPEN
    goal, gripper = _pick(facts)
    if gripper == CLOSE and facts.opening < _GRASPED and (clearance > 0.045 or (error < 0.03 and clearance > 0.0)):
        carried = facts.gripper[:2] + (facts.zone - facts.target)[:2]
        return np.array([*carried, _LOW if error < 0.02 else _TRAVEL]), CLOSE
    return goal, gripper


class SyntheticExpert:
    """Points at the square that the instruction of `synthetic` names; nothing there has a pace."""

    def __init__(self, pace: float = 1.0) -> None: ...

    def act(self, env: SyntheticEnv) -> np.ndarray:
        """[7] float64: an action that succeeds now."""
        return env.target_action


class Expert(Protocol):
    """A controller for one environment; made with its pace, the share of full speed that it may use."""

    def act(self, env: Any) -> np.ndarray:
        """[7] float64: the environment's action in its present state."""
        ...


def make_expert(name: str, pace: float = 1.0) -> Expert:
    """The expert of an environment. Raises ValueError, naming those that have one, for another."""
    found: Expert = expert_class(name)(pace)
    return found
