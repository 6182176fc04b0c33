"""The contract of a weight transport. One file per transport; no vLLM and no RLlib here.

A push, as the learner runs it (every rank iterates, since gathering a sharded tensor is collective; rank 0 writes):

    manifest = publisher.publish(version, iterate_weights(model, dtype))      # readable from now on
    engine_pool.load_weights(manifest)
    publisher.retire(before=version)                                          # the previous version may go
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from vlarl_rllib.types import WeightManifest

NamedTensors = Iterator[tuple[str, torch.Tensor]]
Shapes = dict[str, tuple[int, ...]]
"""Shape of each tensor by published name."""


class WeightPublisher(Protocol):
    """The learner's end, on rank 0."""

    def publish(self, version: int, tensors: NamedTensors) -> WeightManifest:
        """Write all of `tensors` (published parameter names) and return once they can be read.

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
        """Check that the version is whole, checksums included where the manifest has them; load no tensor.

        An engine compares the returned names and shapes with its own before it touches its model. Raises
        `FileNotFoundError` where the version is gone and `ValueError` where it is not what the manifest says.
        """
        ...

    def buckets(self, manifest: WeightManifest) -> Iterator[dict[str, torch.Tensor]]:
        """The tensors bucket by bucket, on the CPU, valid until the next bucket is asked for.

        Tensors that an engine fuses (q, k, v; gate, up) are in one bucket. Raises `FileNotFoundError` where the
        version is gone.
        """
        ...
