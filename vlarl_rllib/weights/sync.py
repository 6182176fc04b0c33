"""Which weights the engines have, and who sees to it: the one that sees both ends and drives the stream between them.

sync = WeightSync(learner_group, engine_pool, version=0, transport="auto", keep=False)
sync.push()                     # behind each update: the next version, in all engines
sync.make_engines_current()     # before sampling: dead engines replaced, the newest version in them
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

from vlarl_rllib.types import INITIAL_VERSION, Site, WeightBucket, WeightManifest
from vlarl_rllib.weights.placement import Choice, choose_transport
from vlarl_rllib.weights.protocol import GoneError

logger = logging.getLogger(__name__)

Failures = dict[Any, BaseException]
"""Engines that a version did not get into, and why."""


class Publishers(Protocol):
    """The learners, as far as weights go."""

    def call(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Call `place`, `begin_publishing`, `next_bucket` or `end_publishing` on every rank; what each returned."""
        ...


class Stream(Protocol):
    """A version on its way into engines; see `engines.intake`."""

    failed: Failures

    @property
    def is_over(self) -> bool: ...

    def feed(self, bucket: WeightBucket) -> None: ...

    def wait(self) -> None: ...

    def commit(self) -> None: ...

    def abort(self, why: str) -> None: ...


class Takers(Protocol):
    """The engines, as far as weights go; see `engines.pool`."""

    @property
    def members(self) -> list[Any]: ...

    def places(self) -> list[Site]: ...

    def outdated(self, version: int) -> list[Any]: ...

    def begin(self, takers: Sequence[Any], manifest: WeightManifest) -> Stream: ...

    def replace(self, failed: Mapping[Any, BaseException]) -> None: ...


class EngineWeights(Protocol):
    """Which weights the engines are to have."""

    version: int
    manifest: WeightManifest | None
    """None where that is the checkpoint that the engines loaded when they started."""

    def make_engines_current(self) -> None:
        """Replace dead engines and see that all have the version."""
        ...


class LoadedWeights:
    """For engines that serve what they loaded when they started. See `EngineWeights`."""

    def __init__(self, pool: Takers | None) -> None:
        self.version = INITIAL_VERSION
        self.manifest: WeightManifest | None = None
        self._pool = pool

    def make_engines_current(self) -> None:
        if self._pool is not None:
            self._pool.outdated(INITIAL_VERSION)


