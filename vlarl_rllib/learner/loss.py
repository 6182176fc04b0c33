"""The PPO loss of one micro-batch. Pure torch.

Letters: N = decisions, K = actions of a decision, A = its tokens, U = units that have a ratio each: 1, K or A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vlarl_rllib.settings.learning import TrainingSettings


LARGEST = "ratio_deviation"
"""Of `LossOutputs.sums`, what is no sum but the largest."""


@dataclass(frozen=True, slots=True)
class LossInputs:
    """What the loss of N decisions is made of."""

    log_probs: Tensor
    """[N, A] log-probabilities of the tokens under the policy being trained (carries gradient)."""
    entropy: Tensor
    """[N] entropy of the distributions of the executed tokens together, in nats (carries gradient)."""
    values: Tensor
    """[N] values of the critic being trained (carries gradient)."""
    old_log_probs: Tensor
    """[N, A] the denominator of the ratio."""
    behaviour_log_probs: Tensor
    """[N, A] the sampler's; equal to `old_log_probs` unless those were recomputed."""
    old_values: Tensor
    """[N] values before the first optimiser step of the iteration."""
    advantages: Tensor
    """[N]"""
    value_targets: Tensor
    """[N]"""
    executed: Tensor
    """[N, A] bool: tokens of actions that were played; the others do not count. A decision has at least one."""
    mask: Tensor
    """[N] bool, False for padding."""
    num_valid: float | Tensor
    """Valid decisions of the whole minibatch on all learners: what sums are divided by."""


@dataclass(frozen=True, slots=True)
class LossSettings:
    """The keys of `training` that shape the loss; see `settings.TrainingSettings`."""

    clip_low: float
    clip_high: float
    vf_clip: float | None
    vf_coeff: float
    entropy_coeff: float
    kl_coeff: float
    ratio: str
    """`decision`, `action` or `token`."""
    num_actions: int
    """K"""
    importance_cap: float
    train_policy: bool = True
    """False during critic warm-up: the loss is the value loss alone."""

    @classmethod
    def of(cls, training: TrainingSettings, num_actions: int, *, train_policy: bool) -> LossSettings:
        """Where no critic is read, none is trained."""
        keys = cls.__dataclass_fields__.keys() - {"train_policy", "num_actions", "vf_coeff"}
        return cls(
            **{key: getattr(training, key) for key in keys},
            vf_coeff=training.vf_coeff if training.advantages == "gae" else 0.0,
            num_actions=num_actions,
            train_policy=train_policy,
        )


@dataclass(frozen=True, slots=True)
class LossOutputs:
    """`loss` to run backward on, and sums over this micro-batch's valid decisions for the metrics."""

    loss: Tensor
    """Scalar: summed over valid decisions, divided by `num_valid`."""
    sums: dict[str, Tensor]
    """Detached scalars: policy_loss, value_loss, entropy, approx_kl, clip_fraction, importance_weight,
    importance_capped (sums), ratio_deviation (largest |ratio - 1|)."""


def ppo_loss(inputs: LossInputs, settings: LossSettings) -> LossOutputs:
    """Clipped surrogate, clipped value loss, entropy bonus and k3 KL (Schulman et al., arXiv 1707.06347; k3: Schulman
    2020).

    With `ratio: action` the ratio is that of the joint probability of an action's tokens, with `token` of each token,
    with `decision` of all; each is clipped on its own and a decision's loss is the mean over those that were played.
    Where old log-probs were recomputed, the surrogate is weighted with min(old / behaviour, importance_cap), the
    truncated importance weight of the gap between sampler and learner.
    """
    mask = inputs.mask
    played = _units(inputs.executed, settings).any(2)
    log_ratio = _joint(inputs.log_probs - inputs.old_log_probs, inputs.executed, settings)
    ratio = log_ratio.exp()
    weight = _joint(inputs.old_log_probs - inputs.behaviour_log_probs, inputs.executed, settings).exp()
    correction = weight.clamp(max=settings.importance_cap)
    advantages = inputs.advantages[:, None] * correction
    clipped = ratio.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    policy_loss = -_mean_of_played(torch.minimum(ratio * advantages, clipped * advantages), played)
    kl = _mean_of_played(ratio - 1.0 - log_ratio, played)
    value_loss = _value_loss(inputs, settings.vf_clip)

    per_decision = settings.vf_coeff * value_loss
    if settings.train_policy:
        per_decision = per_decision + policy_loss - settings.entropy_coeff * inputs.entropy + settings.kl_coeff * kl
    outside = _mean_of_played(((ratio < 1.0 - settings.clip_low) | (ratio > 1.0 + settings.clip_high)).float(), played)
    deviation = torch.where(mask[:, None], (ratio - 1.0).abs(), 0.0)
    sums = {
        "policy_loss": _masked_sum(policy_loss, mask),
        "value_loss": _masked_sum(value_loss, mask),
        "entropy": _masked_sum(inputs.entropy, mask),
        "approx_kl": _masked_sum(kl, mask),
        "clip_fraction": _masked_sum(outside, mask),
        "importance_weight": _masked_sum(_mean_of_played(correction, played), mask),
        "importance_capped": _masked_sum(_mean_of_played((weight > settings.importance_cap).float(), played), mask),
        LARGEST: deviation.max() if len(mask) else deviation.sum(),
    }
    return LossOutputs(
        _masked_sum(per_decision, mask) / inputs.num_valid, {name: value.detach() for name, value in sums.items()}
    )


def added_up(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """`LossOutputs.sums` of all micro-batches of a minibatch together, in float64 and still on the device."""
    table = torch.stack([torch.stack([*sums.values()]) for sums in parts]).double()
    total = dict(zip(parts[0], table.sum(0), strict=True))
    return total | {LARGEST: table[:, list(parts[0]).index(LARGEST)].max()}


def _units(tokens: Tensor, settings: LossSettings) -> Tensor:
    """[N, A] -> [N, U, A/U]: the tokens of each unit that has a ratio."""
    count = {"decision": 1, "action": settings.num_actions, "token": tokens.shape[1]}[settings.ratio]
    return tokens.unflatten(1, (count, -1))


def _joint(log_ratio: Tensor, executed: Tensor, settings: LossSettings) -> Tensor:
    """[N, A] -> [N, U]: summed over the executed tokens of each unit."""
    return _units(torch.where(executed, log_ratio, 0.0), settings).sum(2)


def _mean_of_played(x: Tensor, played: Tensor) -> Tensor:
    """[N, U] -> [N]: over the units that were played."""
    return torch.where(played, x, 0.0).sum(1) / played.sum(1)


def _value_loss(inputs: LossInputs, clip: float | None) -> Tensor:
    """[N] half the squared error; with `clip`, the worse of the value and the value kept within `clip` of the old
    one."""
    loss = (inputs.values - inputs.value_targets).square()
    if clip is not None:
        near = inputs.old_values + (inputs.values - inputs.old_values).clamp(-clip, clip)
        loss = torch.maximum(loss, (near - inputs.value_targets).square())
    return 0.5 * loss


def _masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum over valid decisions; `where` keeps a non-finite value at a padded one out of the sum and of its gradient."""
    return torch.where(mask, x, 0.0).sum()
