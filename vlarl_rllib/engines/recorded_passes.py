"""Sampling from a policy whose decisions come from one pass, with passes of few shapes: each is a CUDA graph, since the
kernels of a pass with few rows take longer to launch than to run.

B = rows, L = padded prompt length, A = tokens of a decision.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlarl_rllib.models.family import SampledTokens
from vlarl_rllib.models.replay import Capture, Replayed, graph_rows

LENGTH_STEP = 16
"""Prompts are filled up to multiples of so many tokens; those of a LIBERO suite have one or two such lengths."""
OF_PROMPTS = ("input_ids", "attention_mask")
"""Inputs [B, L]."""


class RecordedPasses:
    """Of a policy with `ActionFormat.parallel`, whose `forward` is replaced. What passes read must stay where it
    is: new weights are written in place.

    Args:
        policy: on its device.
        max_batch: rows of the largest pass.
        capture: how a pass is recorded.
    """

    def __init__(self, policy: Any, max_batch: int, capture: Capture) -> None:
        self._policy, self._max_batch = policy, max_batch
        self._forward, self._signature = policy.forward, inspect.signature(policy.forward)
        self._output: Any = None
        """Type of what a pass returns, a named tuple."""
        self._recorded = Replayed(self._run, capture)
        policy.forward = self._replay

    def sample(self, inputs: dict[str, Tensor], temperatures: Tensor, seeds: Sequence[int]) -> SampledTokens:
        """See `Policy.sample_action_tokens`; at most `max_batch` rows."""
        count = len(seeds)
        added = graph_rows(count, self._max_batch) - count
        sampled = self._policy.sample_action_tokens(
            **{name: _with_rows(_filled_up(name, tensor), added) for name, tensor in inputs.items()},
            temperatures=_with_rows(temperatures, added),
            seeds=[*seeds, *[0] * added],
        )
        tokens, log_probs, values = sampled
        return SampledTokens(tokens[:count], log_probs[:count], None if values is None else values[:count])

    def _replay(self, *args: Any, **kwargs: Any) -> Any:
        given = self._signature.bind(*args, **kwargs).arguments
        results = self._recorded({name: value for name, value in given.items() if value is not None})
        return self._output(**{name: results.get(name) for name in self._output._fields})

    def _run(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        output = self._forward(**given)
        self._output = type(output)
        return {name: tensor for name, tensor in output._asdict().items() if tensor is not None}


def _filled_up(name: str, tensor: Tensor) -> Tensor:
    """Prompts with pads behind them, which the mask says."""
    return F.pad(tensor, (0, -tensor.shape[1] % LENGTH_STEP)) if name in OF_PROMPTS else tensor


def _with_rows(tensor: Tensor, count: int) -> Tensor:
    """So many more rows, like the first one."""
    return torch.cat([tensor, tensor[:1].expand(count, *tensor.shape[1:])]) if count else tensor
