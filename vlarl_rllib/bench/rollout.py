"""Decisions a second: through runner and engine as in training, of the engine alone, and of the model's own batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import ray
import torch

from vlarl_rllib.bench.engine import MeasuredEngine, direct_calls, requests
from vlarl_rllib.bench.measure import (
    WARM_UP,
    device_of,
    forget_peak,
    matmul_rate,
    name_of,
    peak_memory_gb,
    rate,
    threads,
)
from vlarl_rllib.bench.plain import PlainSampler
from vlarl_rllib.bench.policy import BenchPolicy
from vlarl_rllib.bench.result import CEILING, PART, PLAIN, PRODUCT, Result, phases
from vlarl_rllib.engines.pool import EnginePool
from vlarl_rllib.evaluation.workers import Workers, evaluation_plan, start_workers
from vlarl_rllib.rollout.collector import RolloutCollector
from vlarl_rllib.runs.ray_session import ray_session
from vlarl_rllib.settings import Settings, calculate_runtime_args

UNIT, ENV_UNIT = "calls/s", "environment steps/s"


def measure(settings: Settings, profile: bool) -> Result:
    """Iterations of sampling, without updates; the environment is the settings'."""
    settings = settings.replaced(
        rollout={"async_mode": False}, learners={"num": 0, "gpus": 0.0}, weights={"transport": "auto"}
    )
    policy, device = BenchPolicy(settings), device_of(settings.engines.gpus)
    num_slots, dtype = calculate_runtime_args(settings).num_slots, settings.engines.dtype
    result = Result.of("rollout", settings, name_of(device))
    with threads(settings.engines.cpus):
        peak = matmul_rate(device, getattr(torch, dtype))
        with ray_session(evaluation_plan(settings), settings):
            calls = partial(RolloutCollector, enough=lambda: 1)
            with start_workers(settings, "vlarl-bench", make_calls=calls, engine_class=MeasuredEngine) as workers:
                product = _product(policy, workers, num_slots)
        plain = {count: plain_rate(policy, device, count) for count in (num_slots, 1)}
    ceiling = peak / policy.flops.sample if policy.flops else None
    compared = {"plain": plain[num_slots][0], "ceiling": ceiling}
    result.add("runner and engine", PRODUCT, product.decisions, UNIT, memory_gb=product.memory_gb, **compared)
    result.add("runner and engine", PRODUCT, product.env_steps, ENV_UNIT)
    result.add(f"engine alone, calls of {num_slots}", PRODUCT, product.engine, UNIT, **compared)
    result.add("engine alone, calls of 1", PRODUCT, product.single, UNIT, plain=plain[1][0], ceiling=ceiling)
    for count, (value, memory) in plain.items():
        result.add(f"model in batches of {count}", PLAIN, value, UNIT, ceiling=ceiling, memory_gb=memory)
    if ceiling is not None:
        result.add("products of sampling", CEILING, ceiling, UNIT)
    result.add("runner and engine, of the engine alone", PART, product.decisions / product.engine, "x")
    result.counted = {"product FLOP/s": peak, "weight bytes": float(policy.weight_bytes(dtype))}
    result.counted |= {"sample FLOP": policy.flops.sample} if policy.flops else {}
    result.profile = phases(product.seconds, product.iterations) if profile else []
    return result


def plain_rate(policy: BenchPolicy, device: torch.device, count: int) -> tuple[float, float]:
    """Decisions a second of the plain loop in batches of so many, and its memory."""
    forget_peak(device)
    sampler, frames = PlainSampler(policy, device, policy.settings.engines.dtype), policy.frames(count)
    return rate(lambda: sampler.sample(frames, policy.settings.temperature), device), peak_memory_gb(device)


class Sampling:
    """What the product's sampling came to.

    Args:
        collect: an iteration of this number; its decisions, environment steps, and seconds by name.
    """

    def __init__(self, collect: Callable[[int], tuple[float, float, dict[str, float]]]) -> None:
        self.seconds = Counter[str]()
        """Of the iterations that count, by what they went to."""
        self.engine = self.single = self.memory_gb = 0.0
        self._collect, self._number, self._steps_of_a_decision = collect, 0, 1.0
        self.decisions = rate(self._iterate, torch.device("cpu"))

    @property
    def env_steps(self) -> float:
        """A second."""
        return self.decisions * self._steps_of_a_decision

    @property
    def iterations(self) -> int:
        """That count."""
        return self._number - WARM_UP

    def _iterate(self) -> float:
        decisions, env_steps, seconds = self._collect(self._number)
        self._number += 1
        self._steps_of_a_decision = env_steps / decisions
        if self._number > WARM_UP:
            self.seconds.update(seconds)
        return decisions


def _product(policy: BenchPolicy, workers: Workers, num_slots: int) -> Sampling:
    quota, pool, collector = policy.settings.rollout.quota, workers.pool, workers.calls
    assert isinstance(collector, RolloutCollector)

    def collect(iteration: int) -> tuple[float, float, dict[str, float]]:
        busy = engine_seconds(pool)
        rollout = collector.collect(iteration, quota, {})
        seconds = {"engines busy": engine_seconds(pool) - busy}
        for words, name in (
            ("environments, added up", "env_seconds"),
            ("slots waiting for decisions, added up", "sampler_seconds"),
            ("runners, added up", "rollout_seconds"),
        ):
            seconds[words] = sum(float(metrics[name].peek()) for metrics in rollout.metrics)
        env_steps = sum(portion.env_steps for _, portion in rollout.portions)
        return float(sum(rollout.num_decisions)), float(env_steps), seconds

    found = Sampling(collect)
    ask, cpu = direct_calls(policy, pool), torch.device("cpu")
    many, one = requests(policy, num_slots), requests(policy, 1)
    found.engine = rate(lambda: float(len(ask(many))), cpu)
    found.single = rate(lambda: float(len(ask(one))), cpu)
    if pool is not None:
        found.memory_gb = max(ray.get([handle.peak_memory_gb.remote() for handle in pool.handles]))
    return found


def engine_seconds(pool: EnginePool | None) -> float:
    """In which the engines had something in the model, since they started."""
    statuses: list[Any] = pool.statuses() if pool is not None else []
    return sum(status.busy_seconds for status in statuses if status is not None)
