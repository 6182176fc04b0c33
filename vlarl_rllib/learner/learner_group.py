"""RLlib's LearnerGroup with its own start, calls and end.

RLlib's starts learners through Ray Train, whose process group waits 30 minutes for a dead peer and whose actors cannot be told a
placement-group bundle; its calls return errors as values and wait for every rank. Here the actors are ours, every call goes to all
ranks at once, raises the first error, and gives up on a frozen rank after `learners.timeout_seconds`. The rest of RLlib (Algorithm,
Checkpointable, weight sync) sees an ordinary LearnerGroup.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.utils.actor_manager import FaultTolerantActorManager
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from vlarl_rllib.learner.collate import UpdatePlan, assign_owners
from vlarl_rllib.settings import Settings
from vlarl_rllib.types import WeightManifest

logger = logging.getLogger(__name__)


class LearnerGroupError(RuntimeError):
    """A learner died, froze or raised; the group is beyond use and is to be rebuilt from a checkpoint."""


class VLALearnerGroup(LearnerGroup):
    """`num_learners` FSDP ranks as actors, or one in this process for 0.

    Args:
        config: the VLAPPOConfig.
        module_spec: what RLlib derived for the policy.
        bundles: index of each learner's bundle in the current placement group; None = placed by Ray.
    """

    def __init__(self, *, config: Any, module_spec: Any = None, placement_group: Any = None, bundles: Sequence[int] | None = None) -> None:
        self.config = config.copy(copy_frozen=False)
        self._module_spec = module_spec
        self._is_shut_down = False
        self._ts_dropped = 0
        self._learner: Any = None
        self._workers: list[Any] = []
        self._worker_manager: Any = None
        self._settings = Settings.from_dict(self.config.vla)
        if self.is_local:
            self._learner = self.config.learner_class(config=config, module_spec=module_spec)
            self._learner.build()
            return
        self._start_actors(config, module_spec, bundles)

    def _start_actors(self, config: Any, module_spec: Any, bundles: Sequence[int] | None) -> None:
        learners = self._settings.learners
        group = ray.util.get_current_placement_group()
        actor_class = ray.remote(num_cpus=learners.cpus, num_gpus=learners.gpus, max_restarts=0)(self.config.learner_class)
        for index in range(learners.num):
            options: dict[str, Any] = {"runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(max(1, int(learners.cpus)))}}}
            if group is not None and bundles is not None:
                options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, bundles[index])
            self._workers.append(actor_class.options(**options).remote(config=config, module_spec=module_spec))
        self._worker_manager = FaultTolerantActorManager(self._workers)
        address, port = self._wait([self._workers[0].rendezvous.remote()])[0]
        self._wait([w.join.remote(rank, learners.num, address, port) for rank, w in enumerate(self._workers)])
        self._wait([w._set_learner_index_and_placement_group.remote(learner_index=i, placement_group=None) for i, w in enumerate(self._workers)])
        self._wait([w.build.remote() for w in self._workers])

    # Calls

    def call(self, method: str, *args: Any, per_rank: Sequence[tuple[Any, ...]] | None = None, **kwargs: Any) -> list[Any]:
        """Call `method` on every rank at once; results in rank order.

        Args:
            per_rank: further positional arguments of each rank.

        Raises:
            LearnerGroupError: as soon as one rank fails, or where one takes longer than `learners.timeout_seconds`.
        """
        extra = per_rank if per_rank is not None else [()] * max(1, len(self))
        if self.is_local:
            return [getattr(self._learner, method)(*extra[0], *args, **kwargs)]
        return self._wait([getattr(w, method).remote(*extra[rank], *args, **kwargs) for rank, w in enumerate(self._workers)])

    def _wait(self, refs: list[Any]) -> list[Any]:
        """Results of all `refs`; looks at each as it arrives, since a failed rank leaves the others waiting in a collective."""
        pending, timeout = list(refs), self._settings.learners.timeout_seconds
        while pending:
            ready, pending = ray.wait(pending, timeout=timeout)
            if not ready:
                ranks = [refs.index(ref) for ref in pending]
                raise LearnerGroupError(f"learner rank(s) {ranks} gave no answer within learners.timeout_seconds = {timeout:g}")
            try:
                ray.get(ready)
            except ray.exceptions.RayError as error:
                raise LearnerGroupError(f"learner rank {refs.index(ready[0])} failed: {error}") from error
        return ray.get(refs)

    # RLlib's surface

    def update(  # type: ignore[override]
        self, *, episodes_refs: Sequence[Any], num_steps: Sequence[int], iteration: int, timesteps: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[dict[str, Any]]:
        """One PPO iteration.

        Args:
            episodes_refs: one ref (or, for a local learner, list) per slot: the chunks it played.
            num_steps: the steps behind each ref.
            iteration: counts from 0.

        Returns:
            Each rank's metrics. Contributions lost with their runner are left out.

        Raises:
            ValueError: where fewer contributions are left than learners.
        """
        ranks = max(1, len(self))
        owners = assign_owners(num_steps, ranks)
        per_rank = [([ref for ref, owner in zip(episodes_refs, owners, strict=True) if owner == rank],) for rank in range(ranks)]
        received = self.call("receive", per_rank=per_rank)
        iterators = [iter(steps) for steps in received]
        arrived = [(steps, owner) for owner in owners if (steps := next(iterators[owner])) is not None]
        if len({owner for _, owner in arrived}) < ranks:
            raise ValueError(
                f"{len(arrived)} of {len(owners)} contributions arrived, too few for {ranks} learner(s); the rest were lost with their runners"
            )
        plan = UpdatePlan(
            steps=tuple(steps for steps, _ in arrived),
            owners=tuple(owner for _, owner in arrived),
            num_ranks=ranks,
            seed=self._settings.run.seed * 1_000_003 + iteration,
        )
        return self.call("update", plan=plan, iteration=iteration, timesteps=timesteps)

    def publish_weights(self, version: int) -> WeightManifest:
        """Gather the policy from all ranks and make it readable to engines as `version`."""
        return self.call("publish_weights", version)[0]

    def foreach_learner(self, func: Callable[..., Any], **kwargs: Any) -> Any:
        results = super().foreach_learner(func, **kwargs)
        self._get_results(results)  # raises what a rank raised
        return results

    def __len__(self) -> int:
        return 0 if self.is_local else len(self._workers)

    def shutdown(self) -> None:
        """End all learners; safe to call twice."""
        if self._is_shut_down:
            return
        self._is_shut_down = True
        if self._learner is not None:
            self._learner.shutdown()
        for worker in self._workers:
            try:
                ray.get(worker.shutdown.remote(), timeout=5)
            except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
                logger.info("a learner did not shut down by itself: %s", type(error).__name__)
            ray.kill(worker)

    def __del__(self) -> None:
        """RLlib's shuts down here; at interpreter exit that only raises. `VLAPPO.cleanup` calls `shutdown`."""
