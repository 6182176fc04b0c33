"""The loops that one would write without this package: Hugging Face's way of sampling, PEFT, autocast, AdamW.

One process, one model, no engine, no sharding, nothing overlapped. Sampling in batches with the training framework's
own model is what RLinf and SimpleVLA-RL do in their rollouts; adapters through PEFT under autocast are what OpenVLA's
fine-tuning does.

B = batch, A = tokens of a decision, G = targets of supervised fine-tuning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor

from vlarl_rllib.bench.policy import BenchPolicy

CLIP, VALUE_WEIGHT, GRAD_CLIP = 0.2, 0.5, 1.0
"""Of the loss; what they are makes no difference to the time."""


class PlainSampler:
    """The model itself, one batch after the other.

    Args:
        dtype: of the weights, "float32" or "bfloat16".
    """

    def __init__(self, policy: BenchPolicy, device: torch.device, dtype: str) -> None:
        self._policy, self._device = policy, device
        self._model = policy.family.load(policy.path, dtype=getattr(torch, dtype)).to(device).eval()

    def sample(self, frames: np.ndarray, temperature: float) -> float:
        """A decision for each of the frames [B, S, S, 3]; how many."""
        instructions = [self._policy.instruction(index) for index in range(len(frames))]
        inputs = self._policy.processor.raw_inputs(list(frames), instructions)
        sampled = self._model.sample_action_tokens(
            **{name: tensor.to(self._device) for name, tensor in inputs.items()},
            temperatures=torch.full((len(frames),), temperature, device=self._device),
            seeds=list(range(len(frames))),
        )
        return float(len(sampled.tokens.cpu()))


class PlainTrainer:
    """The model with PEFT's adapters, or whole, under AdamW.

    Args:
        device: of all of it.
        lr: of AdamW.
        value_head: whether there is one, trained whole.
    """

    def __init__(self, policy: BenchPolicy, device: torch.device, *, lr: float, value_head: bool) -> None:
        model, config = policy.settings.model, policy.lora_config
        self._device, self._temperature = device, policy.settings.temperature
        self._first_id = policy.facts.actions.token_ids.start
        self._dtype = getattr(torch, model.dtype)
        base: Any = policy.family.load(policy.path, dtype=self._dtype if config else torch.float32)
        head = base.add_value_head(policy.settings.run.seed) if value_head else None
        self._model: Any = get_peft_model(base, config) if config else base
        if head is not None:
            head.requires_grad_(True)
        self._model.to(device)
        self._trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=lr, fused=True)

    @torch.no_grad()
    def score(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log-probs [B, A] and values [B] of decisions that were taken, on the device."""
        return self._log_probs(inputs)

    def ppo_backward(self, inputs: Mapping[str, Tensor], old: Tensor, advantages: Tensor, returns: Tensor) -> None:
        """Add the gradient of the clipped loss, summed over these decisions; `old` [B, A], the others [B]."""
        log_probs, values = self._log_probs(inputs)
        ratio = (log_probs - old).sum(-1).exp()
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        loss = -torch.minimum(ratio * advantages, clipped * advantages) + VALUE_WEIGHT * (values - returns).square()
        loss.sum().backward()

    def supervised_backward(self, inputs: Mapping[str, Tensor], targets: Tensor) -> None:
        """Add the gradient of the cross-entropy over all ids, summed over targets [B, G]."""
        with self._autocast():
            logits = self._model(**inputs, action_tokens=targets, full_vocabulary=True).action_logits
        F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()

    def step(self) -> None:
        """Clip the gradients and step."""
        torch.nn.utils.clip_grad_norm_(self._trained, GRAD_CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _log_probs(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        with self._autocast():
            output = self._model(**inputs)
        distribution = torch.log_softmax(output.action_logits.float() / self._temperature, dim=-1)
        chosen = (inputs["action_tokens"] - self._first_id)[..., None]
        return distribution.gather(-1, chosen)[..., 0], output.values.float()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._device.type, self._dtype)


def micro_batches(rows: Sequence[int] | np.ndarray, size: int) -> list[np.ndarray]:
    """The rows in order, so many at a time."""
    return [np.asarray(rows[start : start + size]) for start in range(0, len(rows), size)]


def moved(inputs: Mapping[str, Tensor], rows: np.ndarray, device: torch.device) -> dict[str, Tensor]:
    """Some rows of tensors in host memory, on the device."""
    return {name: tensor[rows].to(device) for name, tensor in inputs.items()}
