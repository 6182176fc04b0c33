"""A pointing game in NumPy: for fast tests, and for measuring the framework without a simulator.

Two coloured squares lie on a grey plane. The instruction names the colour to point at; an action whose first two
numbers come within `TOLERANCE` of that square's centre succeeds. After any other action both squares move. A step takes
some tens of microseconds at 56 pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vlarl_rllib.envs.single_suite import SingleSuiteEnv
from vlarl_rllib.types import EnvSpec

COLORS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 230), "yellow": (230, 220, 40)}
"""One task per colour."""
TOLERANCE = 0.2
"""Largest distance along x and along y from action to target, in action units; targets lie within [-0.6, 0.6]."""
_REACH = 0.6
_BACKGROUND = 96


@dataclass(frozen=True)
class SyntheticState:
    """State of an episode; `random` is the generator that moves the squares."""

    task_id: int
    initial_state: int
    num_steps: int
    target: tuple[float, float]
    distractor: tuple[float, float]
    random: Mapping[str, Any]


class SyntheticEnv(SingleSuiteEnv):
    """See the module; `spec.fast_render` has no meaning here."""

    SUITE = "synthetic"
    INSTRUCTIONS = tuple(f"point at the {color} square" for color in COLORS)
    NUM_INITIAL_STATES = 50
    HORIZON = 20

    def __init__(self, spec: EnvSpec) -> None:
        super().__init__(spec)
        self._state = SyntheticState(0, 0, 0, (0.0, 0.0), (0.0, 0.0), {})
        self._frame = self.render()

    @property
    def target_action(self) -> np.ndarray:
        """[7] float64: an action that succeeds now."""
        return np.array([*self._state.target, 0.0, 0.0, 0.0, 0.0, -1.0])

    @property
    def steps_left(self) -> int:
        return self.max_steps - self._state.num_steps

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode; the first frame depends on task and initial state alone, later ones on the seed too."""
        super().reset(seed=seed)
        info = self.start_info(options)
        task_id, index = info["task_id"], info["initial_state"]
        start = np.random.default_rng([task_id, index, 1])  # no seed of `reset` gives this stream
        self._state = SyntheticState(task_id, index, 0, _place(start), _place(start), {})
        self._frame = self.render()
        return {"image": self._frame}, info

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Point at (action[0], action[1])."""
        distance = np.abs(np.asarray(action, dtype=np.float64)[:2] - self._state.target)
        success = bool(distance.max() <= TOLERANCE)
        num_steps = self._state.num_steps + 1
        self._state = replace(self._state, num_steps=num_steps)
        if not success:
            self._state = replace(self._state, target=_place(self.np_random), distractor=_place(self.np_random))
        truncated = num_steps >= self.max_steps and not success
        if self.draws:
            self._frame = self.render()
        return {"image": self._frame}, float(success), success, truncated, {"success": success}

    def render(self) -> np.ndarray:  # type: ignore[override]
        """[S, S, 3] uint8: x grows to the right and y downwards, both from -1 to 1; the target lies on top."""
        side = self.env_spec.image_size
        image = np.full((side, side, 3), _BACKGROUND, dtype=np.uint8)
        colors = list(COLORS.values())
        half = max(1, side // 10)
        for color, place in (
            ((self._state.task_id + 1) % len(colors), self._state.distractor),
            (self._state.task_id, self._state.target),
        ):
            x, y = (round((coordinate + 1.0) / 2.0 * (side - 1)) for coordinate in place)
            image[max(0, y - half) : y + half + 1, max(0, x - half) : x + half + 1] = colors[color]
        return image

    def present_image(self) -> np.ndarray:
        return self.render()

    def snapshot(self) -> SyntheticState:
        return replace(self._state, random=self.np_random.bit_generator.state)

    def restore(self, snapshot: SyntheticState) -> None:
        self._state = snapshot
        self.np_random.bit_generator.state = snapshot.random


def _place(generator: np.random.Generator) -> tuple[float, float]:
    x, y = generator.uniform(-_REACH, _REACH, size=2)
    return float(x), float(y)
