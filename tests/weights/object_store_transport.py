"""Weights through Ray's object store, between any two machines of a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import ray
import torch
from ray.exceptions import ObjectLostError

from vlarl_rllib.settings import WeightSettings
from vlarl_rllib.types import WeightManifest
from vlarl_rllib.weights.buckets import pack_buckets
from vlarl_rllib.weights.protocol import NamedTensors, Shapes, WeightPublisher, WeightReader, WeightTransport


class ObjectStorePublisher:
    """A bucket is a reference; all of them live as long as this process."""

    def __init__(self, transport: str, bucket_bytes: int) -> None:
        self._transport, self._bucket_bytes = transport, bucket_bytes
        self._kept: dict[int, WeightManifest] = {}
        self._last = -1

    def publish(self, version: int, tensors: NamedTensors) -> WeightManifest:
        if version <= self._last:
            raise ValueError(f"version={version} must be above the last published one, {self._last}")
        refs, shapes, num_bytes = [], {}, 0
        for bucket in pack_buckets(tensors, self._bucket_bytes):
            refs.append(ray.put(bucket))
            shapes |= {name: tuple(tensor.shape) for name, tensor in bucket.items()}
            num_bytes += sum(tensor.nbytes for tensor in bucket.values())
        if not refs:
            raise ValueError(f"version {version} has no tensors; publish all of the policy's weights")
        manifest = WeightManifest(version, self._transport, ray.put(shapes), tuple(refs), len(shapes), num_bytes)
        self._kept[version], self._last = manifest, version
        return manifest

    def retire(self, before: int) -> None:
        self._kept = {version: manifest for version, manifest in self._kept.items() if version >= before}

    def close(self) -> None:
        self._kept = {}


class ObjectStoreReader:
    def verify(self, manifest: WeightManifest) -> Shapes:
        with _gone_with_its_owner(manifest):
            return ray.get(manifest.location)

    def buckets(self, manifest: WeightManifest) -> Iterator[dict[str, torch.Tensor]]:
        for ref in manifest.buckets:
            with _gone_with_its_owner(manifest):
                bucket = ray.get(ref)
            yield bucket


@contextmanager
def _gone_with_its_owner(manifest: WeightManifest) -> Iterator[None]:
    try:
        yield
    except ObjectLostError as error:
        raise ObjectStoreTransport.version_gone(manifest.version, type(error).__name__) from error


class ObjectStoreTransport(WeightTransport):
    outlives_publisher = False
    lends_tensors = False
    on_host = True

    def make_publisher(self, settings: WeightSettings) -> WeightPublisher:
        return ObjectStorePublisher(self.name, settings.bucket_mb * 2**20)

    def make_reader(self) -> WeightReader:
        return ObjectStoreReader()

    def sweep(self) -> None:
        """Ray frees what a dead process owned."""
