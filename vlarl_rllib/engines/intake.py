"""A version of the weights on its way into engine actors, driven by whoever reads it from the learners.

    intake = pool.begin(takers, manifest)
    intake.feed(bucket)                       # returns at once
    intake.wait()                             # nobody reads the bucket any more
    intake.commit()
    intake.failed                             # {taker: what it failed with}

An engine that fails drops out and holds up nobody.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from vlarl_rllib.engines.protocol import EngineError
from vlarl_rllib.types import WeightBucket, WeightManifest
from vlarl_rllib.weights.protocol import TransferError

logger = logging.getLogger(__name__)

WAIT_NOTICE_SECONDS = 30.0
"""After this long a wait for engines says what it waits for."""
EXPECTED_ERRORS = (RayError, EngineError, TransferError, ValueError)
"""What an engine may answer with."""


@dataclass(eq=False, slots=True)
class Taker:
    """An engine that takes weights."""

    index: int
    handle: Any = None
    """Its actor; None = it is not running."""
    base: str = ""
    """Which frozen tensors of the learners' it has; see `WeightManifest.base`."""


Some = TypeVar("Some", bound=Taker)


class Intake:
    """One version for some engines. See the module.

    Raises:
        ValueError: the version is not what the engines need; they keep what they have.
    """

    def __init__(self, takers: Sequence[Any], manifest: WeightManifest, timeout_seconds: float) -> None:
        self.failed: dict[Any, BaseException] = {}
        self._manifest, self._timeout_seconds = manifest, timeout_seconds
        self._taking: list[Taker] = list(takers)
        self._under_way: dict[Taker, Any] = {}
        self._send("begin_update", manifest)
        self.wait()
        if rejection := next((e for e in self.failed.values() if isinstance(e, ValueError)), None):
            self.abort("another engine refused it")
            raise rejection

    @property
    def is_over(self) -> bool:
        """Whether no engine takes it any more."""
        return not self._taking

    def feed(self, bucket: WeightBucket) -> None:
        """Have the engines load a bucket, those excepted that have these very tensors."""
        self._send(
            "feed", bucket, to=[taker for taker in self._taking if not (bucket.frozen and self._has_frozen(taker))]
        )

    def wait(self) -> None:
        """Until each engine has answered, or dropped out."""
        what = f"{len(self._under_way)} engines to load version {self._manifest.version}"
        for taker, outcome in collect(self._under_way, self._timeout_seconds, what).items():
            if isinstance(outcome, BaseException):
                self.failed[taker] = outcome
        self._under_way = {}
        self._taking = [taker for taker in self._taking if taker not in self.failed]

    def commit(self) -> None:
        """All of it is there: the engines sample from it."""
        self._send("end_update")
        self.wait()
        for taker in self._taking:
            taker.base = self._manifest.base

    def abort(self, why: str) -> None:
        """Nothing more comes; waits for nobody."""
        for taker in self._taking:
            with suppress(RayError):
                taker.handle.abort_update.remote(why)

    def _has_frozen(self, taker: Taker) -> bool:
        return taker.base == self._manifest.base

    def _send(self, method: str, *args: Any, to: Sequence[Taker] | None = None) -> None:
        self._under_way = send(self._taking if to is None else to, method, *args)


def send(takers: Sequence[Some], method: str, *args: Any) -> dict[Some, Any]:
    """Call `method` on all at once; the ref that each will answer by, or why it cannot be called."""
    absent = EngineError("the engine is not running")
    return {taker: absent if taker.handle is None else getattr(taker.handle, method).remote(*args) for taker in takers}


def collect(refs: Mapping[Some, Any], timeout_seconds: float, what: str) -> dict[Some, Any]:
    """What each has answered, or the exception that it ended with."""
    late = _wait([ref for ref in refs.values() if isinstance(ref, ray.ObjectRef)], timeout_seconds, what)
    outcomes: dict[Some, Any] = {}
    for taker, ref in refs.items():
        if not isinstance(ref, ray.ObjectRef):
            outcomes[taker] = ref
        elif ref in late:
            outcomes[taker] = TimeoutError(f"gave no answer within {timeout_seconds:g} s: {what}")
        else:
            try:
                outcomes[taker] = ray.get(ref)
            except EXPECTED_ERRORS as error:
                cause = error.cause if isinstance(error, RayTaskError) else error
                outcomes[taker] = cause if isinstance(cause, EXPECTED_ERRORS) else error
    return outcomes


def _wait(refs: list[Any], timeout_seconds: float, what: str) -> list[Any]:
    """Wait for all of `refs`; returns those that are late."""
    deadline = time.monotonic() + timeout_seconds
    late = refs
    while late and (left := deadline - time.monotonic()) > 0:
        _, late = ray.wait(late, num_returns=len(late), timeout=min(left, WAIT_NOTICE_SECONDS), fetch_local=False)
        if late and time.monotonic() < deadline:
            logger.info("still waiting for %s: %d have not answered", what, len(late))
    return late
