"""Several episodes on one simulator are the same as each on its own."""

import numpy as np
import pytest
from env_helpers import TASK

from vlarl_rllib.envs import EnvSpec, make_env, slots
from vlarl_rllib.envs.libero import LiberoEnv
from vlarl_rllib.envs.slots import SlotTable

SPEC = EnvSpec(name="synthetic", image_size=32)
ELSEWHERE = np.full(7, 0.95)
"""An action that never succeeds in the synthetic environment, whose targets lie within 0.6."""


def test_interleaved_slots_equal_separate_environments() -> None:
    table = SlotTable(SPEC, max_models=2)
    tasks = [0, 0, 0, 1]
    frames: dict[int, list[bytes]] = {}
    for slot, task in enumerate(tasks):
        frames[slot] = [table.reset(slot, task, initial_state=slot, seed=100 + slot)[0]["image"].tobytes()]
    order = np.random.default_rng(0).permutation(np.repeat(range(4), 10))
    for slot in order:
        frames[slot].append(table.step(slot, ELSEWHERE)[0]["image"].tobytes())
    for slot, task in enumerate(tasks):
        env = make_env(SPEC)
        alone = [env.reset(seed=100 + slot, options={"task_id": task, "initial_state": slot})[0]["image"].tobytes()]
        alone += [env.step(ELSEWHERE)[0]["image"].tobytes() for _ in range(10)]
        assert frames[slot] == alone


def test_interleaved_libero_slots_equal_separate_episodes(
    libero_env: LiberoEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "make_env", lambda spec: libero_env)
    table = SlotTable(libero_env.env_spec, max_models=1)
    actions = np.clip(np.random.default_rng(0).normal(0, 0.4, (2, 8, 7)), -1, 1)
    actions[:, :, 6] = [[1, 0] * 4, [0, 0, 1, 1] * 2]  # grippers that open and close at different times

    def state() -> np.ndarray:
        return libero_env.simulation.sim.get_state().flatten()

    together: list[list[tuple[np.ndarray, np.ndarray]]] = [[], []]
    for slot in (0, 1):
        image = table.reset(slot, TASK, initial_state=slot, seed=slot)[0]["image"]
        together[slot].append((image, state()))
    for step in range(8):
        for slot in (0, 1):
            together[slot].append((table.step(slot, actions[slot, step])[0]["image"], state()))
    for slot in (0, 1):
        image = libero_env.reset(seed=slot, options={"task_id": TASK, "initial_state": slot})[0]["image"]
        for step, (expected_image, expected_physics) in enumerate(together[slot]):
            np.testing.assert_array_equal(state(), expected_physics)
            np.testing.assert_array_equal(image, expected_image)
            if step < 8:
                image = libero_env.step(libero_env.policy_to_env_action(actions[slot, step]))[0]["image"]


def test_least_recently_used_model_makes_room() -> None:
    table = SlotTable(SPEC, max_models=2)
    table.reset(0, 0, 0, 0)
    table.reset(1, 1, 0, 0)
    table.step(0, ELSEWHERE)
    table.reset(0, 2, 0, 0)  # slot 0 leaves task 0; slot 1 still plays task 1
    assert list(table._envs) == [1, 2]
    table.step(1, ELSEWHERE)
    with pytest.raises(RuntimeError, match=r"models_per_process is 2 .* task\(s\) \[1, 2\]"):
        table.reset(2, 3, 0, 0)
    assert not table.step(1, ELSEWHERE)[2]


def test_no_step_without_an_episode() -> None:
    table = SlotTable(EnvSpec(name="synthetic", image_size=32, max_steps=1), max_models=1)
    with pytest.raises(RuntimeError, match="slot 0 has no episode"):
        table.step(0, ELSEWHERE)
    table.reset(0, 0, 0, 0)
    assert table.step(0, ELSEWHERE)[3]
    with pytest.raises(RuntimeError, match="slot 0 has no episode"):
        table.step(0, ELSEWHERE)


def test_a_reset_during_another_slots_episode_leaves_it_alone() -> None:
    table = SlotTable(SPEC, max_models=1)
    table.reset(0, 0, 4, 7)
    table.reset(1, 0, 5, 8)
    after = table.step(0, ELSEWHERE)[0]["image"]
    env = make_env(SPEC)
    env.reset(seed=7, options={"task_id": 0, "initial_state": 4})
    np.testing.assert_array_equal(after, env.step(ELSEWHERE)[0]["image"])
