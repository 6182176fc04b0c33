"""The PPO loss against numbers worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch

from vlarl_rllib.learner.loss import LossInputs, LossSettings, ppo_loss

SETTINGS = LossSettings(
    clip_low=0.2,
    clip_high=0.5,
    vf_clip=None,
    vf_coeff=0.0,
    entropy_coeff=0.0,
    kl_coeff=0.0,
    ratio="action",
    importance_cap=2.0,
)


def inputs(ratios: list[list[float]], advantages: list[float], **changes: torch.Tensor | float) -> LossInputs:
    """Steps whose tokens have the given probability ratios; old log-probs are -1 each."""
    old = torch.full((len(ratios), len(ratios[0])), -1.0)
    steps = len(ratios)
    values = LossInputs(
        log_probs=old + torch.tensor(ratios).log(),
        entropy=torch.zeros(steps),
        values=torch.zeros(steps),
        old_log_probs=old,
        behaviour_log_probs=old,
        old_values=torch.zeros(steps),
        advantages=torch.tensor(advantages),
        value_targets=torch.zeros(steps),
        mask=torch.ones(steps, dtype=torch.bool),
        num_valid=float(steps),
    )
    return replace(values, **changes)


def test_asymmetric_clip() -> None:
    # ratio 2.0, A = +1: clipped at 1.5 -> -1.5;  ratio 0.5, A = -1: clipped at 0.8 -> +0.8;  ratio 0.5, A = +1:
    # min(0.5, 0.8) -> -0.5 ratio 2.0, A = -1: min(-2, -1.5) -> +2;     sum = 0.8, mean over 4 = 0.2
    out = ppo_loss(inputs([[2.0], [0.5], [0.5], [2.0]], [1.0, -1.0, 1.0, -1.0]), SETTINGS)
    assert out.loss.item() == pytest.approx(0.2)
    assert out.sums["clip_fraction"].item() == 4.0
    assert out.sums["ratio_deviation"].item() == pytest.approx(1.0)


def test_the_limits_of_the_clip_are_each_their_own() -> None:
    out = ppo_loss(inputs([[1.45], [0.85], [1.55], [0.75]], [1.0] * 4), SETTINGS)
    assert out.sums["clip_fraction"].item() == 2.0


def test_ratio_of_an_action_is_the_product_over_its_tokens() -> None:
    # 1.2 * 1.5 = 1.8 -> clipped at 1.5, loss -1.5; per token: mean(-1.2, -1.5) = -1.35
    step = inputs([[1.2, 1.5]], [1.0])
    assert ppo_loss(step, SETTINGS).loss.item() == pytest.approx(-1.5)
    assert ppo_loss(step, replace(SETTINGS, ratio="token")).loss.item() == pytest.approx(-1.35)


def test_k3_kl() -> None:
    # k3 of ratio 2 is 2 - 1 - ln 2
    out = ppo_loss(inputs([[2.0]], [0.0]), replace(SETTINGS, kl_coeff=3.0))
    assert out.loss.item() == pytest.approx(3 * (1 - math.log(2)), rel=1e-5)
    assert out.sums["approx_kl"].item() == pytest.approx(1 - math.log(2), rel=1e-5)


def test_value_loss_and_its_clip() -> None:
    # target 0, old value 1, new value 0.5. Unclipped: 0.5 * 0.25 = 0.125.
    # Clipped to within 0.2 of the old one: 0.8 -> 0.5 * 0.64 = 0.32, the worse of the two.
    step = inputs([[1.0]], [0.0], values=torch.tensor([0.5]), old_values=torch.tensor([1.0]))
    assert ppo_loss(step, replace(SETTINGS, vf_coeff=1.0)).loss.item() == pytest.approx(0.125)
    assert ppo_loss(step, replace(SETTINGS, vf_coeff=1.0, vf_clip=0.2)).loss.item() == pytest.approx(0.32)


def test_entropy_bonus() -> None:
    out = ppo_loss(inputs([[1.0]], [0.0], entropy=torch.tensor([2.0])), replace(SETTINGS, entropy_coeff=0.1))
    assert out.loss.item() == pytest.approx(-0.2)


def test_masked_steps_give_no_loss_and_no_gradient_even_when_not_finite() -> None:
    values = torch.tensor([1.0, float("nan")], requires_grad=True)
    step = inputs(
        [[1.0], [float("inf")]], [1.0, float("nan")], values=values, mask=torch.tensor([True, False]), num_valid=1.0
    )
    out = ppo_loss(step, replace(SETTINGS, vf_coeff=1.0))
    assert out.loss.item() == pytest.approx(-1.0 + 0.5)
    out.loss.backward()
    assert values.grad[0] == 1.0


def test_micro_batches_add_up_to_the_minibatch() -> None:
    ratios, advantages = [[2.0], [0.5], [0.9], [1.1]], [1.0, -1.0, 0.5, 2.0]
    whole = ppo_loss(inputs(ratios, advantages), SETTINGS).loss
    parts = [ppo_loss(inputs(ratios[i : i + 2], advantages[i : i + 2], num_valid=4.0), SETTINGS).loss for i in (0, 2)]
    assert sum(parts).item() == pytest.approx(whole.item())


def test_recomputed_old_log_probs_are_weighted_with_the_capped_gap_to_the_sampler() -> None:
    # old/behaviour = 1.5 -> -1.5; = 5 -> capped at 2 -> -2
    gap = torch.tensor([[1.5], [5.0]]).log()
    step = inputs([[1.0], [1.0]], [1.0, 1.0])
    step = replace(step, behaviour_log_probs=step.old_log_probs - gap)
    assert ppo_loss(step, SETTINGS).loss.item() == pytest.approx(-1.75)


def test_warm_up_trains_the_values_only() -> None:
    step = inputs([[2.0]], [1.0], entropy=torch.tensor([5.0]), values=torch.tensor([1.0]))
    out = ppo_loss(step, replace(SETTINGS, vf_coeff=0.5, entropy_coeff=1.0, train_policy=False))
    assert out.loss.item() == pytest.approx(0.25)
