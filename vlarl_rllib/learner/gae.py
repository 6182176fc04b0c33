"""Generalised advantage estimation over rows of uneven length, also where a step lasts. Pure torch.

Letters: B = rows (one row is one uninterrupted piece of one episode, or several one after the other), T = steps:
decisions, each of which lasts one environment step or several.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    bootstrap_values: Tensor,
    gamma: float,
    lam: float,
    mask: Tensor,
    durations: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and value targets (Schulman et al., arXiv 1506.02438, equations 11-16).

    A_t = delta_t + g_t lam c_t A_{t+1} with delta_t = r_t + g_t n_t - V_t, where g_t = gamma^duration_t: a semi-Markov
    decision process (Sutton, Precup & Singh 1999), in which lambda is counted once a decision. Within an episode n_t =
    V_{t+1} and c_t = 1. Where it ends, c_t = 0, and n_t is 0 after `terminated` but `bootstrap_values[t]` after
    `truncated`: a time-out is no failure. The last valid step of a row counts as truncated unless it terminated, since
    nothing behind it was seen.

    Args:
        rewards, values: [B, T] float.
        terminated, truncated: [B, T] bool; where both hold, `terminated` wins.
        bootstrap_values: [B, T] float, V of the observation that followed step t; read only where the row ends or was
            truncated.
        gamma, lam: discount and lambda, each in [0, 1].
        mask: [B, T] bool, True for real steps; the valid steps of a row are its first ones.
        durations: [B, T] int, environment steps of each step; None = 1. `rewards` are then the discounted sums of
            theirs.

    Returns:
        (advantages, value_targets), each [B, T] float, zero where `mask` is False. value_targets = advantages + values.

    Raises:
        ValueError: where a row's valid steps are not its first ones.
    """
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError("mask: the valid steps of a row must be its first ones")
    ends = terminated | truncated | _last_valid(mask)
    following = next_values(values, terminated, truncated, bootstrap_values, mask)
    gammas = discounts(gamma, mask if durations is None else durations)
    deltas = torch.where(mask, rewards + gammas.to(values.dtype) * following - values, 0.0)
    carry = torch.where(ends, 0.0, gammas * lam).to(values.dtype)

    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        running = deltas[:, t] + carry[:, t] * running
        advantages[:, t] = running
    advantages = torch.where(mask, advantages, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def next_values(
    values: Tensor, terminated: Tensor, truncated: Tensor, bootstrap_values: Tensor, mask: Tensor
) -> Tensor:
    """[B, T] value of what followed each step: V_{t+1} within an episode, 0 after `terminated`, `bootstrap_values`
    where it was cut.

    Arguments as in `gae`.
    """
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    return torch.where(terminated, 0.0, torch.where(truncated | _last_valid(mask), bootstrap_values, following))


def discounts(gamma: float, durations: Tensor) -> Tensor:
    """gamma^durations, in float64: a product with lambda is to be rounded once."""
    return torch.pow(torch.tensor(gamma, dtype=torch.float64), durations.double())


def shaped_rewards(rewards: Tensor, values: Tensor, following: Tensor, gammas: Tensor, weight: float) -> Tensor:
    """`r + weight (gamma V(s') - V(s))`: the critic's values as a potential (Ng, Harada & Russell 1999), [B, T].

    A potential leaves the best policy as it is; `following` is `next_values` and `gammas` [B, T] is `discounts`. In
    `gae` it acts like a critic of (1 + weight) V. The value targets must be those of the shaped rewards too: with a
    critic of the unshaped ones, each further step near success would pay.
    """
    return rewards + weight * (gammas.to(values.dtype) * following - values)


def _last_valid(mask: Tensor) -> Tensor:
    return mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
