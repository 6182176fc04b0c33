"""An iteration's decisions from all runners."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

from vlarl_rllib.rollout.contribution import Contribution, Portion
from vlarl_rllib.rollout.runner_pool import RunnerCalls
from vlarl_rllib.types import EpisodeResult


@dataclass
class Rollout:
    """An iteration's decisions."""

    portions: list[tuple[int, Portion]] = field(default_factory=list)
    """With their runners, in an order that does not depend on who was faster."""
    metrics: list[Any] = field(default_factory=list)
    results: list[EpisodeResult] = field(default_factory=list)
    """Episodes that ended, in the order of the runners."""
    lost_steps: int = 0
    """Environment steps that were played and died with their runner before the learners had them."""
    stale_steps: int = 0
    """Environment steps that were left out because their policy was too old."""
    pids: dict[int, Any] = field(default_factory=dict)
    """By runner, its process and those of its environments."""
    staleness: Mapping[int, int] = field(default_factory=dict)
    """Decisions by how many updates their policy is behind the learners'."""

    def add(self, contribution: Contribution) -> None:
        self.portions += zip(repeat(contribution.runner), contribution.portions)
        self.portions.sort(key=lambda item: item[0])
        self.results += contribution.results
        if contribution.metrics is not None:
            self.metrics.append(contribution.metrics)
        self.pids[contribution.runner] = contribution.pids

    def join(self, other: Rollout) -> None:
        """Take over all of another one."""
        self.portions = sorted(self.portions + other.portions, key=lambda item: item[0])
        self.results += other.results
        self.metrics += other.metrics
        self.lost_steps += other.lost_steps
        self.stale_steps += other.stale_steps
        self.pids |= other.pids

    @property
    def refs(self) -> list[Any]:
        return [portion.ref for _, portion in self.portions]

    @property
    def num_decisions(self) -> list[int]:
        return [portion.num_decisions for _, portion in self.portions]

    def drop(self, indices: Sequence[int]) -> None:
        """Forget these portions, which are lost."""
        self.lost_steps += sum(self.portions[index][1].env_steps for index in indices)
        self.portions = [item for index, item in enumerate(self.portions) if index not in indices]

    def filter_groups(self, enough: int) -> None:
        """Leave out uniform groups, but for what is needed to give every learner something."""
        told_apart = [item for item in self.portions if not item[1].uniform]
        uniform = [item for item in self.portions if item[1].uniform]
        self.portions = told_apart + uniform[: max(0, enough - len(told_apart))]


class RolloutCollector(RunnerCalls):
    """Has the runners sample until an iteration's decisions are there, through failures of engines and runners; they
    stay with the runners.

    Args:
        runners, sync, pool, calls: see `RunnerCalls`.
        enough: how many slots, or groups of episodes, are needed at least: one for every learner that there is.
        filter_groups: whether uniform groups are left out.
    """

    meanwhile: Callable[[], None] | None = None
    """What to do now and then while the learners update."""

    def __init__(
        self, *runners_sync_and_pool: Any, enough: Callable[[], int], filter_groups: bool = False, **calls: Any
    ) -> None:
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
            if len(rollout.portions) >= self._enough() and not any(
                contribution.missing for contribution in contributions
            ):
                if self._filter_groups:
                    rollout.filter_groups(self._enough())
                return rollout
            fruitless = 0 if any(contribution.played for contribution in contributions) else fruitless + 1
            self._check(fruitless, [contribution.engine_error for contribution in contributions])
