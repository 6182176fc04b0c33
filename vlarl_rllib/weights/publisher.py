"""The learners' end: a version, bucket by bucket, as the driver asks for it.

    manifest = publisher.begin(version, transport, whole=..., keep=...)     # as often as wanted
    while bucket := publisher.next(done):       # collective: gathers one bucket on all ranks
        ...
    publisher.end()

Extra memory is about two buckets, of which engines load one while the next is gathered; where a version is kept, it is
the version.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from vlarl_rllib.settings import WeightSettings
from vlarl_rllib.types import TensorSpec, WeightBucket, WeightManifest
from vlarl_rllib.weights import find_transport
from vlarl_rllib.weights.buckets import frozen_names, plan_buckets
from vlarl_rllib.weights.protocol import WeightTransport
from vlarl_rllib.weights.source import NOTHING_TO_SEND, Published, published_parameters


class Publisher:
    """One rank's part. All ranks gather; rank 0 alone hands what was gathered to the transport.

    Args:
        model: the policy, sharded or whole.
        dtype: in which its weights travel: the engines'.
        value_head: whether engines have one too; it travels in float32.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, settings: WeightSettings, rank: int, *, value_head: bool = False
    ) -> None:
        self._model, self._dtype, self._is_first, self._value_head = model, dtype, rank == 0, value_head
        self._bucket_bytes, self._with_checksums = settings.bucket_mb * 2**20, settings.checksum
        self._transport: WeightTransport | None = None
        self._plan: list[tuple[TensorSpec, ...]] = []
        self._frozen: frozenset[str] = frozenset()
        self._parameters: dict[str, Published] = {}
        self._base = uuid.uuid4().hex
        self._version, self._whole, self._keep, self._next = -1, False, False, 0
        self._current: dict[int, WeightBucket] = {}
        """Of the version in the making, by index, until they are freed."""
        self._kept: list[WeightBucket] = []
        """Of the newest complete version, where versions are kept."""

    def begin(self, version: int, transport: str, *, whole: bool, keep: bool) -> WeightManifest:
        """Say what `version` consists of; no tensor moves.

        Args:
            whole: publish also what training does not change.
            keep: leave the version readable until the next one is complete, and the frozen tensors until they are
                published again.

        Raises:
            ValueError: a version below the last one, or nothing to send.
        """
        if version < self._version:
            raise ValueError(f"version={version} must not be below the last published one, {self._version}")
        self._drop(self._current.values())
        if self._transport is None or self._transport.name != transport or not keep:
            self._drop(self._kept)
            self._kept = []
        if self._transport is None or self._transport.name != transport:
            self._transport = find_transport(transport)
        self._parameters = {item.name: item for item in published_parameters(self._model, value_head=self._value_head)}
        if not self._parameters:
            raise ValueError(NOTHING_TO_SEND)
        specs = tuple(item.spec(self._dtype) for item in self._parameters.values())
        trained = [item.name for item in self._parameters.values() if item.trained]
        self._frozen = frozen_names(self._parameters, trained)
        parts = [[spec for spec in specs if spec.name in self._frozen]] * whole
        parts.append([spec for spec in specs if spec.name not in self._frozen])
        self._plan = [bucket for part in parts for bucket in plan_buckets(part, self._bucket_bytes)]
        self._version, self._whole, self._keep, self._next, self._current = version, whole, keep, 0, {}
        return WeightManifest(version, transport, specs, self._frozen, self._base, whole)

    def forget(self) -> None:
        """The frozen tensors may have become others: nobody has them."""
        self._base = uuid.uuid4().hex

    def next(self, done: int) -> WeightBucket | None:
        """Gather the next bucket; rank 0 returns it, others an empty one, and all None behind the last. Collective.

        Args:
            done: buckets below this index have been loaded by all who want them.
        """
        if not self._keep:
            self._drop([self._current.pop(index) for index in [*self._current] if index < done])
        if self._next == len(self._plan):
            return None
        index, specs = self._next, self._plan[self._next]
        self._next += 1
        frozen = specs[0].name in self._frozen
        assert self._transport is not None
        tensors = self._gather(specs, copy=self._transport.lends_tensors and not frozen)
        if not self._is_first:
            return WeightBucket(index, (), None, frozen)
        checksum = checksum_of(tensors) if self._with_checksums else None
        bucket = WeightBucket(index, specs, self._transport.put(tensors), frozen, checksum)
        self._current[index] = bucket
        return bucket

    def end(self) -> None:
        """The version is complete: where it is kept, the one before it goes, else all that was published."""
        if self._keep:
            new = list(self._current.values())
            stays = [bucket.frozen and not self._whole for bucket in self._kept]
            self._drop(bucket for bucket, left in zip(self._kept, stays, strict=True) if not left)
            self._kept = [bucket for bucket, left in zip(self._kept, stays, strict=True) if left] + new
        else:
            self._drop(self._current.values())
        self._current = {}

    def close(self) -> None:
        """Free everything."""
        self._drop([*self._current.values(), *self._kept])
        self._current, self._kept = {}, []

    def _gather(self, specs: Sequence[TensorSpec], *, copy: bool) -> list[Tensor]:
        """Whole tensors on rank 0, nothing on others."""
        tensors = []
        for spec in specs:
            tensor = self._parameters[spec.name].gather(self._dtype, copy=copy and self._is_first)
            if self._is_first:
                tensors.append(tensor)
        return tensors

    def _drop(self, buckets: Iterable[WeightBucket]) -> None:
        for bucket in list(buckets):
            assert self._transport is not None
            self._transport.free(bucket.handle)


@torch.no_grad()
def checksum_of(tensors: Sequence[Tensor]) -> str:
    """SHA-256 in hex over the bytes of `tensors`, one behind the other."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().flatten().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()
