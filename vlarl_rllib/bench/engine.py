"""An engine that says what it used, and calls to it past the runners."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray

from vlarl_rllib.bench.policy import BenchPolicy
from vlarl_rllib.config import VLAPPOConfig
from vlarl_rllib.engines.actor import EngineActor
from vlarl_rllib.engines.pool import EnginePool
from vlarl_rllib.engines.torch_engine import TorchEngine
from vlarl_rllib.types import SampleReply, SampleRequest


class MeasuredEngine(EngineActor):
    """The product's engine, which also tells its memory and how long it took to fetch weights and to load them."""

    async def peak_memory_gb(self) -> float:
        """Of its process: see `measure.peak_memory_gb`."""
        from vlarl_rllib.bench.measure import device_of, peak_memory_gb

        return peak_memory_gb(device_of(self._loop.device == "cuda"))

    async def update_seconds(self) -> dict[str, float]:
        """`fetch` and `load` of the last push."""
        return dict(self._update.seconds)


def requests(policy: BenchPolicy, count: int) -> list[SampleRequest]:
    """Frames and the tasks' instructions in turn, at the run's temperature."""
    temperature = policy.settings.temperature
    return [
        SampleRequest(frame, policy.instruction(index), index, temperature)
        for index, frame in enumerate(policy.frames(count))
    ]


def direct_calls(policy: BenchPolicy, pool: EnginePool | None) -> Callable[[list[SampleRequest]], list[SampleReply]]:
    """What asks the engines in one call each, evenly, or a sampler in this process where there are none."""
    if pool is None:
        spec = VLAPPOConfig.from_settings(policy.settings).engine_spec()
        return TorchEngine(spec.here()).sample

    def ask(wanted: list[SampleRequest]) -> list[SampleReply]:
        handles: list[Any] = pool.handles
        shares = [wanted[index :: len(handles)] for index in range(len(handles))]
        refs = [handle.sample.remote(share) for handle, share in zip(handles, shares, strict=True) if share]
        return [reply for replies in ray.get(refs) for reply in replies]

    return ask