class WeightSync:
    """Pushes the learners' weights to the engines and counts the pushes.

    The counter is the policy version: it never repeats or decreases, also after a resume.

    Args:
        version: the newest one that has been used, 0 = none yet.
        transport: `weights.transport`.
        keep: leave the newest version readable until the next one is complete. An engine that was restarted then reads
            it without the learners, which may be at another update by then, and `manifest` has all its buckets. Else
            nothing is kept: the learners publish the same version again, whose weights they still have.
    """

    def __init__(
        self, learners: Publishers, pool: Takers | None, version: int, *, transport: str = "auto", keep: bool = False
    ) -> None:
        self.version = version
        self.manifest: WeightManifest | None = None
        """Of the newest version that was published in full."""
        self._learners, self._pool = learners, pool
        self._wanted_transport, self._keep = transport, keep
        self._chosen: tuple[list[Site], Choice] | None = None
        self._frozen: tuple[WeightBucket, ...] = ()
        """Kept buckets of what training does not change."""
        self._frozen_of = "", ""
        """Their transport and base."""

    def push(self, *, above: int = 0) -> WeightManifest:
        """Publish the current weights as the next version, which is also greater than `above`, and load them
        everywhere. A kept version that goes meanwhile is published once more.

        Raises:
            ValueError: they are not what the engines need, which keep what they have; or `weights.transport` cannot
                serve between these places.
            RuntimeError: an engine failed too often.
            whatever a lost learner raises.
        """
        try:
            return self._push(above)
        except GoneError:
            return self._push(above)

    def make_engines_current(self) -> None:
        """Replace dead engines and load the newest version into them. Where it was kept and is gone, the learners
        publish their weights as the next version. Raises as `push`."""
        assert self.manifest is not None, "push() comes first"
        if self._pool is None:
            return
        try:
            if takers := self._pool.outdated(self.version):
                self._bring_up(takers)
        except GoneError as error:
            logger.warning("version %d: %s; the weights are published anew", self.version, error)
            self.push()

    def _push(self, above: int) -> WeightManifest:
        self.version = max(self.version, above) + 1
        takers = self._pool.members if self._pool is not None else []
        self.manifest, failed = self._publish(takers)
        if self._pool is not None and failed:
            self._bring_up(self._left_of(failed))
        return self.manifest

    def _bring_up(self, takers: Sequence[Any]) -> None:
        """Have these engines load the newest version; those that fail are replaced until all have it."""
        assert self._pool is not None
        while takers:
            manifest = self.manifest
            if self._keep and manifest is not None and manifest.version == self.version:
                failed = self._read_kept(takers, manifest)
            else:
                _, failed = self._publish(takers)
            takers = self._left_of(failed)

    def _left_of(self, failed: Failures) -> list[Any]:
        """Replace those that are beyond use. Who runs again takes the version now; who still starts, later."""
        assert self._pool is not None
        self._pool.replace(failed)
        return [taker for taker in failed if taker in self._pool.members]

    def _publish(self, takers: Sequence[Any]) -> tuple[WeightManifest, Failures]:
        """Have the learners publish the newest version, and carry it to these engines."""
        manifest = self._begin(takers)
        with self._stream(takers, manifest) as stream:
            for bucket in self._frozen if self._keep and not manifest.whole else ():
                stream.feed(bucket)
                stream.wait()
            buckets = list(self._carry(stream))
            stream.commit()
        self._learners.call("end_publishing")
        if self._keep:
            if manifest.whole:
                self._frozen = tuple(bucket for bucket in buckets if bucket.frozen)
                self._frozen_of = manifest.transport, manifest.base
            trained = [bucket for bucket in buckets if not bucket.frozen]
            manifest = replace(manifest, buckets=(*self._frozen, *trained))
        return manifest, stream.failed

    def _begin(self, takers: Sequence[Any]) -> WeightManifest:
        """Announce the newest version: what training changes, and the rest where somebody lacks it."""
        arguments = self.version, self._transport().name
        manifest = self._learners.call("begin_publishing", *arguments, whole=False, keep=self._keep)[0]
        if self._keep:
            lacking = self._frozen_of != (manifest.transport, manifest.base)
        else:
            lacking = any(taker.base != manifest.base for taker in takers)
        if lacking and manifest.frozen:
            manifest = self._learners.call("begin_publishing", *arguments, whole=True, keep=self._keep)[0]
        return manifest

    def _carry(self, stream: Stream) -> Iterator[WeightBucket]:
        """Each bucket from the learners to the engines; they load it while the learners gather the next one."""
        bucket = self._learners.call("next_bucket", 0)[0]
        while bucket is not None:
            stream.feed(bucket)
            following = self._learners.call("next_bucket", bucket.index)[0]
            stream.wait()
            yield bucket
            bucket = None if stream.is_over and not self._keep else following

    def _read_kept(self, takers: Sequence[Any], manifest: WeightManifest) -> Failures:
        """Carry a kept version to these engines. Raises GoneError where it is gone."""
        with self._stream(takers, manifest) as stream:
            for bucket in manifest.buckets:
                stream.feed(bucket)
                stream.wait()
            stream.commit()
            if gone := next((error for error in stream.failed.values() if isinstance(error, GoneError)), None):
                raise gone
        return stream.failed

    @contextmanager
    def _stream(self, takers: Sequence[Any], manifest: WeightManifest) -> Iterator[Stream]:
        """What carries a version to these engines; it is broken off where anything is raised."""
        stream: Stream = self._pool.begin(takers, manifest) if self._pool is not None and takers else NoTakers()
        try:
            yield stream
        except BaseException as error:
            stream.abort(type(error).__name__)
            raise

    def _transport(self) -> Choice:
        """How weights travel between the places where learners and engines are now."""
        places = [self._learners.call("place")[0], *(self._pool.places() if self._pool is not None else [])]
        if self._chosen is None or self._chosen[0] != places:
            choice = choose_transport(self._wanted_transport, places[0], places[1:])
            logger.info("weights travel by %s: %s", choice.name, choice.why)
            self._chosen = places, choice
        return self._chosen[1]


class NoTakers:
    """A stream to nobody."""

    is_over = False

    def __init__(self) -> None:
        self.failed: dict[Any, BaseException] = {}

    def feed(self, bucket: WeightBucket) -> None: ...

    def wait(self) -> None: ...

    def commit(self) -> None: ...

    def abort(self, why: str) -> None: ...
