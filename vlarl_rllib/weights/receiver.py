"""An engine's end: checks what is announced, and fetches bucket by bucket."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from vlarl_rllib.types import WeightBucket, WeightManifest
from vlarl_rllib.weights import find_transport
from vlarl_rllib.weights.protocol import Shapes, TransferError, WeightTransport
from vlarl_rllib.weights.publisher import checksum_of
from vlarl_rllib.weights.source import check_names_and_shapes

transport_of_this_process = lru_cache(maxsize=None)(find_transport)
"""One for each name, since it may reuse its buffers."""


class Receiver:
    """What one engine gets of a version.

    Args:
        manifest: of the version.
        expected: names and shapes of the engine's own tensors.
        device: the engine's.

    Raises:
        ValueError: they are not those of the version, or there is no such transport; nothing was touched.
    """

    def __init__(self, manifest: WeightManifest, expected: Shapes, device: str) -> None:
        check_names_and_shapes(expected, {spec.name: spec.shape for spec in manifest.tensors})
        self._device = torch.device(device)
        self._transport: WeightTransport = transport_of_this_process(manifest.transport)

    def fetch(self, bucket: WeightBucket) -> dict[str, Tensor]:
        """Its tensors by name, valid until the next call. Raises TransferError where it is gone or damaged."""
        tensors = self._transport.get(bucket.handle, bucket.tensors, self._device)
        if bucket.checksum is not None and checksum_of(tensors) != bucket.checksum:
            first, last = bucket.tensors[0].name, bucket.tensors[-1].name
            raise TransferError(f"SHA-256 of bucket {bucket.index} ({first} to {last}) is not that of what was sent")
        return {spec.name: tensor for spec, tensor in zip(bucket.tensors, tensors, strict=True)}
