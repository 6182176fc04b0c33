"""The tabletop: what succeeds, what repeats, what is seen."""

from collections.abc import Iterator

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from vlarl_rllib.data.experts import TabletopExpert
from vlarl_rllib.envs import EnvSpec, task_instructions
from vlarl_rllib.envs.tabletop import TASKS, TabletopEnv

HORIZON = TabletopEnv.HORIZON
STILL = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])


@pytest.fixture(scope="module")
def env() -> Iterator[TabletopEnv]:
    env = TabletopEnv(EnvSpec(name="tabletop", image_size=56, fast_render=True))
    yield env
    env.close()


def play(env: TabletopEnv, task: int, state: int) -> tuple[bool, int]:
    env.reset(options={"task_id": task, "initial_state": state})
    expert = TabletopExpert()
    for step in range(1, HORIZON + 1):
        _, reward, terminated, truncated, info = env.step(expert.act(env))
        assert reward == float(terminated) == float(info["success"])
        if terminated or truncated:
            return terminated, step
    raise AssertionError("the episode goes on past its horizon")


@pytest.mark.filterwarnings("ignore:.*")
def test_it_is_a_gymnasium_environment(env: TabletopEnv) -> None:
    check_env(env, skip_render_check=True)


def test_the_expert_solves_every_task(env: TabletopEnv) -> None:
    solved = {task.instruction: [play(env, index, state)[0] for state in range(6)] for index, task in enumerate(TASKS)}
    assert sum(sum(each) for each in solved.values()) >= 0.9 * 6 * len(TASKS), solved
    assert all(sum(each) >= 4 for each in solved.values()), solved


def test_doing_nothing_or_anything_solves_next_to_nothing(env: TabletopEnv) -> None:
    random = np.random.default_rng(0)
    successes = 0
    for task in range(len(TASKS)):
        env.reset(options={"task_id": task, "initial_state": 0})
        assert not any(env.step(STILL)[2] for _ in range(HORIZON))
        env.reset(options={"task_id": task, "initial_state": 0})
        successes += any(env.step(random.uniform(-1, 1, 7))[2] for _ in range(HORIZON))
    assert successes <= 3


@pytest.mark.parametrize(("task", "horizon"), [(0, 7), (3, 24), (9, 20), (12, 40)])
def test_the_last_step_truncates_and_each_verb_has_its_own(env: TabletopEnv, task: int, horizon: int) -> None:
    env.reset(options={"task_id": task})
    ends = [env.step(STILL)[1:4] for _ in range(horizon)]
    assert ends == [(0.0, False, False)] * (horizon - 1) + [(0.0, False, True)]


def test_an_episode_repeats_bit_for_bit_and_goes_on_from_a_snapshot(env: TabletopEnv) -> None:
    actions = np.random.default_rng(1).uniform(-1, 1, (12, 7))

    def frames(first: int) -> list[bytes]:
        return [env.step(action)[0]["image"].tobytes() for action in actions[first:]]

    env.reset(options={"task_id": 9, "initial_state": 4})
    whole = frames(0)
    env.reset(options={"task_id": 9, "initial_state": 4}, seed=5)
    for action in actions[:5]:
        env.step(action)
    snapshot = env.snapshot()
    assert frames(5) == whole[5:]
    env.reset(options={"task_id": 2, "initial_state": 0})
    env.restore(snapshot)
    assert frames(5) == whole[5:]


def test_each_start_looks_different_and_shows_two_objects(env: TabletopEnv) -> None:
    starts = [env.reset(options={"task_id": 0, "initial_state": state})[0]["image"] for state in range(8)]
    assert len({image.tobytes() for image in starts}) == 8
    for image in starts:
        red = (image[..., 0] > 120) & (image[..., 1] < 70) & (image[..., 2] < 70)
        assert red.sum() >= 12  # the target: the red cube


def test_two_cameras_do_not_disturb_each_other(env: TabletopEnv) -> None:
    before = env.reset(options={"task_id": 3, "initial_state": 1})[0]["image"]
    other = TabletopEnv(env.env_spec)
    other.reset()
    del other
    assert env.render() is before, "a frame is drawn once"
    env.restore(env.snapshot())
    assert env.render() is not before
    np.testing.assert_array_equal(env.render(), before)


def test_instructions_name_the_task() -> None:
    instructions = task_instructions("", name="tabletop")
    assert len(set(instructions)) == len(instructions) == len(TASKS)
    assert instructions[0] == "touch the red cube" and instructions[-1] == "put the blue cube on the purple zone"


def test_unknown_start(env: TabletopEnv) -> None:
    with pytest.raises(ValueError, match="0 to 17"):
        env.reset(options={"task_id": 18})
    with pytest.raises(ValueError, match="0 to 999"):
        env.reset(options={"initial_state": 1000})
