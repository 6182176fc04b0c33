"""Whole iterations of training: seconds by phase, the three rates, and how much is neither sampling nor update."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from vlarl_rllib.bench.measure import REPEATS, device_of, matmul_rate, name_of, threads
from vlarl_rllib.bench.policy import BenchPolicy
from vlarl_rllib.bench.result import CEILING, PART, PLAIN, PRODUCT, Result, phases
from vlarl_rllib.bench.rollout import plain_rate
from vlarl_rllib.bench.update import counted, learner_memory_gb, plain_rates
from vlarl_rllib.config import VLAPPOConfig
from vlarl_rllib.runs.ray_session import ray_session
from vlarl_rllib.settings import Settings, calculate_runtime_args

UNIT = "decisions/s"
WARM_UP = 2
"""Iterations that do not count: environments build their models in the first, and the first push is of all weights."""
WORK = ("sample", "update")


def measure(settings: Settings, profile: bool) -> Result:
    """A few iterations of a `VLAPPO`, the first ones left out; no checkpoints, no evaluation."""
    policy, plan = BenchPolicy(settings), calculate_runtime_args(settings)
    device = device_of(settings.learners.gpus)
    result = Result.of("iteration", settings, name_of(device))
    with ray_session(plan, settings):
        rows, memory = _train(settings)
    with threads(settings.learners.cpus):
        peak = matmul_rate(device, getattr(torch, settings.model.dtype))
        plain = _plain_rate(policy, plan.num_slots, device)
    seconds = Counter[str]()
    for row in rows:
        seconds.update(row["seconds"])
    wall, decisions = sum(seconds.values()), sum(row["decisions"] for row in rows)
    ceiling = _ceiling(policy, peak)
    result.add("iteration", PRODUCT, decisions / wall, UNIT, plain=plain, ceiling=ceiling, memory_gb=memory)
    result.add("model in batches, then the plain update", PLAIN, plain, UNIT, ceiling=ceiling)
    if ceiling is not None:
        result.add("products of sampling, score pass and training", CEILING, ceiling, UNIT)
    env_steps = sum(row["env_steps_per_second"] * row["seconds"]["sample"] for row in rows)
    result.add("while sampling", PART, env_steps / seconds["sample"], "environment steps/s")
    result.add("while sampling", PART, decisions / seconds["sample"], "calls/s")
    trained = sum(row["trained_samples"] for row in rows)
    result.add("while updating", PART, trained / seconds["update"], "trained samples/s")
    for name, value in seconds.items():
        if value:
            result.add(f"an iteration: {name}", PART, value / len(rows), "s")
    outside = wall - sum(seconds[name] for name in WORK)
    result.add("neither sampling nor update", PART, 100.0 * outside / wall, "%")
    result.counted = counted(policy, peak)
    if profile:
        idle = Counter[str]()
        for row in rows:
            idle.update({f"{name}, without work": value for name, value in row["idle_seconds"].items()})
        result.profile = phases(seconds + idle, float(len(rows)))
    return result


def _train(settings: Settings) -> tuple[list[dict[str, Any]], float]:
    """Rows of the iterations that count, and the learners' memory."""
    algorithm = VLAPPOConfig.from_settings(settings).build_algo()
    try:
        rows = [algorithm.train()["vlarl"] for _ in range(WARM_UP + REPEATS)]
        memory = max(algorithm.learner_group.call("apply", learner_memory_gb))
    finally:
        algorithm.stop()
    return rows[WARM_UP:], memory


def _plain_rate(policy: BenchPolicy, num_slots: int, device: torch.device) -> float:
    """Decisions a second of both plain loops, one after the other."""
    sample = plain_rate(policy, device_of(policy.settings.engines.gpus), num_slots)[0]
    update = plain_rates(policy, device)[True][0] / policy.settings.training.num_epochs
    return 1.0 / (1.0 / sample + 1.0 / update)


def _ceiling(policy: BenchPolicy, peak: float) -> float | None:
    """Decisions a second at the rate `peak` of one device, which samples, scores and trains."""
    flops, update = policy.flops, policy.update_flops()
    if flops is None or update is None:
        return None
    return peak / (flops.sample + policy.settings.training.num_epochs * update)
