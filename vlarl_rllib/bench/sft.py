"""Trained samples a second of supervised fine-tuning, on demonstrations that are drawn at random."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlarl_rllib.bench.measure import (
    device_of,
    forget_peak,
    matmul_rate,
    name_of,
    peak_memory_gb,
    profiled,
    rate,
    threads,
)
from vlarl_rllib.bench.plain import PlainTrainer, micro_batches, moved
from vlarl_rllib.bench.policy import BenchPolicy
from vlarl_rllib.bench.result import CEILING, PLAIN, PRODUCT, Result
from vlarl_rllib.bench.update import alone
from vlarl_rllib.config import resolved
from vlarl_rllib.data import Demonstration, RLDSWriter, read_statistics
from vlarl_rllib.learner.rank_group import RankGroup
from vlarl_rllib.learner.supervised import SupervisedLearner
from vlarl_rllib.settings import Settings
from vlarl_rllib.types import ACTION_SIZE

UNIT = "trained samples/s"
LENGTH = 16
"""Steps of a demonstration."""
BATCHES = 2
"""Of demonstrations, at least, so that an epoch is more than one."""
DATA_SET = "random_demonstrations"


def measure(settings: Settings, profile: bool) -> Result:
    """One learner in this process; the data are written, read and decoded as a user's are."""
    settings = alone(settings)
    policy, device = BenchPolicy(settings), device_of(settings.learners.gpus)
    with threads(settings.learners.cpus), tempfile.TemporaryDirectory(prefix="vlarl-bench-") as scratch:
        result = Result.of("sft", settings, name_of(device))
        peak = matmul_rate(device, getattr(torch, settings.model.dtype))
        data = _write_demonstrations(policy, Path(scratch))
        value, memory, result.profile = _product(policy, data, device, profile)
        plain, plain_memory = _plain_rate(policy, device)
    training = policy.training_flops(supervised=True)
    ceiling = peak / training if training else None
    result.add("fine-tuning, from RLDS", PRODUCT, value, UNIT, plain=plain, ceiling=ceiling, memory_gb=memory)
    result.add(f"{policy.plain_loop}, tensors in memory", PLAIN, plain, UNIT, ceiling=ceiling, memory_gb=plain_memory)
    if ceiling is not None:
        result.add("products of training", CEILING, ceiling, UNIT)
    result.counted = {"product FLOP/s": peak} | ({"training FLOP": training} if training else {})
    return result


def _write_demonstrations(policy: BenchPolicy, directory: Path) -> Path:
    """An RLDS data set, frames as JPEG of the policy's size."""
    random = np.random.default_rng(0)
    episodes = -(-BATCHES * policy.settings.sft.batch_size // LENGTH)
    with RLDSWriter(directory, DATA_SET, policy.family) as writer:
        for index in range(episodes):
            actions = random.uniform(-1, 1, (LENGTH, ACTION_SIZE)).astype(np.float32)
            actions[:, -1] = np.sign(actions[:, -1])
            writer.add(Demonstration(list(policy.frames(LENGTH, index)), actions, policy.instruction(index)))
    return writer.path


def _product(policy: BenchPolicy, data: Path, device: torch.device, profile: bool) -> tuple[float, float, list[Any]]:
    """Rate, memory and profile of the learner of `vlarl sft`."""
    settings = resolved(policy.settings.replaced(sft={"data": str(data)}))
    group = RankGroup(SupervisedLearner, {"settings": settings.to_dict()}, settings)
    try:
        group.call("open_data", read_statistics(data, policy.family)[1]["action"])

        def step() -> float:
            return float(group.call("supervise", 1)[0]["samples"])

        forget_peak(device)
        value, memory = rate(step, device), peak_memory_gb(device)
        return value, memory, profiled(step, device) if profile else []
    finally:
        group.shutdown()


def _plain_rate(policy: BenchPolicy, device: torch.device) -> tuple[float, float]:
    """Rate and memory of the bare loop on a batch that lies in memory as tensors: nothing read, decoded or
    augmented."""
    forget_peak(device)
    settings, actions = policy.settings, policy.facts.actions
    size, micro = settings.sft.batch_size, settings.learners.micro_batch_size
    trainer = PlainTrainer(policy, device, lr=settings.sft.lr, value_head=False)
    inputs: dict[str, Tensor] = policy.processor.raw_inputs(
        list(policy.frames(size)), [policy.instruction(index) for index in range(size)]
    )
    targets = torch.from_numpy(policy.tokens(size))
    end = torch.full((size, actions.num_targets - actions.num_tokens), policy.processor.end_token_id)
    targets = torch.cat([targets, end], dim=1)

    def step() -> float:
        for rows in micro_batches(range(size), micro):
            trainer.supervised_backward(moved(inputs, rows, device), targets[rows].to(device))
        trainer.step()
        return float(size)

    return rate(step, device), peak_memory_gb(device)
