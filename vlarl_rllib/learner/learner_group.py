"""RLlib's LearnerGroup with its own start, calls and end.

RLlib's starts learners through Ray Train, whose process group waits 30 minutes for a dead peer and whose actors cannot
be told a placement-group bundle; its calls return errors as values and wait for every rank. Here they are a
`RankGroup`. The rest of RLlib (Algorithm, Checkpointable, weight sync) sees an ordinary LearnerGroup.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ray.rllib.core import COMPONENT_LEARNER, DEFAULT_MODULE_ID
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.utils.actor_manager import RemoteCallResults, ResultOrError

from vlarl_rllib.learner.collate import UpdatePlan, assign_owners
from vlarl_rllib.learner.rank_group import RankGroup
from vlarl_rllib.settings import Settings
from vlarl_rllib.telemetry.actors import ActorNames


class VLALearnerGroup(LearnerGroup):
    """`num_learners` FSDP ranks as actors, or one in this process for 0.

    Args:
        config: the VLAPPOConfig.
        module_spec: what RLlib derived for the policy.
        bundles: index of each learner's bundle in the current placement group; None = placed by Ray.
    """

    def __init__(
        self, *, config: Any, module_spec: Any = None, placement_group: Any = None, bundles: Sequence[int] | None = None
    ) -> None:
        self.config = config.copy(copy_frozen=False)
        self._is_shut_down = False
        self._received: list[tuple[int, int]] = []
        """(steps, owner) of each contribution that `receive` brought to the learners."""
        settings = Settings.from_dict(self.config.vla)
        learner_config = config if not settings.learners.num else self.config
        self.ranks = RankGroup(
            self.config.learner_class, {"config": learner_config, "module_spec": module_spec}, settings, bundles,
            self.config.run_name or "vlarl",
        )  # fmt: skip

    @property
    def _learner(self) -> Any:
        """RLlib's name for the one in this process."""
        return self.ranks.local

    @property
    def pids(self) -> list[int]:
        """Process id of each rank's actor, in rank order."""
        return self.ranks.pids

    def call(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """See `RankGroup.call`."""
        return self.ranks.call(method, *args, **kwargs)

    @property
    def can_grow(self) -> bool:
        """See `RankGroup.can_grow`."""
        return self.ranks.can_grow

    def rebuild(self) -> None:
        """See `RankGroup.rebuild`."""
        self._received = []
        self.ranks.rebuild()

    def reconfigure(self, config: Any) -> None:
        """See `VLALearner.reconfigure`."""
        self.config, self._received = config, []
        self.ranks.names = ActorNames(config.run_name)
        self.ranks.reconfigure(Settings.from_dict(config.vla), config=config)

    # An iteration

    def receive(self, refs: Sequence[Any], num_decisions: Sequence[int]) -> list[int]:
        """Have each rank fetch its share of an iteration's contributions.

        Args:
            refs: one ref (or, for a local learner, list) per contribution: the fragments that a slot played.
            num_decisions: behind each ref.

        Returns:
            The contributions that were lost with their runners; `update` does without them.
        """
        ranks = self.ranks.num_ranks
        owners = assign_owners(num_decisions, ranks)
        per_rank = [([ref for ref, owner in zip(refs, owners, strict=True) if owner == rank],) for rank in range(ranks)]
        iterators = [iter(steps) for steps in self.call("receive", per_rank=per_rank)]
        arrived = [next(iterators[owner]) for owner in owners]
        self._received = [(steps, owner) for steps, owner in zip(arrived, owners, strict=True) if steps is not None]
        return [index for index, steps in enumerate(arrived) if steps is None]

    def update(  # type: ignore[override]
        self,
        *,
        iteration: int,
        timesteps: dict[str, Any] | None = None,
        meanwhile: Callable[[], None] | None = None,
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        """One PPO iteration on what `receive` brought.

        Args:
            iteration: counts from 0.
            meanwhile: what to do now and then, where learners are actors.

        Returns:
            Each rank's metrics.

        Raises:
            ValueError: where fewer contributions than learners arrived.
        """
        ranks, arrived, self._received = self.ranks.num_ranks, self._received, []
        if len({owner for _, owner in arrived}) < ranks:
            raise ValueError(
                f"{len(arrived)} contributions arrived, too few for {ranks} learner(s); receive() comes before "
                "each update()"
            )
        plan = UpdatePlan(
            steps=tuple(steps for steps, _ in arrived),
            owners=tuple(owner for _, owner in arrived),
            num_ranks=ranks,
            seed=self.ranks.settings.run.seed * 1_000_003 + iteration,
        )
        return self.call("update", plan=plan, iteration=iteration, timesteps=timesteps, meanwhile=meanwhile)

    @property
    def local_module(self) -> Any:
        """The module of a learner in this process, with its weights; None where learners are actors."""
        return self._learner.module[DEFAULT_MODULE_ID] if self.is_local else None

    # RLlib's surface

    def get_state(self, components: Any = None, *, not_components: Any = None, **kwargs: Any) -> dict[str, Any]:
        """RLlib's small state (counters and the version of the weights); the weights themselves are
        `save_sharded`'s."""
        if not self._check_component(COMPONENT_LEARNER, components, not_components):
            return {}
        inner = {
            "components": self._get_subcomponents(COMPONENT_LEARNER, components),
            "not_components": self._get_subcomponents(COMPONENT_LEARNER, not_components),
        }
        return {COMPONENT_LEARNER: self.call("get_state", **inner, **kwargs)[0]}

    def set_state(self, state: dict[str, Any]) -> None:
        if COMPONENT_LEARNER in state:
            self.call("set_state", state[COMPONENT_LEARNER])

    def get_checkpointable_components(self) -> list[Any]:
        """None: RLlib would save and restore one of them past `call`, that is, without a time-out."""
        return []

    def foreach_learner(self, func: Callable[..., Any], **kwargs: Any) -> Any:
        results = RemoteCallResults()
        if self.is_local:
            results.add_result(None, ResultOrError(result=func(self._learner)), None)
            return results
        for rank, result in enumerate(self.call("apply", func)):
            results.add_result(rank, ResultOrError(result=result), None)
        return results

    def __len__(self) -> int:
        return 0 if self.is_local else self.ranks.num_ranks

    def shutdown(self) -> None:
        """End all learners; safe to call twice."""
        self._is_shut_down = True
        self.ranks.shutdown()

    def __del__(self) -> None:
        """RLlib's shuts down here; at interpreter exit that only raises. `VLAPPO.cleanup` calls `shutdown`."""
