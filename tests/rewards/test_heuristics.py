"""Each reward by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vlarl_rllib.rewards import Length, MalformedReply, RewardEpisode, Smoothness, Success, make_rewards
from vlarl_rllib.settings import Settings

ACTIONS = np.zeros((3, 7))
ACTIONS[1, :6] = 0.5
ACTIONS[2, :6] = [0.5] * 5 + [-0.5]
ACTIONS[:, 6] = [1.0, -1.0, 1.0]
EPISODE = RewardEpisode(
    images=np.zeros((4, 8, 8, 3), np.uint8),
    tokens=np.array([[256] * 7, [511] * 7, [300] * 7]),
    durations=np.ones(3, np.int64),
    actions=ACTIONS,
    env_rewards=np.array([0.0, 0.0, 1.0], np.float32),
    instruction="push the bowl",
    terminated=True,
)


def test_success_is_the_environments() -> None:
    assert Success()(EPISODE).tolist() == [0.0, 0.0, 1.0]


def test_every_step_costs() -> None:
    assert Length()(EPISODE).tolist() == [-1.0, -1.0, -1.0]


def test_jerks_cost_their_mean_square_and_the_gripper_is_free() -> None:
    # 0.5 in each of six numbers; then 1.0 in one of six
    assert Smoothness()(EPISODE).tolist() == pytest.approx([0.0, -0.25, -1 / 6])


@pytest.mark.parametrize(("token", "expected"), [(256, 0.0), (511, 0.0), (255, -1.0), (512, -1.0), (2, -1.0)])
def test_a_reply_with_another_token_is_malformed(token: int, expected: float) -> None:
    tokens = EPISODE.tokens.copy()
    tokens[1, 4] = token
    assert MalformedReply(range(256, 512))(replace(EPISODE, tokens=tokens)).tolist() == [0.0, expected, 0.0]


def test_settings_weigh_them(tmp_path: Path) -> None:
    def total(**rewards: float) -> list[float]:
        return make_rewards(Settings.from_dict({"rewards": rewards}).rewards, range(256, 512), tmp_path)(
            EPISODE
        ).tolist()

    assert total() == [0.0, 0.0, 1.0]
    assert total(success=0.0, length=0.1) == pytest.approx([-0.1] * 3)
    assert total(success=5.0, length=0.1, smoothness=0.4) == pytest.approx([-0.1, -0.2, 5.0 - 0.1 - 0.4 / 6])
