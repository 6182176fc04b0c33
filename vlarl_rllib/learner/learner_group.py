"""RLlib's LearnerGroup with its own start, calls and end.

RLlib's starts learners through Ray Train, whose process group waits 30 minutes for a dead peer and whose actors cannot be told a
placement-group bundle; its calls return errors as values and wait for every rank. Here the actors are ours, every call goes to all
ranks at once, raises the first error, and gives up on a frozen rank after `learners.timeout_seconds`. The rest of RLlib (Algorithm,
Checkpointable, weight sync) sees an ordinary LearnerGroup.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.rllib.core import COMPONENT_LEARNER
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.utils.actor_manager import RemoteCallResults, ResultOrError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from vlarl_rllib.errors import DivergedError, one_line
from vlarl_rllib.learner.collate import UpdatePlan, assign_owners
from vlarl_rllib.malloc import KEEP_FREED_MEMORY
from vlarl_rllib.settings import LearnerSettings, Settings
from vlarl_rllib.types import WeightManifest

logger = logging.getLogger(__name__)

PING_SECONDS = 10.0
"""A learner that no call keeps busy answers at once; after this long it counts as lost."""


class LearnerError(RuntimeError):
    """A learner raised; all of them live, so the same call would raise again."""


class LearnerGroupError(RuntimeError):
    """A learner died or froze; the group is beyond use until `rebuild`."""


class VLALearnerGroup(LearnerGroup):
    """`num_learners` FSDP ranks as actors, or one in this process for 0.

    Args:
        config: the VLAPPOConfig.
        module_spec: what RLlib derived for the policy.
        bundles: index of each learner's bundle in the current placement group; None = placed by Ray.
    """

    def __init__(self, *, config: Any, module_spec: Any = None, placement_group: Any = None, bundles: Sequence[int] | None = None) -> None:
        self.config = config.copy(copy_frozen=False)
        self._module_spec, self._bundles = module_spec, bundles
        self._is_shut_down = False
        self._learner: Any = None
        self._workers: list[Any] = []
        self._settings = Settings.from_dict(self.config.vla)
        self.timeout_seconds = self._settings.learners.timeout_seconds
        """Longest wait for all ranks to answer a call."""
        self.pids: list[int] = []
        """Process id of each rank's actor, in rank order."""
        self._received: list[tuple[int, int]] = []
        """(steps, owner) of each contribution that `receive` brought to the learners."""
        if self.is_local:
            self._learner = self.config.learner_class(config=config, module_spec=module_spec)
            self._learner.build()
        else:
            self._start_actors()

    def _start_actors(self) -> None:
        learners = self._settings.learners
        group = ray.util.get_current_placement_group()
        actor_class = ray.remote(num_cpus=learners.cpus, num_gpus=learners.gpus, max_restarts=0)(self.config.learner_class)
        for index in range(learners.num):
            options: dict[str, Any] = {"runtime_env": {"env_vars": _env_vars(learners)}}
            if group is not None and self._bundles is not None:
                options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, self._bundles[index])
            self._workers.append(actor_class.options(**options).remote(config=self.config, module_spec=self._module_spec))
        nodes = self._wait([worker.node.remote() for worker in self._workers])
        address, port = self._wait([self._workers[0].rendezvous.remote(one_node=len(set(nodes)) == 1)])[0]
        self.pids = self._wait([w.join.remote(rank, learners.num, address, port) for rank, w in enumerate(self._workers)])
        self._wait([w._set_learner_index_and_placement_group.remote(learner_index=i, placement_group=None) for i, w in enumerate(self._workers)])
        self._wait([w.build.remote() for w in self._workers])

    def rebuild(self) -> None:
        """Replace all ranks by new ones in the same places, with the weights of `model.path`: a checkpoint is to be loaded next.

        Raises:
            LearnerGroupError: where the new ones fail too.
        """
        assert self.is_remote, "a learner in this process is lost with it"
        self._kill_actors()
        self._received = []
        self._start_actors()

    # Calls

    def call(self, method: str, *args: Any, per_rank: Sequence[tuple[Any, ...]] | None = None, **kwargs: Any) -> list[Any]:
        """Call `method` on every rank at once; results in rank order.

        Args:
            per_rank: further positional arguments of each rank.

        Raises:
            LearnerGroupError: as soon as one rank dies, or where one takes longer than `timeout_seconds`.
            LearnerError: as soon as one rank raises.
            DivergedError: where that is because the numbers are no longer finite.
        """
        extra = per_rank if per_rank is not None else [()] * max(1, len(self))
        if self.is_local:
            return [getattr(self._learner, method)(*extra[0], *args, **kwargs)]
        return self._wait([getattr(w, method).remote(*extra[rank], *args, **kwargs) for rank, w in enumerate(self._workers)])

    def _wait(self, refs: list[Any]) -> list[Any]:
        """Results of all `refs`; looks at each as it arrives, since a failed rank leaves the others waiting in a collective."""
        pending, deadline = list(refs), time.monotonic() + self.timeout_seconds
        while pending:
            ready, pending = ray.wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                ranks = [refs.index(ref) for ref in pending]
                raise LearnerGroupError(f"learner rank(s) {ranks} gave no answer within learners.timeout_seconds = {self.timeout_seconds:g}")
            try:
                ray.get(ready)
            except RayActorError as error:
                raise LearnerGroupError(f"learner rank {refs.index(ready[0])} died: {one_line(error)}") from error
            except RayError as error:
                self._blame(refs.index(ready[0]), error)
        return ray.get(refs)

    def _blame(self, rank: int, error: RayError) -> None:
        """Raise what befell a rank: its own mistake, or a collective that broke because another one is gone."""
        if isinstance(error, RayTaskError) and isinstance(error.cause, DivergedError):
            raise error.cause from error
        pings = [w.ping.remote() for w in self._workers]
        _, silent = ray.wait(pings, num_returns=len(pings), timeout=PING_SECONDS)
        dead = [pings.index(ref) for ref in silent]
        for index, ref in enumerate(pings):
            try:
                if ref not in silent:
                    ray.get(ref)
            except RayActorError:
                dead.append(index)
        if dead:
            raise LearnerGroupError(f"learner rank(s) {sorted(dead)} died or hang; rank {rank} noticed: {one_line(error)}") from error
        raise LearnerError(f"learner rank {rank} failed: {one_line(error)}") from error

    # An iteration

    def receive(self, refs: Sequence[Any], num_steps: Sequence[int]) -> list[int]:
        """Have each rank fetch its share of an iteration's contributions.

        Args:
            refs: one ref (or, for a local learner, list) per contribution: the chunks that a slot played.
            num_steps: the steps behind each ref.

        Returns:
            The contributions that were lost with their runners; `update` does without them.
        """
        ranks = max(1, len(self))
        owners = assign_owners(num_steps, ranks)
        per_rank = [([ref for ref, owner in zip(refs, owners, strict=True) if owner == rank],) for rank in range(ranks)]
        iterators = [iter(steps) for steps in self.call("receive", per_rank=per_rank)]
        arrived = [next(iterators[owner]) for owner in owners]
        self._received = [(steps, owner) for steps, owner in zip(arrived, owners, strict=True) if steps is not None]
        return [index for index, steps in enumerate(arrived) if steps is None]

    def update(self, *, iteration: int, timesteps: dict[str, Any] | None = None, **kwargs: Any) -> list[dict[str, Any]]:  # type: ignore[override]
        """One PPO iteration on what `receive` brought.

        Args:
            iteration: counts from 0.

        Returns:
            Each rank's metrics.

        Raises:
            ValueError: where fewer contributions than learners arrived.
        """
        ranks, arrived, self._received = max(1, len(self)), self._received, []
        if len({owner for _, owner in arrived}) < ranks:
            raise ValueError(f"{len(arrived)} contributions arrived, too few for {ranks} learner(s); receive() comes before each update()")
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

    # RLlib's surface

    def get_state(self, components: Any = None, *, not_components: Any = None, **kwargs: Any) -> dict[str, Any]:
        """RLlib's small state (counters and the version of the weights); the weights themselves are `save_sharded`'s."""
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
        return 0 if self.is_local else self._settings.learners.num

    def shutdown(self) -> None:
        """End all learners; safe to call twice."""
        if self._is_shut_down:
            return
        self._is_shut_down = True
        if self._learner is not None:
            self._learner.shutdown()
        refs = [worker.shutdown.remote() for worker in self._workers]
        if refs:
            _, late = ray.wait(refs, num_returns=len(refs), timeout=5)
            if late:
                logger.info("%d learner(s) did not shut down by themselves", len(late))
        self._kill_actors()

    def _kill_actors(self) -> None:
        for worker in self._workers:
            ray.kill(worker)
        self._workers, self.pids = [], []

    def __del__(self) -> None:
        """RLlib's shuts down here; at interpreter exit that only raises. `VLAPPO.cleanup` calls `shutdown`."""


def _env_vars(learners: LearnerSettings) -> dict[str, str]:
    """Environment of a learner's process."""
    threads = {"OMP_NUM_THREADS": str(max(1, int(learners.cpus)))}
    return threads if learners.gpus else threads | KEEP_FREED_MEMORY
