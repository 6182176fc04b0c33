"""A transport of somebody else's, and a learner and an engine to carry weights between; every process imports them as
`tests.weights.probe_transport`."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.weights.object_store_transport import PickledTransport
from vlarl_rllib.engines.actor import EngineActor
from vlarl_rllib.engines.protocol import EngineSpec, EngineStatus
from vlarl_rllib.engines.step_loop import Sampled, StepLoop
from vlarl_rllib.engines.weight_update import WeightUpdate
from vlarl_rllib.models.family import ActionFormat
from vlarl_rllib.settings import WeightSettings
from vlarl_rllib.types import SampleRequest, Site, WeightBucket, WeightManifest
from vlarl_rllib.weights.placement import own_place
from vlarl_rllib.weights.protocol import GoneError, WeightTransport
from vlarl_rllib.weights.publisher import Publisher
from vlarl_rllib.weights.source import expected_tensors

PICKLED = "tests.weights.object_store_transport:PickledTransport"
ACTIONS = ActionFormat(1, 7, range(100, 356))
NUM_BUCKETS = 4


class DamagingTransport(PickledTransport):
    """Loses a bit of the second bucket of every version on the way."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._num_read = 0

    def get(self, handle: Any, specs: Any, device: torch.device) -> list[Tensor]:
        tensors = [tensor.clone() for tensor in super().get(handle, specs, device)]
        self._num_read += 1
        if self._num_read == 2:
            tensors[0].flatten().view(torch.uint8)[0] ^= 1
        return tensors


class LocalTransport(WeightTransport):
    """Within a process: a handle is the tensors."""

    lends_tensors = False

    def put(self, tensors: Sequence[Tensor]) -> Any:
        return [tensor.clone() for tensor in tensors]

    def get(self, handle: Any, specs: Any, device: torch.device) -> list[Tensor]:
        if not handle:
            raise GoneError("it was freed")
        return handle

    def free(self, handle: Any) -> None:
        handle.clear()


class TinyModel(nn.Module):
    """Four buckets of a megabyte; the first layer is frozen."""

    def __init__(self, value: float, side: int = 512, names: str = "layers") -> None:
        super().__init__()
        layers = (nn.ModuleDict({"proj": nn.Linear(512, side, bias=False)}) for _ in range(NUM_BUCKETS))
        setattr(self, names, nn.ModuleList(layers))
        next(self.parameters()).requires_grad_(False)
        for index, parameter in enumerate(self.parameters()):
            nn.init.constant_(parameter, value + index)

    @torch.no_grad()
    def train_to(self, value: float) -> None:
        for index, parameter in enumerate(self.parameters()):
            if parameter.requires_grad:
                parameter.fill_(value + index)

    def values(self) -> list[float]:
        """One number for each parameter; NaN where its elements differ."""
        return [float(p[0, 0]) if bool((p == p[0, 0]).all()) else float("nan") for p in self.parameters()]


class ProbeLearner:
    """Actor: one rank that publishes.

    Args:
        dies_at: index of the bucket that it does not live to publish.
    """

    def __init__(self, dies_at: int | None = None) -> None:
        self._dies_at, self._index = dies_at, 0
        self.become()

    def become(self, **model: Any) -> None:
        """Another model; arguments of `TinyModel` beside the value."""
        self._model = TinyModel(0.0, **model)
        settings = WeightSettings(bucket_mb=1, checksum=True)
        self._publisher = Publisher(self._model, torch.float32, settings, rank=0)

    def pid(self) -> int:
        return os.getpid()

    def learn(self, value: float) -> None:
        self._model.train_to(value)

    def place(self) -> Site:
        return own_place("cpu", takes_part=True)

    def begin_publishing(self, version: int, transport: str, *, whole: bool, keep: bool) -> WeightManifest:
        self._index = 0
        return self._publisher.begin(version, transport, whole=whole, keep=keep)

    def next_bucket(self, done: int) -> WeightBucket | None:
        if self._index == self._dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self._index += 1
        return self._publisher.next(done)

    def end_publishing(self) -> None:
        self._publisher.end()


class ProbeStepper:
    """A model that decides nothing, but takes weights.

    In the middle of loading it looks for a named pipe: whoever finds it takes it away, writes to it and stays there.
    """

    device, library = "cpu", "probe 1.0"

    def __init__(self, trap: Path) -> None:
        self.model, self._trap = TinyModel(-1.0), trap
        self._parameters = dict(self.model.named_parameters())
        self.num_loaded = 0

    def add(self, request_id: str, request: SampleRequest) -> None:
        self._waiting = request_id

    def step(self) -> list[Sampled]:
        return [Sampled(self._waiting, [100] * 7, [-1.0] * 7)]

    def begin_load(self) -> None: ...

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self._parameters[name].copy_(tensor)
            self.num_loaded += 1
        try:
            taken = self._trap.rename(self._trap.with_name("taken"))
        except FileNotFoundError:
            return
        taken.write_text("caught")
        signal.pause()

    def end_load(self) -> None: ...


class ProbeEngine(EngineActor):
    """Actor: an engine around `ProbeStepper`; `EngineSpec.model_path` is its trap."""

    def __init__(self, spec: EngineSpec, name: str) -> None:
        self._name, self._update = name, WeightUpdate.closed()
        self._stepper = ProbeStepper(Path(spec.model_path))
        self._expected = expected_tensors(self._stepper.model)
        self._loop = StepLoop(lambda: self._stepper, ACTIONS, name)

    async def values(self) -> list[float]:
        return self._stepper.model.values()

    async def num_loaded(self) -> int:
        """Tensors since it started."""
        return self._stepper.num_loaded

    async def sample(self, requests: Any) -> Any:
        import asyncio

        return await asyncio.wrap_future(self._loop.sample(requests))

    async def status(self) -> EngineStatus:
        version, loop = self._loop.policy_version, self._loop
        return EngineStatus(version, os.getpid(), "cpu", loop.library, 4, 1, 0.0, own_place("cpu", takes_part=True))
