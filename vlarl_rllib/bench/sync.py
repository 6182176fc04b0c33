"""A push of the weights from learner to engines, by parts, and of the part that training changes."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from typing import Any

import ray
import torch

from vlarl_rllib.bench.engine import MeasuredEngine
from vlarl_rllib.bench.measure import REPEATS, WARM_UP, copy_rate, device_of, forget_peak, name_of, rate, threads
from vlarl_rllib.bench.policy import BenchPolicy
from vlarl_rllib.bench.result import CEILING, PART, PLAIN, PRODUCT, Result, phases
from vlarl_rllib.bench.update import learner_group, learner_memory_gb
from vlarl_rllib.config import VLAPPOConfig
from vlarl_rllib.engines.pool import EnginePool
from vlarl_rllib.learner.learner_group import VLALearnerGroup
from vlarl_rllib.runs.ray_session import ray_session
from vlarl_rllib.settings import Role, Settings, calculate_runtime_args
from vlarl_rllib.types import WeightManifest
from vlarl_rllib.weights.sync import WeightSync

UNIT = "GB/s"
PARTS = {
    "next_bucket": "learner: gather, merge, put",
    "fetch": "engine: fetch",
    "load": "engine: load",
}
"""In words; they overlap, so together they may take longer than the push."""


def measure(settings: Settings, profile: bool) -> Result:
    """Learners and engines as in a run; the weights do not change between pushes."""
    policy, device = BenchPolicy(settings), device_of(settings.engines.gpus)
    plan = calculate_runtime_args(settings).only(Role.ALGORITHM, Role.LEARNER, Role.ENGINE)
    result = Result.of("sync", settings, name_of(device))
    with threads(settings.learners.cpus):
        with ray_session(plan, settings):
            pool = _engines(settings)
            try:
                group = learner_group(settings, policy)
                try:
                    pool.wait_until_ready()
                    pushes = _pushes(group, pool, settings)
                    memory = _memory(group, pool)
                finally:
                    group.shutdown()
            finally:
                pool.shutdown()
        del group
        forget_peak(device)
        num_bytes = policy.weight_bytes(settings.engines.dtype)
        ceiling = copy_rate(device, num_bytes) / 1e9
        plain = _plain_rate(policy, device) / 1e9
    for name, push in pushes.items():
        result.add(f"push of {name}", PRODUCT, push.gb / push.seconds, UNIT, plain=plain, ceiling=ceiling)
    result.add("state_dict to the host, and load", PLAIN, plain, UNIT, ceiling=ceiling)
    result.add("copy of as many bytes within the device", CEILING, ceiling, UNIT)
    for name, push in pushes.items():
        result.add(f"push of {name}, {push.gb:.4g} GB by {push.transport}", PART, push.seconds, "s")
        for part, words in PARTS.items():
            result.add(f"{name}, {words}", PART, push.parts[part], "s")
    for name, gigabytes in memory.items():
        result.add(f"memory of {name}", PART, gigabytes, "GB")
    result.counted = {"weight bytes": float(num_bytes)}
    named = {PARTS[part]: seconds for part, seconds in pushes[WHOLE].parts.items()}
    result.profile = phases(named, 1.0) if profile else []
    return result


WHOLE, TRAINED = "all weights", "what training changes"


class Push:
    """Medians of several.

    Args:
        manifest: of one of them.
        rows: seconds of each, by part; the whole under "".
    """

    def __init__(self, manifest: WeightManifest, rows: list[dict[str, float]]) -> None:
        self.gb, self.transport = manifest.num_bytes / 1e9, manifest.transport
        self.parts = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        self.seconds = self.parts.pop("")


class TimedLearners:
    """A group of learners, and how long its calls took, by method."""

    def __init__(self, group: VLALearnerGroup) -> None:
        self._group = group
        self.seconds: dict[str, float] = defaultdict(float)

    def call(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        began = time.perf_counter()
        try:
            return self._group.call(method, *args, **kwargs)
        finally:
            self.seconds[method] += time.perf_counter() - began


def _engines(settings: Settings) -> EnginePool:
    engines = settings.engines
    return EnginePool(
        VLAPPOConfig.from_settings(settings).engine_spec(),
        engines.num,
        actor_options=[{"num_cpus": engines.cpus, "num_gpus": engines.gpus}] * engines.num,
        start_timeout_seconds=engines.start_timeout_seconds,
        engine_class=MeasuredEngine,
    )


def _pushes(group: VLALearnerGroup, pool: EnginePool, settings: Settings) -> dict[str, Push]:
    learners = TimedLearners(group)
    sync = WeightSync(learners, pool, 0, transport=settings.weights.transport)

    def push() -> dict[str, float]:
        learners.seconds.clear()
        began = time.perf_counter()
        sync.push()
        seconds = time.perf_counter() - began
        engines = ray.get([handle.update_seconds.remote() for handle in pool.handles])
        slowest = {name: max(engine[name] for engine in engines) for name in engines[0]}
        return {"": seconds, "next_bucket": learners.seconds["next_bucket"], **slowest}

    def several(*, whole: bool) -> Push:
        rows = []
        for number in range(WARM_UP + REPEATS):
            for member in pool.members if whole else ():
                member.base = ""  # as of an engine that has been started anew
            row = push()
            rows += [row] if number >= WARM_UP else []
        assert sync.manifest is not None
        return Push(sync.manifest, rows)

    found = {WHOLE: several(whole=True)}
    assert sync.manifest is not None
    return found | ({TRAINED: several(whole=False)} if sync.manifest.frozen else {})


def _memory(group: VLALearnerGroup, pool: EnginePool) -> dict[str, float]:
    """Of the process that took most of each, in 1e9 bytes; see `peak_memory_gb`."""
    engines = ray.get([handle.peak_memory_gb.remote() for handle in pool.handles])
    return {"a learner": max(group.call("apply", learner_memory_gb)), "an engine": max(engines)}


def _plain_rate(policy: BenchPolicy, device: torch.device) -> float:
    """Bytes a second of a state dict that goes to the host tensor by tensor, and into another model from there."""
    source, target = (
        policy.family.load(policy.path, dtype=getattr(torch, policy.settings.engines.dtype)).to(device)
        for _ in range(2)
    )

    def copy() -> float:
        # a tensor that lies on the host is no copy of itself
        host = {name: tensor.detach().to("cpu", copy=True) for name, tensor in source.state_dict().items()}
        target.load_state_dict(host)
        return float(sum(tensor.numel() * tensor.element_size() for tensor in host.values()))

    return rate(copy, device)
