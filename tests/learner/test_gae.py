"""Advantages against numbers worked out by hand."""

import pytest
import torch

from vlarl_rllib.learner.gae import discounts, gae, next_values, shaped_rewards


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def flags(*values: int) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.bool)


def test_termination_ends_without_bootstrap() -> None:
    # gamma = 0.5, lambda = 0.5; the bootstrap value 100 must not be read after a termination.
    # t=2: delta = 1 - 3 = -2                        A = -2
    # t=1: delta = 0 + 0.5*3 - 2 = -0.5              A = -0.5 + 0.25*-2 = -1
    # t=0: delta = 0 + 0.5*2 - 1 = 0                 A = 0 + 0.25*-1 = -0.25
    advantages, targets = gae(
        row(0, 0, 1), row(1, 2, 3), flags(0, 0, 1), flags(0, 0, 0), row(100, 100, 100), 0.5, 0.5, flags(1, 1, 1)
    )
    assert advantages.tolist() == [[-0.25, -1.0, -2.0]]
    assert targets.tolist() == [[0.75, 1.0, 1.0]]


def test_time_out_bootstraps() -> None:
    # t=1: delta = 0 + 0.5*8 - 2 = 2                 A = 2
    # t=0: delta = 1 + 0.5*2 - 1 = 1                 A = 1 + 0.25*2 = 1.5
    advantages, targets = gae(row(1, 0), row(1, 2), flags(0, 0), flags(0, 1), row(100, 8), 0.5, 0.5, flags(1, 1))
    assert advantages.tolist() == [[1.5, 2.0]]
    assert targets.tolist() == [[2.5, 4.0]]


def test_termination_wins_where_both_hold() -> None:
    advantages, _ = gae(row(1), row(3), flags(1), flags(1), row(100), 0.5, 0.5, flags(1))
    assert advantages.tolist() == [[-2.0]]


def test_two_episodes_in_a_row_do_not_mix() -> None:
    # Step 1 was truncated with bootstrap 4, step 2 begins another episode and is the last one seen, bootstrap 6.
    # t=2: delta = 0 + 0.5*6 - 5 = -2                A = -2
    # t=1: delta = 0 + 0.5*4 - 2 = 0                 A = 0 (nothing carried over from t=2)
    # t=0: delta = 0 + 0.5*2 - 1 = 0                 A = 0
    advantages, _ = gae(
        row(0, 0, 0), row(1, 2, 5), flags(0, 0, 0), flags(0, 1, 0), row(9, 4, 6), 0.5, 0.5, flags(1, 1, 1)
    )
    assert advantages.tolist() == [[0.0, 0.0, -2.0]]


def test_padding_counts_for_nothing() -> None:
    padded, padded_targets = gae(
        row(1, 0, 7), row(1, 2, float("nan")), flags(0, 0, 0), flags(0, 0, 0), row(0, 8, 50), 0.5, 0.5, flags(1, 1, 0)
    )
    short, short_targets = gae(row(1, 0), row(1, 2), flags(0, 0), flags(0, 0), row(0, 8), 0.5, 0.5, flags(1, 1))
    assert padded[:, :2].tolist() == short.tolist() == [[1.5, 2.0]]
    assert padded_targets[:, :2].tolist() == short_targets.tolist()
    assert padded[0, 2] == padded_targets[0, 2] == 0


def test_rows_are_independent() -> None:
    one = gae(row(1, 0), row(1, 2), flags(0, 0), flags(0, 1), row(0, 8), 0.9, 0.8, flags(1, 1))[0]
    two = gae(row(0, 3), row(4, 1), flags(0, 1), flags(0, 0), row(0, 8), 0.9, 0.8, flags(1, 1))[0]
    both = gae(
        torch.cat([row(1, 0), row(0, 3)]), torch.cat([row(1, 2), row(4, 1)]), torch.cat([flags(0, 0), flags(0, 1)]),
        torch.cat([flags(0, 1), flags(0, 0)]), torch.cat([row(0, 8), row(0, 8)]),
        0.9, 0.8, torch.cat([flags(1, 1)] * 2),
    )[0]  # fmt: skip
    assert torch.equal(both, torch.cat([one, two]))


