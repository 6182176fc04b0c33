"""Transports that fail or keep what they get, and a learner and an engine to carry weights between; every process
imports them as `tests.weights.probe_transport`."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from torch import nn

from tests.weights.object_store_transport import ObjectStoreTransport
from vlarl_rllib.engines.protocol import EngineSpec, EngineStatus
from vlarl_rllib.settings import WeightSettings
from vlarl_rllib.types import INITIAL_VERSION, WeightManifest
from vlarl_rllib.weights import find_transport, make_reader
from vlarl_rllib.weights.protocol import NamedTensors, WeightPublisher
from vlarl_rllib.weights.source import check_names_and_shapes, expected_tensors, iterate_weights

OBJECT_STORE = "tests.weights.object_store_transport:ObjectStoreTransport"


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
