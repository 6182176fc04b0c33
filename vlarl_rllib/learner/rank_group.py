"""FSDP ranks as actors: started in their places, called all at once, given up on when one dies or freezes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from vlarl_rllib.errors import DivergedError, one_line
from vlarl_rllib.process.malloc import KEEP_FREED_MEMORY
from vlarl_rllib.ray_compat import nodes_of_bundles
from vlarl_rllib.settings import LearnerSettings, Role, Settings, calculate_runtime_args
from vlarl_rllib.telemetry.actors import ActorNames
from vlarl_rllib.weights.ray_transports import tensor_transport_options

if TYPE_CHECKING:
    from vlarl_rllib.learner.rank import Rank

logger = logging.getLogger(__name__)

PING_SECONDS = 10.0
"""A learner that no call keeps busy answers at once; after this long it counts as lost."""
WAIT_NOTICE_SECONDS, LOOK_SECONDS = 30.0, 1.0
"""How often a wait for a node is told, and how often it is looked for."""
MEANWHILE_SECONDS = 0.02
"""How often the driver does something else while learners work."""


class LearnerError(RuntimeError):
    """A learner raised; all of them live, so the same call would raise again."""


class LearnerGroupError(RuntimeError):
    """A learner died or froze; the group is beyond use until `rebuild`."""


class PlaceLost(Exception):
    """The node of a learner that was to start has died."""


class RankGroup:
    """`learners.num` ranks as actors, or one in this process for 0. Every call goes to all of them at once and raises
    the first error.

    Args:
        rank_class: what the ranks are; has `build` and `shutdown`.
        arguments: of its constructor.
        settings: of the run.
        bundles: index of each rank's bundle in the current placement group; None = where `placement` says.
        run: what the run is called.
    """

    def __init__(
        self,
        rank_class: type[Rank],
        arguments: Mapping[str, Any],
        settings: Settings,
        bundles: Sequence[int] | None = None,
        run: str = "vlarl",
    ) -> None:
        self.settings, self.names = settings, ActorNames(run)
        self.timeout_seconds = settings.learners.timeout_seconds
        """Longest wait for all ranks to answer a call."""
        self.local: Any = None
        """The one in this process."""
        self.workers: list[Any] = []
        self.pids: list[int] = []
        """Process id of each rank's actor, in rank order."""
        self._rank_class, self._arguments, self._bundles = rank_class, dict(arguments), bundles
        self._is_shut_down = False
        if settings.learners.num:
            self._start_actors()
        else:
            self.local = rank_class(**self._arguments)
            self.local.build()

    @property
    def num_ranks(self) -> int:
        """That there are now: fewer than planned where nodes are lost."""
        return max(1, len(self.workers))

    @property
    def can_grow(self) -> bool:
        """Whether ranks are missing whose places are there again."""
        return len(self.workers) < self.settings.learners.num and len(self.workers) < len(self._places())

    def _places(self) -> list[int]:
        """Planned ranks that have a place now, those of one node behind one another."""
        if self._bundles is None or not (nodes := nodes_of_bundles()):
            return list(range(self.settings.learners.num))
        return side_by_side({rank: nodes[bundle] for rank, bundle in enumerate(self._bundles) if nodes[bundle]})

    def _start_actors(self) -> None:
        """Start a rank in each place that is there; where one goes before all have started, begin again.

        Raises:
            LearnerGroupError: a rank does not start.
        """
        while True:
            places = self._wait_for_places()
            try:
                return self._start_ranks(places)
            except PlaceLost:
                logger.warning("a node was lost while learners started on it; they start on those that are left")
                self._kill_actors()

    def _wait_for_places(self) -> list[int]:
        """Ray may find a node for one place long before the next; the first one is waited for without end."""
        next_word = time.monotonic() + WAIT_NOTICE_SECONDS
        while not (places := self._places()):
            if time.monotonic() >= next_word:
                logger.warning("no node has a place for a learner; waiting for one")
                next_word += WAIT_NOTICE_SECONDS
            time.sleep(LOOK_SECONDS)
        if len(places) < self.settings.learners.num:
            logger.warning("%d of %d learners start: nodes are missing", len(places), self.settings.learners.num)
        return places

    def _start_ranks(self, places: Sequence[int]) -> None:
        learners, plan = self.settings.learners, calculate_runtime_args(self.settings)
        group = ray.util.get_current_placement_group()
        direct = tensor_transport_options(learners.gpus, self.settings.weights.transport)
        actor_class = ray.remote(num_cpus=learners.cpus, num_gpus=learners.gpus, max_restarts=0)(self._rank_class)
        for index in places:
            options: dict[str, Any] = {"runtime_env": {"env_vars": _env_vars(learners)}, **direct}
            if group is not None and self._bundles is not None:
                options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, self._bundles[index])
            else:
                options |= plan.bundles[plan.bundle_of(Role.LEARNER, index)].options
            self.workers.append(self.names.start(actor_class, f"learner-{index}", options, **self._arguments))
        nodes = self._wait(
            [worker.node.remote() for worker in self.workers], partial(self._require_places, places), LOOK_SECONDS
        )
        address, port = self._wait([self.workers[0].rendezvous.remote(one_node=len(set(nodes)) == 1)])[0]
        self.pids = self._wait([w.join.remote(rank, len(places), address, port) for rank, w in enumerate(self.workers)])
        self._wait([w.build.remote() for w in self.workers])

    def _require_places(self, places: Sequence[int]) -> None:
        """While ranks start: Ray would wait for a node to come back."""
        if not set(places) <= set(self._places()):
            raise PlaceLost

    def rebuild(self) -> None:
        """Replace all ranks by new ones in the places that are there, with the weights of `model.path`: a checkpoint is
        to be loaded next.

        Raises:
            LearnerGroupError: where the new ones fail too.
        """
        assert self.local is None, "a learner in this process is lost with it"
        self._kill_actors()
        self._start_actors()

    def reconfigure(self, settings: Settings, **arguments: Any) -> None:
        """Have all ranks `reconfigure` with these arguments, which also replace those of the constructor for whoever is
        started later."""
        self.settings = settings
        self._arguments |= arguments
        self.call("reconfigure", **arguments)

    # Calls

    def call(
        self,
        method: str,
        *args: Any,
        per_rank: Sequence[tuple[Any, ...]] | None = None,
        meanwhile: Callable[[], None] | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Call `method` on every rank at once; results in rank order.

        Args:
            per_rank: further positional arguments of each rank.
            meanwhile: what to do now and then while actors work.

        Raises:
            LearnerGroupError: as soon as one rank dies, or where one takes longer than `timeout_seconds`.
            LearnerError: as soon as one rank raises.
            DivergedError: where that is because the numbers are no longer finite.
        """
        extra = per_rank if per_rank is not None else [()] * self.num_ranks
        if self.local is not None:
            return [getattr(self.local, method)(*extra[0], *args, **kwargs)]
        return self._wait(
            [getattr(w, method).remote(*extra[rank], *args, **kwargs) for rank, w in enumerate(self.workers)],
            meanwhile,
        )

    def _wait(
        self, refs: list[Any], meanwhile: Callable[[], None] | None = None, every: float = MEANWHILE_SECONDS
    ) -> list[Any]:
        """Results of all `refs`; looks at each as it arrives, since a failed rank leaves the others waiting in a
        collective."""
        pending, deadline = list(refs), time.monotonic() + self.timeout_seconds
        while pending:
            left = max(0.0, deadline - time.monotonic())
            ready, pending = ray.wait(pending, timeout=left if meanwhile is None else min(left, every))
            if meanwhile is not None:
                meanwhile()
                if not ready and time.monotonic() < deadline:
                    continue
            if not ready:
                ranks = [refs.index(ref) for ref in pending]
                raise LearnerGroupError(
                    f"learner rank(s) {ranks} gave no answer within learners.timeout_seconds = {self.timeout_seconds:g}"
                )
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
        pings = [w.ping.remote() for w in self.workers]
        _, silent = ray.wait(pings, num_returns=len(pings), timeout=PING_SECONDS)
        dead = [pings.index(ref) for ref in silent]
        for index, ref in enumerate(pings):
            try:
                if ref not in silent:
                    ray.get(ref)
            except RayActorError:
                dead.append(index)
        if dead:
            raise LearnerGroupError(
                f"learner rank(s) {sorted(dead)} died or hang; rank {rank} noticed: {one_line(error)}"
            ) from error
        raise LearnerError(f"learner rank {rank} failed: {one_line(error)}") from error

    def shutdown(self) -> None:
        """End all ranks; safe to call twice."""
        if self._is_shut_down:
            return
        self._is_shut_down = True
        if self.local is not None:
            self.local.shutdown()
        refs = [worker.shutdown.remote() for worker in self.workers]
        if refs:
            _, late = ray.wait(refs, num_returns=len(refs), timeout=5)
            if late:
                logger.info("%d learner(s) did not shut down by themselves", len(late))
        self._kill_actors()

    def _kill_actors(self) -> None:
        for worker in self.workers:
            ray.kill(worker)
        self.workers, self.pids = [], []


def side_by_side(nodes: Mapping[int, str]) -> list[int]:
    """Places in an order in which those of one node follow one another: FSDP's shards are ranks that do
    (`learners.fsdp.mesh`), and Ray lays bundles that ask for the same in any order.

    Args:
        nodes: of each place.
    """
    order = list(dict.fromkeys(nodes.values()))
    return sorted(nodes, key=lambda place: (order.index(nodes[place]), place))


def _env_vars(learners: LearnerSettings) -> dict[str, str]:
    """Environment of a learner's process."""
    threads = {"OMP_NUM_THREADS": str(max(1, int(learners.cpus)))}
    return threads if learners.gpus else threads | KEEP_FREED_MEMORY
