"""An iteration's decisions from all runners."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

from vlarl_rllib.rollout.contribution import Contribution
from vlarl_rllib.rollout.runner_pool import RunnerCalls
from vlarl_rllib.types import EpisodeResult


@dataclass
class Rollout:
    """An iteration's decisions."""

    slots: list[tuple[int, Any, int, bool, int]] = field(default_factory=list)
    """(runner, ref of its fragments, decisions, whether they are a uniform group, environment steps) of each slot, or
    group of episodes, in an order that does not depend on who was faster."""
    metrics: list[Any] = field(default_factory=list)
    results: list[EpisodeResult] = field(default_factory=list)
    """Episodes that ended, in the order of the runners."""
    lost_steps: int = 0
    """Environment steps that were played and died with their runner before the learners had them."""
    pids: dict[int, Any] = field(default_factory=dict)
    """By runner, its process and those of its environments."""

    def add(self, contribution: Contribution) -> None:
        parts = contribution.refs, contribution.num_decisions, contribution.uniform, contribution.env_steps
        self.slots += zip(repeat(contribution.runner), *parts, strict=False)
        self.slots.sort(key=lambda slot: slot[0])
        self.results += contribution.results
        self.metrics.append(contribution.metrics)
        self.pids[contribution.runner] = contribution.pids

    @property
    def refs(self) -> list[Any]:
        return [slot[1] for slot in self.slots]

    @property
    def num_decisions(self) -> list[int]:
        return [slot[2] for slot in self.slots]

    def drop(self, indices: Sequence[int]) -> None:
        """Forget these slots' decisions, which are lost."""
        self.lost_steps += sum(self.slots[index][4] for index in indices)
        self.slots = [slot for index, slot in enumerate(self.slots) if index not in indices]

    def filter_groups(self, enough: int) -> None:
        """Leave out uniform groups, but for what is needed to give every learner something."""
        told_apart = [slot for slot in self.slots if not slot[3]]
        uniform = [slot for slot in self.slots if slot[3]]
        self.slots = told_apart + uniform[: max(0, enough - len(told_apart))]


class RolloutCollector(RunnerCalls):
    """Has the runners sample until an iteration's decisions are there, through failures of engines and runners; they
    stay with the runners.

    Args:
        runners, sync, pool, calls: see `RunnerCalls`.
        enough: slots, or groups of episodes, that are needed at least: one for every learner.
        filter_groups: whether uniform groups are left out.
    """

    def __init__(self, *runners_sync_and_pool: Any, enough: int, filter_groups: bool = False, **calls: Any) -> None:
        super().__init__(*runners_sync_and_pool, **calls)
        self._enough, self._filter_groups = enough, filter_groups

    def collect(
        self, iteration: int, quota: int, weights: Mapping[tuple[int, int], float], rollout: Rollout | None = None
    ) -> Rollout:
        """All slots' decisions of `iteration`; `quota` is of each slot, in decisions or whole episodes, `weights` the
        curriculum's.

        A runner that dies takes what only it has with it: the iteration goes on with the others', or waits for
        the runner where there are no others.

        Args:
            rollout: the same iteration's, to be made whole again behind `Rollout.drop`; None = a new one.

        Raises:
            RuntimeError: where nothing at all came back several times in a row.
        """
        rollout = Rollout() if rollout is None else rollout
        fruitless = 0
        while True:
            arguments = {"iteration": iteration, "quota": quota, "weights": weights}
            contributions: list[Contribution] = list(
                self._foreach("sample_slots", dict.fromkeys(self._attach(), arguments)).values()
            )
            for contribution in contributions:
                rollout.add(contribution)
            if len(rollout.slots) >= self._enough and not any(contribution.missing for contribution in contributions):
                if self._filter_groups:
                    rollout.filter_groups(self._enough)
                return rollout
            fruitless = 0 if any(contribution.played for contribution in contributions) else fruitless + 1
            self._check(fruitless, [contribution.engine_error for contribution in contributions])
