"""The pointing game."""

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from vlarl_rllib.envs import EnvSpec, task_instructions
from vlarl_rllib.envs.synthetic import COLORS, SyntheticEnv


@pytest.fixture
def env() -> SyntheticEnv:
    return SyntheticEnv(EnvSpec(name="synthetic", image_size=56))


@pytest.mark.filterwarnings("ignore:.*")
def test_it_is_a_gymnasium_environment(env: SyntheticEnv) -> None:
    check_env(env, skip_render_check=True)


def test_pointing_at_the_named_square_succeeds(env: SyntheticEnv) -> None:
    for task, color in enumerate(COLORS.values()):
        observation, info = env.reset(seed=0, options={"task_id": task, "initial_state": 7})
        assert info["instruction"] == task_instructions("", name="synthetic")[task]
        x, y = (round((value + 1) / 2 * 55) for value in env.target_action[:2])
        assert tuple(observation["image"][y, x]) == color
        _, reward, terminated, truncated, info = env.step(env.target_action)
        assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)


def test_pointing_elsewhere_goes_on_until_the_horizon(env: SyntheticEnv) -> None:
    env.reset(seed=0)
    ends = [env.step(np.full(7, 0.95))[1:4] for _ in range(20)]
    assert ends == [(0.0, False, False)] * 19 + [(0.0, False, True)]


def test_first_frame_depends_on_the_start_and_later_ones_on_the_seed_too(env: SyntheticEnv) -> None:
    def frames(task: int, state: int, seed: int) -> tuple[bytes, bytes]:
        first, _ = env.reset(seed=seed, options={"task_id": task, "initial_state": state})
        later = env.step(np.full(7, 0.95))[0]
        return first["image"].tobytes(), later["image"].tobytes()

    assert frames(1, 3, 5) == frames(1, 3, 5)
    assert frames(1, 3, 5)[0] == frames(1, 3, 6)[0]
    assert frames(1, 3, 5)[1] != frames(1, 3, 6)[1]
    assert len({frames(task, state, 5)[0] for task in range(4) for state in range(3)}) == 12


def test_unknown_start(env: SyntheticEnv) -> None:
    with pytest.raises(ValueError, match="0 to 3"):
        env.reset(options={"task_id": 4})
    with pytest.raises(ValueError, match="0 to 49"):
        env.reset(options={"initial_state": 50})
