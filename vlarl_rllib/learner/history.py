"""What an iteration's minibatches came to, read from the device once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from vlarl_rllib.learner import fsdp
from vlarl_rllib.learner.loss import LARGEST


def averaged(sums: Sequence[Mapping[str, Tensor]], num_valid: Sequence[int]) -> list[dict[str, float]]:
    """What `loss.added_up` returned of each minibatch, over the decisions of all ranks. Collective.

    Args:
        num_valid: decisions of each minibatch on all ranks.
    """
    table = torch.stack([torch.stack([*each.values()]) for each in sums])
    means = fsdp.all_reduce(table) / torch.tensor(num_valid, dtype=torch.float64)[:, None]
    column = list(sums[0]).index(LARGEST)
    means[:, column] = fsdp.all_reduce(table[:, column], dist.ReduceOp.MAX)
    return [dict(zip(sums[0], row, strict=True)) for row in means.tolist()]
