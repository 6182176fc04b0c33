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
    num_actions=1,
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
        executed=torch.ones(old.shape, dtype=torch.bool),
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


def test_tokens_of_actions_that_were_not_played_do_not_count() -> None:
    # Two actions of two tokens, ratios 1.2 * 1.5 = 1.8 and 0.5 * 2.0 = 1.0; the second one was not played in step 0.
    # decision: 1.8 -> 1.5 and 1.8 -> 1.5;  action: 1.5 and mean(1.5, 1.0) = 1.25;
    # token: mean(1.2, 1.5) = 1.35 and mean(1.2, 1.5, 0.5, min(2.0, 1.5)) = 1.175; each is minus the loss of a step
    played = torch.tensor([[True, True, False, False], [True, True, True, True]])
    step = inputs([[1.2, 1.5, 0.5, 2.0]] * 2, [1.0, 1.0], executed=played)
    two = replace(SETTINGS, num_actions=2)
    for ratio, first, second in (("decision", 1.5, 1.5), ("action", 1.5, 1.25), ("token", 1.35, 1.175)):
        out = ppo_loss(step, replace(two, ratio=ratio))
        assert out.loss.item() == pytest.approx(-(first + second) / 2), ratio
    # clipped units: of the actions 1 of 1 and 1 of 2; k3 of 1.8 and of 1.0 (none): mean over those played
    out = ppo_loss(step, two)
    assert out.sums["clip_fraction"].item() == pytest.approx(1.5)
    k3 = 1.8 - 1 - math.log(1.8)
    assert out.sums["approx_kl"].item() == pytest.approx(k3 + k3 / 2, rel=1e-5)


def test_an_unplayed_token_gets_no_gradient_and_may_be_anything() -> None:
    played = torch.tensor([[True, True, False, False]])
    step = inputs([[1.1, 1.1, 1.0, 1.0]], [1.0], executed=played)
    log_probs = step.log_probs.clone()
    log_probs[0, 3] = float("inf")
    log_probs.requires_grad_()
    for ratio in ("decision", "action", "token"):
        log_probs.grad = None
        ppo_loss(replace(step, log_probs=log_probs), replace(SETTINGS, num_actions=2, ratio=ratio)).loss.backward()
        assert torch.isfinite(log_probs.grad).all() and (log_probs.grad[0, 2:] == 0).all()
        assert (log_probs.grad[0, :2] != 0).all()


def test_one_action_a_decision_is_as_plain_ppo_to_the_bit() -> None:
    random = torch.Generator().manual_seed(0)
    old, new = (-3 + 0.2 * torch.randn(50, 7, generator=random) for _ in range(2))
    advantages = torch.randn(50, generator=random)
    step = replace(
        inputs([[1.0] * 7] * 50, advantages.tolist()), log_probs=new, old_log_probs=old, behaviour_log_probs=old
    )
    for ratio, units in (("action", (new - old).sum(1, keepdim=True).exp()), ("token", (new - old).exp())):
        clipped = units.clamp(1.0 - SETTINGS.clip_low, 1.0 + SETTINGS.clip_high)
        column = advantages[:, None]
        expected = -torch.minimum(units * column, clipped * column).mean(1).sum() / 50.0
        assert torch.equal(ppo_loss(step, replace(SETTINGS, ratio=ratio)).loss, expected)
