"""The engine actors of one run: started together, given weights together, replaced when they die or hang.

Lives in the Algorithm's process, which calls it between sample calls; runners only get `handles`.

    pool = EnginePool(spec, 2, actor_options=[{"num_cpus": 1}] * 2, start_timeout_seconds=600)   # returns at once
    ...                                                    # start everything else meanwhile
    pool.wait_until_ready()
    takers = pool.outdated(version)                        # before each sample call: dead ones replaced
    intake = pool.begin(takers, manifest)                  # see `intake.Intake`
    pool.replace(intake.failed)

An engine that is replaced starts while the others serve; one whose node has died waits for another node. Only where
none is left, the pool waits too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray

from vlarl_rllib.engines.actor import EngineActor, engine_env_vars
from vlarl_rllib.engines.intake import WAIT_NOTICE_SECONDS, Intake, Taker, collect, send
from vlarl_rllib.engines.protocol import EngineSpec, EngineStatus
from vlarl_rllib.errors import one_line
from vlarl_rllib.ray_compat import lost_bundles
from vlarl_rllib.telemetry.actors import ActorNames
from vlarl_rllib.types import INITIAL_VERSION, Site, WeightManifest
from vlarl_rllib.weights.protocol import TransferError

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often engines that start are looked after where nothing else can be done."""


@dataclass(eq=False, slots=True)
class _Member(Taker):
    """One place in the pool; the actor in it changes."""

    options: dict[str, Any] = field(default_factory=dict)
    pid: int = 0
    place: Site = field(default_factory=Site)
    num_failures: int = 0
    """In a row; an engine that has sampled since it started begins a new row."""
    last_error: str = field(default="")
    starting: Any = None
    """What its first answer will come by, while it starts."""
    since: float = 0.0
    """When it began to start."""

    @property
    def is_ready(self) -> bool:
        """Whether it runs and has answered."""
        return self.handle is not None and self.starting is None

    @property
    def bundle(self) -> int | None:
        """Of the current placement group."""
        return getattr(self.options.get("scheduling_strategy"), "placement_group_bundle_index", None)


