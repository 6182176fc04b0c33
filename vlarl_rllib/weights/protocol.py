"""The contract of a weight transport: a one-sided mailbox. One file per transport; no vLLM and no RLlib here.

A push, as the learner runs it (every rank iterates, since gathering a sharded tensor is collective; rank 0 writes):

    manifest = publisher.publish(version, iterate_weights(model, dtype))      # readable from now on
    engine_pool.load_weights(manifest)
    publisher.retire(before=version)                                          # the previous version may go

The manifest is all that a reader needs. Engines come and go: none joins a group, and a version may be read by any
number of them, again and again, until it is retired.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeAlias

from vlarl_rllib.types import WeightManifest

if TYPE_CHECKING:
    import torch

    from vlarl_rllib.settings import WeightSettings

NamedTensors: TypeAlias = "Iterator[tuple[str, torch.Tensor]]"
Shapes = dict[str, tuple[int, ...]]
"""Shape of each tensor by published name."""


class VersionGoneError(RuntimeError):
    """A version can be read no more, by any engine; the engine that wanted it is well."""

    def __init__(self, version: int, why: str) -> None:
        super().__init__(version, why)  # what unpickling calls the class with
        self.version, self.why = version, why

    def __str__(self) -> str:
        return f"weights version {self.version} is gone: {self.why}; publish the weights again, as a new version"


class WeightPublisher(Protocol):
    """The learner's end, on rank 0."""

    def publish(self, version: int, tensors: NamedTensors) -> WeightManifest:
        """Take all of `tensors` (published parameter names) and return once they can be read.

        Raises `ValueError` for an empty iterator, a repeated name, or a version that is not above the last one, and
        `OSError` where there is no room; the versions published before stay as they are.
        """
        ...

    def retire(self, before: int) -> None:
        """Free every version below `before`."""
        ...

    def close(self) -> None:
        """Free everything; safe to call twice."""
        ...


class WeightReader(Protocol):
    """The engine's end."""

    def verify(self, manifest: WeightManifest) -> Shapes:
        """Check that the version is there and whole, checksums included where the manifest has them; load no tensor.

        An engine compares the returned names and shapes with its own before it touches its model. Raises
        `VersionGoneError` where the version is gone and `ValueError` where it is not what the manifest says.
        """
        ...

    def buckets(self, manifest: WeightManifest) -> Iterator[dict[str, torch.Tensor]]:
        """The tensors bucket by bucket, on whatever device they arrive, valid until the next bucket is asked for.

        Tensors that an engine fuses (q, k, v; gate, up) are in one bucket. Raises `VersionGoneError` where the version
        is gone, also between two buckets.
        """
        ...


class WeightTransport(ABC):
    """One way for weights to travel: the facts that the package asks for, and both ends.

    Args:
        name: what manifests call it, so that readers find the class: a known name or `module:Class`.
    """

    outlives_publisher: ClassVar[bool]
    """Whether a version can still be read once the process that published it is dead."""
    lends_tensors: ClassVar[bool]
    """Whether published tensors are read where they lie, so that they must not change until they are retired: the
    learner then hands over copies of what it trains."""
    on_host: ClassVar[bool]
    """Whether `publish` wants tensors in host memory; else they come on the learner's device."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def make_publisher(self, settings: WeightSettings) -> WeightPublisher:
        """The learner's end.

        Raises `ValueError` for a setting that the transport cannot honour, and `OSError` where there is no room.
        """

    @abstractmethod
    def make_reader(self) -> WeightReader:
        """An engine's end, in its process."""

    @abstractmethod
    def sweep(self) -> None:
        """Remove from this machine what processes have left that died; nothing of those that live.

        It runs where a command ends, also at a second signal and when Ray is dead: it imports nothing, calls no Ray,
        and is quick.
        """

    @classmethod
    def version_gone(cls, version: int, found: str) -> VersionGoneError:
        """The error for a reader to raise; `found` says in a few words what it met in place of the version."""
        why = (
            "it was retired, or swept up after its learner had ended"
            if cls.outlives_publisher
            else "it died with the learner that published it"
        )
        return VersionGoneError(version, f"{why} ({found})")
