"""What an update has the learner say of a rollout before its first optimiser step: of every frame, or of those alone
that nothing else tells of.

N = decisions, E = frames behind fragments that go on, n = scored decisions, A = tokens of a decision.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlarl_rllib.learner import fsdp
from vlarl_rllib.learner.collate import RolloutBatch
from vlarl_rllib.learner.device_batch import DeviceBatch, score_passes, some_of
from vlarl_rllib.learner.passes import PPOPasses
from vlarl_rllib.settings import Settings


@dataclass(frozen=True, slots=True)
class RolloutScores:
    """On the host."""

    decisions: np.ndarray
    """[n] int64: those that the learner scored, all of them or a few."""
    log_probs: Tensor
    """[n, A] the learner's, of the tokens taken."""
    own_values: Tensor
    """[n] the learner's."""
    values: Tensor
    """[N+E] that advantages are made with: of decisions the sampler's where it gives them, else the learner's; 0 where
    there is no critic."""


def score_rollout(passes: PPOPasses, data: DeviceBatch, settings: Settings, *, fixed: bool) -> RolloutScores:
    """As many frames as the settings ask for. Collective.

    Args:
        fixed: see `device_batch.score_passes`.
    """
    batch, micro_batch_size = data.batch, settings.learners.micro_batch_size
    count, everything = batch.num_decisions, np.arange(len(batch.frames))
    if settings.training.scores_all:
        values, log_probs = _score(passes, data, everything, micro_batch_size, fixed=fixed)
        return RolloutScores(everything[:count], log_probs[:count], values[:count], values)
    few = some_of(count, micro_batch_size)  # they say how far sampler and learner are from each other
    by_engine = settings.training.values == "engine"
    behind = batch.frames_behind if by_engine else everything[:0]
    found, log_probs = _score(passes, data, np.concatenate([few, behind]), micro_batch_size, fixed=fixed)
    values = torch.zeros(len(everything))
    if by_engine:
        assert batch.behaviour_values is not None, "engines give values where the settings ask for them"
        values[:count], values[count:] = batch.behaviour_values, found[len(few) :]
    return RolloutScores(few, log_probs[: len(few)], found[: len(few)], values)


def _score(
    passes: PPOPasses, data: DeviceBatch, frames: np.ndarray, micro_batch_size: int, *, fixed: bool
) -> tuple[Tensor, Tensor]:
    """Values and log-probs [..., A] of the tokens taken at these frames, in as many passes as the rank with most of
    them needs. Where they are all there are, later passes take of them what the policy's `frozen_inputs` are."""
    scores, start, keeps = [], 0, len(frames) == len(data.batch.frames)
    most = int(fsdp.all_reduce_max(len(frames)))
    for rows in score_passes(most, micro_batch_size, fixed=fixed):
        out = passes.score(data, frames[start : start + rows], rows)
        scores.append((out.values, out.log_probs))
        if keeps and out.reusable:
            data.keep(out.reusable)
        start += rows
    data.all_kept()
    values, log_probs = (torch.cat(parts).cpu() for parts in zip(*scores, strict=True))
    return values.float(), log_probs


@dataclass(frozen=True, slots=True)
class Gaps:
    """How far a sampler's numbers are from the learner's own, over all ranks."""

    samples: float = 0.0
    """Decisions that were looked at."""
    log_prob_mean: float = 0.0
    log_prob_max: float = 0.0
    value_mean: float = 0.0
    value_max: float = 0.0
    """0 where the sampler gives no values."""


def measure_gaps(batch: RolloutBatch, scores: RolloutScores, version: int) -> Gaps:
    """Of the scored decisions of this policy version alone: one that is behind differs by what was learned since, not
    by how it is computed. Collective."""
    chosen = scores.decisions
    fresh, executed = (batch.versions == version)[chosen], batch.executed[chosen]
    log_probs = torch.where(
        executed & fresh[:, None], (scores.log_probs - batch.behaviour_log_probs[chosen]).abs(), 0.0
    )
    given = scores.own_values if batch.behaviour_values is None else batch.behaviour_values[chosen]
    values = torch.where(fresh, (scores.own_values - given).abs(), 0.0)
    sums = fsdp.all_reduce_sums(
        {
            "samples": float(fresh.sum()),
            "log_probs": (log_probs.sum(1) / executed.sum(1)).sum().item(),
            "values": values.sum().item(),
        }
    )
    count = max(1.0, sums["samples"])
    return Gaps(
        sums["samples"],
        sums["log_probs"] / count,
        fsdp.all_reduce_max(log_probs.max().item() if len(chosen) else 0.0),
        sums["values"] / count,
        fsdp.all_reduce_max(values.max().item() if len(chosen) else 0.0),
    )
