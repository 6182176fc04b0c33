"""The engine actors of one run: started together, given weights together, replaced when they die or hang.

Lives in the Algorithm's process, which calls it between sample calls; runners only get `handles`.

    pool = EnginePool(spec, 2, actor_options=[{"num_cpus": 1}] * 2, start_timeout_seconds=600)   # returns at once
    ...                                                    # start everything else meanwhile
    pool.wait_until_ready()
    pool.load_weights(manifest)                            # after each update
    pool.ensure_current(manifest)                          # before each sample call
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from vlarl_rllib.engines.actor import EngineActor, engine_env_vars
from vlarl_rllib.engines.protocol import EngineError, EngineSpec, EngineStatus
from vlarl_rllib.errors import one_line
from vlarl_rllib.telemetry.actors import ActorNames
from vlarl_rllib.types import INITIAL_VERSION, WeightManifest
from vlarl_rllib.weights.protocol import VersionGoneError

logger = logging.getLogger(__name__)

WAIT_NOTICE_SECONDS = 30.0
"""After this long a wait for engines says what it waits for."""
REJECTIONS = (ValueError, VersionGoneError)
"""What `load_weights` raises where the manifest is at fault and the engine is well."""


@dataclass(eq=False, slots=True)
class _Member:
    """One place in the pool; the actor in it changes."""

    index: int
    options: dict[str, Any]
    handle: Any = None
    pid: int = 0
    num_failures: int = 0
    """In a row; an engine that has sampled since it started begins a new row."""
    last_error: str = field(default="")


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
        self._actor_class: Any = ray.remote(engine_class)
        self._names = ActorNames(spec.run)
        self._start_timeout_seconds = start_timeout_seconds
        self._load_timeout_seconds = load_timeout_seconds
        self._ping_timeout_seconds = ping_timeout_seconds
        self._max_failures = max_failures
        self.num_restarts = 0
        self._members = [_Member(index, dict(options)) for index, options in enumerate(actor_options)]
        if len(self._members) != num:
            raise ValueError(f"{num} engines need as many actor_options, got {len(self._members)}")
        self._create(self._members)

    def wait_until_ready(self) -> None:
        """Wait for all engines, starting those anew that fail.

        Raises:
            RuntimeError: an engine failed `max_failures` times in a row; all engines are gone then.
        """
        try:
            self._settle(self._members, None)
        except BaseException:
            self.shutdown()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids of the engines, as of when they last answered."""
        return [member.pid for member in self._members]

    @property
    def handles(self) -> list[Any]:
        """Actors that were well and current when last looked at."""
        return [member.handle for member in self._members if member.handle is not None]

    def load_weights(self, manifest: WeightManifest) -> int:
        """Give every engine this version; one that fails or is late is replaced. Returns how many were.

        Raises:
            ValueError, VersionGoneError: the manifest is not what the engines need; they keep what they have.
            RuntimeError: an engine failed too often.
        """
        return self._replace(self._load(self._members, manifest), manifest)

    def ensure_current(self, manifest: WeightManifest | None) -> int:
        """Replace engines that are dead or hung and bring every engine to this version. Returns how many were replaced.

        Args:
            manifest: the last one pushed, still readable; None before the first push.

        Raises:
            as `load_weights`.
        """
        outcomes = self._call(self._members, "ping", timeout_seconds=self._ping_timeout_seconds)
        failed, stale = [], []
        version = INITIAL_VERSION if manifest is None else manifest.version
        for member, outcome in outcomes.items():
            if isinstance(outcome, BaseException):
                failed.append(self._blame(member, outcome))
                continue
            if outcome.num_decisions > 0:
                member.num_failures = 0
            if outcome.policy_version != version:
                stale.append(member)
        if manifest is not None:
            failed += self._load(stale, manifest)
        return self._replace(failed, manifest)

    def statuses(self) -> list[EngineStatus | None]:
        """Status by engine; None for one that does not answer."""
        outcomes = self._call(self._members, "status", timeout_seconds=self._ping_timeout_seconds)
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
            options = {"max_restarts": 0, "runtime_env": environment, **member.options}
            role = f"engine-{member.index}"
            name = f"{self._names.run}/{role}"
            member.handle = self._names.start(self._actor_class, role, options, self._spec, name)

    def _settle(self, members: Sequence[_Member], manifest: WeightManifest | None) -> None:
        """Wait for new actors and give them the weights; those that fail are made anew."""
        while members:
            outcomes = self._call(members, "ping", timeout_seconds=self._start_timeout_seconds)
            failed = [self._blame(member, error) for member, error in outcomes.items() if _is_error(error)]
            if manifest is not None:
                failed += self._load([member for member in members if member not in failed], manifest)
            self._renew(failed)
            members = failed

    def _renew(self, members: Sequence[_Member]) -> None:
        for member in members:
            self._kill(member)
        self._create(members)

    def _replace(self, members: Sequence[_Member], manifest: WeightManifest | None) -> int:
        self._renew(members)
        self._settle(members, manifest)
        return len(members)

    def _load(self, members: Sequence[_Member], manifest: WeightManifest) -> list[_Member]:
        """Load on all at once; returns the members that failed."""
        outcomes = self._call(members, "load_weights", manifest, timeout_seconds=self._load_timeout_seconds)
        for outcome in outcomes.values():
            cause = outcome.cause if isinstance(outcome, RayTaskError) else outcome
            if isinstance(cause, REJECTIONS):
                raise cause
        return [self._blame(member, error) for member, error in outcomes.items() if _is_error(error)]

    def _blame(self, member: _Member, error: Any) -> _Member:
        """Count a failure. Raises RuntimeError where it is one too many."""
        member.num_failures += 1
        member.last_error = one_line(error)
        logger.warning("engine-%d failed (%d in a row): %s", member.index, member.num_failures, member.last_error)
        if member.num_failures >= self._max_failures:
            raise RuntimeError(
                f"engine-{member.index} failed {member.num_failures} times in a row, at last with: {member.last_error}"
            )
        self.num_restarts += 1
        return member

    def _kill(self, member: _Member) -> None:
        if member.handle is not None:
            ray.kill(member.handle, no_restart=True)
            member.handle = None

    def _call(self, members: Sequence[_Member], method: str, *args: Any, timeout_seconds: float) -> dict[_Member, Any]:
        """Call `method` on all at once: each member's result, or the exception it ended with."""
        outcomes: dict[_Member, Any] = {}
        refs = {}
        for member in members:
            if member.handle is None:
                outcomes[member] = EngineError("the engine is not running")
            else:
                refs[getattr(member.handle, method).remote(*args)] = member
        late = _wait(list(refs), timeout_seconds, f"{method} of {len(refs)} engines ({self._spec.model_path})")
        for ref, member in refs.items():
            if ref in late:
                outcomes[member] = TimeoutError(f"{method} gave no answer within {timeout_seconds:g} s")
                continue
            try:
                outcomes[member] = outcome = ray.get(ref)
                if isinstance(outcome, EngineStatus):
                    member.pid = outcome.pid
            except (RayError, EngineError, *REJECTIONS) as error:
                outcomes[member] = error
        return {member: outcomes[member] for member in members}


def _wait(refs: list[Any], timeout_seconds: float, what: str) -> list[Any]:
    """Wait for all of `refs`; returns those that are late."""
    deadline = time.monotonic() + timeout_seconds
    late = refs
    while late and (left := deadline - time.monotonic()) > 0:
        _, late = ray.wait(late, num_returns=len(late), timeout=min(left, WAIT_NOTICE_SECONDS), fetch_local=False)
        if late and time.monotonic() < deadline:
            logger.info("still waiting for %s: %d have not answered", what, len(late))
    return late


def _is_error(outcome: Any) -> bool:
    return isinstance(outcome, BaseException)
