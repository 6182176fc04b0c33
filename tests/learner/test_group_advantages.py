"""Group-relative advantages against numbers worked out by hand."""

import pytest
import torch

from vlarl_rllib.learner.group_advantages import group_advantages

RETURNS = torch.tensor([1.0, 0.0, 0.0, 3.0, 1.0, 1.0, 7.0], dtype=torch.float64)
GROUPS = torch.tensor([0, 0, 0, 1, 1, 2, 3])


def test_rloo_compares_with_the_mean_of_the_others() -> None:
    # Group 0: 1 - (0+0)/2 = 1, 0 - (1+0)/2 = -0.5 twice. Group 1: 3 - 1 = 2, 1 - 3 = -2. Groups 2 and 3 have one
    # episode each.
    assert group_advantages(RETURNS, GROUPS, "rloo").tolist() == pytest.approx([1.0, -0.5, -0.5, 2.0, -2.0, 0.0, 0.0])


def test_grpo_divides_by_the_standard_deviation_of_the_group() -> None:
    # Group 0: mean 1/3, variance (4/9 + 1/9 + 1/9)/3 = 2/9: (2/3)/sqrt(2/9) = sqrt(2), -sqrt(2)/2 twice. Group 1: mean
    # 2, deviation 1.
    root = 2**0.5
    assert group_advantages(RETURNS, GROUPS, "grpo").tolist() == pytest.approx(
        [root, -root / 2, -root / 2, 1.0, -1.0, 0.0, 0.0], abs=1e-5
    )


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
@pytest.mark.parametrize("value", [1.0, -22.1, 1 / 0.1013])
@pytest.mark.parametrize("size", [3, 7, 8])
def test_a_group_of_equals_teaches_nothing(kind: str, value: float, size: int) -> None:
    found = group_advantages(torch.full((size,), value), torch.zeros(size, dtype=torch.long), kind)  # type: ignore[arg-type]
    assert found.dtype == torch.float32 and found.tolist() == [0.0] * size