def test_a_hole_in_the_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="first ones"):
        gae(row(1, 0), row(1, 2), flags(0, 0), flags(0, 0), row(0, 8), 0.5, 0.5, flags(0, 1))


def test_shaping_by_the_critics_values_by_hand() -> None:
    # One row of three steps that ends in success, and one of two that is cut.
    values = torch.tensor([[0.2, 0.4, 0.6], [0.5, 0.3, 0.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    terminated = torch.tensor([[False, False, True], [False, False, False]])
    behind = torch.tensor([[9.0, 9.0, 9.0], [0.7, 0.7, 0.7]])
    following = next_values(values, terminated, torch.zeros_like(mask), behind, mask)
    assert following[0].tolist() == pytest.approx([0.4, 0.6, 0.0]) and following[1, :2].tolist() == pytest.approx(
        [0.3, 0.7]
    )
    rewards, gammas = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), torch.full((2, 3), 0.5)
    shaped = shaped_rewards(rewards, values, following, gammas, weight=2.0)
    # r + 2 (0.5 V' - V): 2 (0.2 - 0.2), 2 (0.3 - 0.4), 1 + 2 (0 - 0.6)
    assert shaped[0].tolist() == pytest.approx([0.0, -0.2, -0.2])
    assert shaped[1, :2].tolist() == pytest.approx([2 * (0.15 - 0.5), 2 * (0.35 - 0.3)])


def test_a_step_that_lasts_is_discounted_by_its_duration_and_counts_lambda_once() -> None:
    # gamma = 0.5, lambda = 0.8; durations 3, 1, 2, so that gamma^k = 0.125, 0.5, 0.25
    # t=2: delta = 1 + 0.25*8 - 2 = 1                A = 1                        (cut: bootstrap 8, two steps away)
    # t=1: delta = 0 + 0.5*2 - 3 = -2                A = -2 + 0.5*0.8*1 = -1.6
    # t=0: delta = 4 + 0.125*3 - 1 = 3.375           A = 3.375 + 0.125*0.8*-1.6 = 3.215
    none = flags(0, 0, 0)
    given = row(4, 0, 1), row(1, 3, 2), none, none, row(100, 100, 8), 0.5, 0.8, flags(1, 1, 1)
    advantages, targets = gae(*given, torch.tensor([[3, 1, 2]]))
    assert advantages[0].tolist() == pytest.approx([3.215, -1.6, 1.0])
    assert targets[0].tolist() == pytest.approx([4.215, 1.4, 3.0])


def test_steps_of_one_environment_step_are_as_without_durations_to_the_bit() -> None:
    random = torch.Generator().manual_seed(0)
    rewards, values, bootstrap = (torch.randn(5, 40, generator=random) for _ in range(3))
    terminated, truncated = (torch.rand(5, 40, generator=random) < 0.1 for _ in range(2))
    mask = torch.arange(40) < torch.tensor([[40], [31], [1], [17], [40]])
    for gamma, lam in ((0.99, 0.95), (0.995, 0.9), (1.0, 1.0), (0.97, 0.0)):
        given = rewards, values, terminated, truncated, bootstrap, gamma, lam, mask
        # as equations 11-16 have it, with gamma and gamma lambda rounded once each
        following = next_values(values, terminated, truncated, bootstrap, mask)
        ends = terminated | truncated | (mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1)))
        deltas, expected = rewards + gamma * following - values, torch.zeros(5, 41)
        carry = torch.where(ends, 0.0, gamma * lam).float()
        for t in range(39, -1, -1):
            expected[:, t] = torch.where(mask[:, t], deltas[:, t] + carry[:, t] * expected[:, t + 1], 0.0)
        for durations in (None, torch.ones(5, 40, dtype=torch.long)):
            assert torch.equal(gae(*given, durations)[0], expected[:, :40])


def test_a_potential_is_discounted_by_the_duration_too() -> None:
    gammas = discounts(0.5, torch.tensor([[2, 3]]))
    shaped = shaped_rewards(torch.zeros(1, 2), torch.tensor([[0.4, 0.8]]), torch.tensor([[0.8, 0.0]]), gammas, 1.0)
    # 0.25*0.8 - 0.4, 0.125*0 - 0.8
    assert shaped[0].tolist() == pytest.approx([-0.2, -0.8])
