"""Advantages of whole episodes against others from the same start, without a critic. Pure torch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

EPSILON = 1e-6
"""Added to the standard deviation, as in the code that came with GRPO."""


def group_advantages(returns: Tensor, groups: Tensor, kind: Literal["grpo", "rloo"]) -> Tensor:
    """How much better each episode did than its group.

    `grpo`: (R - mean) / standard deviation of the group (Shao et al., arXiv 2402.03300, section 4.1.2); `rloo`: R minus
    the mean of the others (Ahmadian et al., arXiv 2402.14740, section 3). An episode alone in its group gets 0.

    Args:
        returns: [E] float, sum of each episode's rewards.
        groups: [E] int64, number of each episode's group, from 0.

    Returns:
        [E] of `returns`' type; exactly 0 where a group's returns are equal.
    """
    dtype, returns = (
        returns.dtype,
        returns.double(),
    )  # sums in float32 leave equals a rounding error apart, which `grpo` would scale to 1
    sizes = torch.bincount(groups).to(returns.dtype)
    count = sizes[groups]
    centred = returns - _sum_by(groups, returns, len(sizes)) / count
    if kind == "rloo":
        return torch.where(count > 1, centred * count / (count - 1).clamp(min=1), 0.0).to(dtype)
    deviation = (_sum_by(groups, centred.square(), len(sizes)) / count).sqrt()
    return (centred / (deviation + EPSILON)).to(dtype)


def _sum_by(groups: Tensor, x: Tensor, num_groups: int) -> Tensor:
    """[E] the sum of x over each one's group."""
    return torch.zeros(num_groups, dtype=x.dtype).index_add(0, groups, x)[groups]
