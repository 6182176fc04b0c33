"""Which task and initial state an episode starts from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Start:
    """Where an episode begins."""

    task_id: int
    initial_state: int
    """Index into the task's published initial states."""
    seed: int
    """Seeds what the environment draws at reset."""


def derive_seed(*parts: int) -> int:
    """A 31-bit seed that is a function of `parts` alone; distinct tuples of the same length give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0] >> 1)


class FixedCurriculum:
    """Every slot keeps its task and draws one of the training starts uniformly.

    The draw is a function of (seed, slot, iteration, index of the episode within the iteration), so it needs no state, and a
    resumed run draws what the uninterrupted one would have.

    Args:
        slot_tasks: task of each slot of one runner.
        training_states: for each task, the initial states that may be trained on.
        first_slot: number of the runner's first slot within the whole run.
        seed: the run's seed.
    """

    def __init__(self, slot_tasks: Sequence[int], training_states: Mapping[int, Sequence[int]], *, first_slot: int, seed: int) -> None:
        self._slot_tasks = tuple(slot_tasks)
        self._states = {task: tuple(states) for task, states in training_states.items()}
        self._first_slot, self._seed = first_slot, seed

    def next_start(self, slot: int, iteration: int, index: int) -> Start:
        """The start of the slot's `index`-th episode begun in `iteration`."""
        task = self._slot_tasks[slot]
        seed = derive_seed(self._seed, 1, self._first_slot + slot, iteration, index)
        states = self._states[task]
        return Start(task, states[int(np.random.default_rng(seed).integers(len(states)))], seed)