class EnginePool:
    """`num` engines with the same weights. The constructor asks Ray for the actors and does not wait for them.

    Args:
        spec: of every engine.
        actor_options: Ray options of each engine's actor: num_cpus, num_gpus, scheduling_strategy, ...
        start_timeout_seconds: longest wait for engines that are starting.
        load_timeout_seconds: for all engines to take a version, in parallel.
        ping_timeout_seconds: an engine that does not answer for so long counts as hung.
        max_failures: of one engine in a row, before the run is given up.
        engine_class: the actor's class.
    """

    def __init__(
        self,
        spec: EngineSpec,
        num: int,
        *,
        actor_options: Sequence[dict[str, Any]],
        start_timeout_seconds: float,
        load_timeout_seconds: float = 300.0,
        ping_timeout_seconds: float = 30.0,
        max_failures: int = 3,
        engine_class: type = EngineActor,
    ) -> None:
        self._spec = spec
        from vlarl_rllib.weights.ray_transports import tensor_transport_options  # imports torch

        self._actor_class: Any = ray.remote(engine_class)
        self._ray_options = tensor_transport_options(spec.gpus, spec.transport)
        self._names = ActorNames(spec.run)
        self._start_timeout_seconds = start_timeout_seconds
        self._load_timeout_seconds = load_timeout_seconds
        self._ping_timeout_seconds = ping_timeout_seconds
        self._max_failures = max_failures
        self.num_restarts = 0
        self._next_notice = time.monotonic() + WAIT_NOTICE_SECONDS
        self._members = [_Member(index, options=dict(options)) for index, options in enumerate(actor_options)]
        if len(self._members) != num:
            raise ValueError(f"{num} engines need as many actor_options, got {len(self._members)}")
        self._create(self._members)

    def wait_until_ready(self) -> None:
        """Wait for all engines, starting those anew that fail.

        Raises:
            RuntimeError: an engine failed `max_failures` times in a row; all engines are gone then.
        """
        try:
            while not all(member.is_ready for member in self._members):
                self._wait_for_one()
        except BaseException:
            self.shutdown()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids of the engines, as of when they last answered."""
        return [member.pid for member in self.members]

    @property
    def handles(self) -> list[Any]:
        """Actors that were well and current when last looked at."""
        return [member.handle for member in self.members]

    @property
    def members(self) -> list[Any]:
        """The engines that run, as takers of weights."""
        return [member for member in self._members if member.is_ready]

    def places(self) -> list[Site]:
        """Where the engines are, as of when they last answered."""
        return [member.place for member in self.members]

    def outdated(self, version: int) -> list[Any]:
        """Replace engines that are dead or hung; those that have another version than this one, which may be
        `INITIAL_VERSION`.

        Raises:
            RuntimeError: an engine failed too often.
        """
        self._look_after_starting()
        outcomes = self._call(self.members, "ping", timeout_seconds=self._ping_timeout_seconds)
        failed, others = {}, []
        for member, outcome in outcomes.items():
            if isinstance(outcome, BaseException):
                failed[member] = outcome
                continue
            if outcome.num_decisions > 0:
                member.num_failures = 0
            if outcome.policy_version != version:
                others.append(member)
        self.replace(failed)
        new = [member for member in self.members if member not in outcomes or member in failed]
        return others + ([] if version == INITIAL_VERSION else new)

    def begin(self, takers: Sequence[Any], manifest: WeightManifest) -> Intake:
        """Announce a version to some of the engines.

        Raises:
            ValueError: it is not what the engines need; they keep what they have.
        """
        return Intake(takers, manifest, self._load_timeout_seconds)

    def replace(self, failed: Mapping[Any, BaseException]) -> None:
        """Make those anew that failed, but for those to whom a version did not arrive: they are well. Waits where no
        engine is left.

        Raises:
            RuntimeError: an engine failed too often.
        """
        dead = [self._blame(member, error) for member, error in failed.items() if not isinstance(error, TransferError)]
        for member, error in failed.items():
            if isinstance(error, TransferError):
                self._count(member, error)
        self._renew(dead)
        while not self.members:
            self._wait_for_one()

    def statuses(self) -> list[EngineStatus | None]:
        """Status by engine; None for one that does not answer."""
        outcomes = self._call(self.members, "status", timeout_seconds=self._ping_timeout_seconds)
        return [None if isinstance(outcome, BaseException) else outcome for outcome in outcomes.values()]

    def follow_run(self, run: str, suite: str) -> None:
        """Have the engines tell metrics as this run's; waits for none of them."""
        self._spec = replace(self._spec, run=run, suite=suite)
        self._names = ActorNames(run)
        for handle in self.handles:
            handle.follow_run.remote(run, suite)

    def shutdown(self) -> None:
        """Kill every actor; safe to call twice."""
        for member in self._members:
            self._kill(member)

    def _create(self, members: Sequence[_Member]) -> None:
        environment = {"env_vars": engine_env_vars(self._spec)}
        for member in members:
            options = {"max_restarts": 0, "runtime_env": environment, **self._ray_options, **member.options}
            role = f"engine-{member.index}"
            name = f"{self._names.run}/{role}"
            member.handle = self._names.start(self._actor_class, role, options, self._spec, name)
            member.starting, member.since = member.handle.ping.remote(), time.monotonic()

    def _look_after_starting(self) -> None:
        """Take in engines that have started; begin anew with those that failed to, or whose node is there again."""
        waiting = [member for member in self._members if not member.is_ready]
        lost = lost_bundles() if any(member.bundle is not None for member in waiting) else set()
        for member in waiting:
            if member.bundle in lost:
                self._kill(member)
        failed = {m: error for m in waiting if m.starting is not None and (error := self._start_failure(m)) is not None}
        for member, error in failed.items():
            self._blame(member, error)
        self._renew([member for member in waiting if member in failed or member.handle is None])

    def _start_failure(self, member: _Member) -> BaseException | None:
        """What kept it from starting; None where it has started, or still may."""
        late = time.monotonic() - member.since > self._start_timeout_seconds
        if not ray.wait([member.starting], timeout=0.0, fetch_local=False)[0]:
            return TimeoutError(f"did not start within {self._start_timeout_seconds:g} s") if late else None
        (outcome,) = collect({member: member.starting}, LOOK_SECONDS, "the start").values()
        if isinstance(outcome, BaseException):
            return outcome
        member.starting, member.pid, member.place = None, outcome.pid, outcome.place
        return None

    def _wait_for_one(self) -> None:
        """Until a start has succeeded or failed, or an engine's node is there again; for a while at most."""
        starting = [member.starting for member in self._members if member.starting is not None]
        if starting:
            ray.wait(starting, timeout=LOOK_SECONDS, fetch_local=False)
        else:
            time.sleep(LOOK_SECONDS)
        self._look_after_starting()
        if time.monotonic() >= self._next_notice:
            self._next_notice = time.monotonic() + WAIT_NOTICE_SECONDS
            names = ", ".join(f"engine-{m.index}" for m in self._members if m.starting is not None)
            homeless = ", ".join(f"engine-{m.index}" for m in self._members if m.handle is None)
            logger.warning("waiting for engines: starting: %s; without a node: %s", names or "-", homeless or "-")

    def _renew(self, members: Sequence[_Member]) -> None:
        """Start them anew, but for those whose node is lost."""
        lost = lost_bundles() if any(member.bundle is not None for member in members) else set()
        for member in members:
            self._kill(member)
        self._create([member for member in members if member.bundle not in lost])

    def _blame(self, member: _Member, error: Any) -> _Member:
        """Count a failure that costs the engine."""
        self._count(member, error)
        self.num_restarts += 1
        return member

    def _count(self, member: _Member, error: Any) -> None:
        """Raise RuntimeError where a failure is one too many."""
        member.num_failures += 1
        member.last_error = one_line(error)
        logger.warning("engine-%d failed (%d in a row): %s", member.index, member.num_failures, member.last_error)
        if member.num_failures >= self._max_failures:
            raise RuntimeError(
                f"engine-{member.index} failed {member.num_failures} times in a row, at last with: {member.last_error}"
            )

    def _kill(self, member: _Member) -> None:
        if member.handle is not None:
            ray.kill(member.handle, no_restart=True)
            member.handle, member.starting, member.base = None, None, ""

    def _call(self, members: Sequence[_Member], method: str, *, timeout_seconds: float) -> dict[_Member, Any]:
        """Call `method` on all at once: each member's result, or the exception it ended with."""
        outcomes: dict[_Member, Any] = send(members, method)
        outcomes = collect(outcomes, timeout_seconds, f"{method} of {len(outcomes)} engines ({self._spec.model_path})")
        for member, outcome in outcomes.items():
            if isinstance(outcome, EngineStatus):
                member.pid, member.place = outcome.pid, outcome.place
        return outcomes
