"""Which task and initial state an episode starts from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from vlarl_rllib.types import Start, derive_seed

MIN_WEIGHT = 1e-6
"""So that a slot whose starts are all solved still has one to draw."""


class FixedCurriculum:
    """Every slot keeps its task and draws one of the training starts uniformly.

    The draw is a function of (seed, slot, iteration, index of the episode within the iteration), so it needs no state,
    and a resumed run draws what the uninterrupted one would have.

    Args:
        slot_tasks: task of each slot of one runner.
        training_states: for each task, the initial states that may be trained on.
        first_slot: number of the runner's first slot within the whole run.
        seed: the run's seed.
    """

    def __init__(
        self, slot_tasks: Sequence[int], training_states: Mapping[int, Sequence[int]], *, first_slot: int, seed: int
    ) -> None:
        self._slot_tasks = tuple(slot_tasks)
        self._states = {task: tuple(states) for task, states in training_states.items()}
        self._first_slot, self._seed = first_slot, seed

    def next_start(self, slot: int, iteration: int, index: int) -> Start:
        """The start of the slot's `index`-th episode begun in `iteration`."""
        seed = derive_seed(self._seed, 1, self._first_slot + slot, iteration, index)
        task, state = self._choose(slot, np.random.default_rng(seed))
        return Start(task, state, seed)

    def _choose(self, slot: int, rng: np.random.Generator) -> tuple[int, int]:
        task = self._slot_tasks[slot]
        states = self._states[task]
        return task, states[int(rng.integers(len(states)))]


class AdaptiveCurriculum(FixedCurriculum):
    """A slot draws (task, start) with the weights of a `SuccessRecord`, among the tasks that its process has the model
    of.

    Args:
        playable: for each slot of the runner, the tasks that it may play.
    """

    def __init__(
        self,
        playable: Sequence[Sequence[int]],
        training_states: Mapping[int, Sequence[int]],
        *,
        first_slot: int,
        seed: int,
    ) -> None:
        super().__init__([tasks[0] for tasks in playable], training_states, first_slot=first_slot, seed=seed)
        self._pairs = [[(task, state) for task in tasks for state in self._states[task]] for tasks in playable]
        self.weights: Mapping[tuple[int, int], float] = {}
        """Relative, by (task, start); 1 where nothing is known."""

    def _choose(self, slot: int, rng: np.random.Generator) -> tuple[int, int]:
        pairs = self._pairs[slot]
        weights = np.array([self.weights.get(pair, 1.0) for pair in pairs])
        return pairs[int(rng.choice(len(pairs), p=weights / weights.sum()))]


class SuccessRecord:
    """How often each (task, start) succeeds, and how often it should be played.

    s is the success rate of about the last `MEMORY` episodes, beginning at 1/2. `logistic`: weight exp((0.5 - s) /
    temperature), hard starts more often (VLA-RL, arXiv 2505.18719); `power`: (1 - s)^(1 / temperature), solved ones
    never.

    Args:
        rule, temperature: see above.
    """

    MEMORY = 20.0

    def __init__(self, rule: str, temperature: float) -> None:
        self._rule, self._temperature = rule, temperature
        self._counts: dict[tuple[int, int], tuple[float, float]] = {}
        """(successes, episodes), both fading."""

    def add(self, task: int, initial_state: int, success: bool) -> None:
        """An episode ended."""
        successes, episodes = self._counts.get((task, initial_state), (0.5, 1.0))
        fade = 1.0 - 1.0 / self.MEMORY
        self._counts[task, initial_state] = fade * successes + success, fade * episodes + 1.0

    def success_rate(self, task: int, initial_state: int) -> float:
        successes, episodes = self._counts.get((task, initial_state), (0.5, 1.0))
        return successes / episodes

    def weights(self) -> dict[tuple[int, int], float]:
        """By (task, start), relative to 1 for what has not been played."""
        unknown = self._weight(0.5)
        return {pair: max(self._weight(self.success_rate(*pair)) / unknown, MIN_WEIGHT) for pair in self._counts}

    def state(self) -> list[list[float]]:
        """For a checkpoint, as JSON."""
        return [[*pair, *counts] for pair, counts in sorted(self._counts.items())]

    def set_state(self, state: Sequence[Sequence[float]]) -> None:
        self._counts = {(int(task), int(start)): (successes, episodes) for task, start, successes, episodes in state}

    def _weight(self, success_rate: float) -> float:
        if self._rule == "logistic":
            return math.exp((0.5 - success_rate) / self._temperature)
        return (1.0 - success_rate) ** (1.0 / self._temperature)
