"""A transport through Ray's object store that the package knows nothing of, others that fail or keep what they get, and
a learner and an engine to carry weights between; every process imports them as `tests.weights.probe_transport`."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
import torch
from ray.exceptions import ObjectLostError
from torch import nn

from vlarl_rllib.engines.protocol import EngineSpec, EngineStatus
from vlarl_rllib.settings import WeightSettings
from vlarl_rllib.types import INITIAL_VERSION, WeightManifest
from vlarl_rllib.weights import find_transport, make_reader
from vlarl_rllib.weights.buckets import pack_buckets
from vlarl_rllib.weights.protocol import NamedTensors, Shapes, WeightPublisher, WeightReader, WeightTransport
from vlarl_rllib.weights.source import check_names_and_shapes, expected_tensors, iterate_weights

OBJECT_STORE = "tests.weights.probe_transport:ObjectStoreTransport"


class ObjectStorePublisher:
    """A bucket is a reference; all of them live as long as this process."""

    def __init__(self, transport: str, bucket_bytes: int) -> None:
        self._transport, self._bucket_bytes = transport, bucket_bytes
        self._kept: dict[int, WeightManifest] = {}

    def publish(self, version: int, tensors: NamedTensors) -> WeightManifest:
        refs, shapes, num_bytes = [], {}, 0
        for bucket in pack_buckets(tensors, self._bucket_bytes):
            refs.append(ray.put(bucket))
            shapes |= {name: tuple(tensor.shape) for name, tensor in bucket.items()}
            num_bytes += sum(tensor.nbytes for tensor in bucket.values())
        manifest = WeightManifest(version, self._transport, ray.put(shapes), tuple(refs), len(shapes), num_bytes)
        self._kept[version] = manifest
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


class KeepingPublisher:
    """Keeps the tensors themselves, by version."""

    def __init__(self) -> None:
        self.versions: dict[int, dict[str, torch.Tensor]] = {}

    def publish(self, version: int, tensors: NamedTensors) -> WeightManifest:
        self.versions[version] = dict(tensors)
        return WeightManifest(version, "kept", None, (), len(self.versions[version]), 0)

    def retire(self, before: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.versions = {}


class BorrowingTransport(ObjectStoreTransport):
    """Takes tensors as they lie, and copies what it needs before `publish` returns."""

    on_host = False

    def make_publisher(self, settings: WeightSettings) -> WeightPublisher:
        return KeepingPublisher()


class LendingTransport(BorrowingTransport):
    """Has engines read the tensors where they lie."""

    lends_tensors = True


class LitteringTransport(ObjectStoreTransport):
    """Finds something that it cannot remove."""

    def sweep(self) -> None:
        raise PermissionError("somebody else's")


class TinyModel(nn.Module):
    """Three buckets of a megabyte."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(512, 512, bias=False)}) for _ in range(3))
        self.fill(value)

    @torch.no_grad()
    def fill(self, value: float) -> None:
        for index, parameter in enumerate(self.parameters()):
            parameter.fill_(value + index)

    def values(self) -> list[float]:
        """One number for each parameter; NaN where its elements differ."""
        return [float(p[0, 0]) if bool((p == p[0, 0]).all()) else float("nan") for p in self.parameters()]


class FakeLearner:
    """Actor: one rank that publishes."""

    def __init__(self, transport: str) -> None:
        settings = WeightSettings(transport=transport, bucket_mb=1)
        self._model = TinyModel(0.0)
        self._transport = find_transport(transport)
        self._publisher = self._transport.make_publisher(settings)

    def pid(self) -> int:
        return os.getpid()

    def learn(self, value: float) -> None:
        self._model.fill(value)

    def publish_weights(self, version: int) -> WeightManifest:
        tensors = iterate_weights(self._model, torch.float32, to_host=self._transport.on_host)
        return self._publisher.publish(version, tensors)

    def retire_weights(self, before: int) -> None:
        self._publisher.retire(before)


class FakeEngine:
    """Actor: what `EnginePool` asks of an engine.

    It looks for `EngineSpec.model_path`, a named pipe, in the middle of loading: whoever finds it takes it away, writes
    to it and stays there.
    """

    def __init__(self, spec: EngineSpec, name: str) -> None:
        self._trap = Path(spec.model_path)
        self._model, self._version = TinyModel(-1.0), INITIAL_VERSION

    def ping(self) -> EngineStatus:
        return EngineStatus(self._version, os.getpid(), "cpu", "fake 1.0", 3, num_decisions=1, busy_seconds=0.0)

    status = ping

    def values(self) -> list[float]:
        return self._model.values()

    @torch.no_grad()
    def load_weights(self, manifest: WeightManifest) -> int:
        reader = make_reader(manifest.transport)
        check_names_and_shapes(expected_tensors(self._model), reader.verify(manifest))
        parameters = dict(self._model.named_parameters())
        for bucket in reader.buckets(manifest):
            for name, tensor in bucket.items():
                parameters[name].copy_(tensor)
            self._pass_the_trap()
        self._version = manifest.version
        return self._version

    def _pass_the_trap(self) -> None:
        try:
            taken = self._trap.rename(self._trap.with_name("taken"))
        except FileNotFoundError:
            return
        taken.write_text("caught")
        signal.pause()
