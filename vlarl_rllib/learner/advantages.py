"""From a rollout's rewards and values to what the update learns from.

N = decisions, E = frames behind fragments that go on, F = fragments, T = longest fragment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlarl_rllib.learner import fsdp
from vlarl_rllib.learner.collate import RolloutBatch
from vlarl_rllib.learner.gae import discounts, gae, next_values, shaped_rewards
from vlarl_rllib.learner.group_advantages import group_advantages
from vlarl_rllib.settings import Settings


def advantages_and_targets(batch: RolloutBatch, values: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Advantages, not yet normalised, and value targets, [N] each. Collective where rewards are whitened.

    Args:
        values: [N+E] of all frames, before the first optimiser step.
    """
    training = settings.training
    bootstrap = torch.zeros(len(batch.fragment_terminated))
    alive = batch.fragment_bootstrap >= 0
    bootstrap[alive] = values[batch.fragment_bootstrap[alive]]
    ones = batch.rows(torch.ones(batch.num_decisions)).bool()
    rewards = batch.rows(fsdp.whiten(batch.rewards) if training.whiten_rewards else batch.rewards)
    rows = batch.rows(values[: batch.num_decisions])
    terminated, truncated = (
        ones & torch.from_numpy(batch.fragment_terminated)[:, None] & _is_last(ones),
        torch.zeros_like(ones),
    )
    behind, durations = bootstrap[:, None].expand(ones.shape), batch.rows(batch.durations)
    if weight := settings.rewards.value_shaping:
        rewards = shaped_rewards(
            rewards,
            rows,
            next_values(rows, terminated, truncated, behind, ones),
            discounts(training.gamma, durations),
            weight,
        )
    of_critic, value_targets = gae(
        rewards, rows, terminated, truncated, behind, training.gamma, training.gae_lambda, ones, durations
    )
    if training.advantages == "gae":
        advantages = batch.flat(of_critic)
    else:
        groups = torch.from_numpy(batch.fragment_contribution)
        advantages = group_advantages(rewards.sum(1), groups, training.advantages)[batch.fragment]
    return advantages, batch.flat(value_targets)


def _is_last(mask: Tensor) -> Tensor:
    """[F, T] True at the last valid decision of each row."""
    return mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
