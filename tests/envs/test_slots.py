"""Several episodes on one simulator are the same as each on its own."""

from dataclasses import replace

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
        frames[slot].append(table.play(slot, ELSEWHERE[None]).image.tobytes())
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
    actions[:, :, 6] = [[-1, 1] * 4, [1, 1, -1, -1] * 2]  # grippers that open and close at different times

    def state() -> np.ndarray:
        return libero_env.simulation.sim.get_state().flatten()

    together: list[list[tuple[np.ndarray, np.ndarray]]] = [[], []]
    for slot in (0, 1):
        image = table.reset(slot, TASK, initial_state=slot, seed=slot)[0]["image"]
        together[slot].append((image, state()))
    for step in range(8):
        for slot in (0, 1):
            together[slot].append((table.play(slot, actions[slot, step : step + 1]).image, state()))
    for slot in (0, 1):
        image = libero_env.reset(seed=slot, options={"task_id": TASK, "initial_state": slot})[0]["image"]
        for step, (expected_image, expected_physics) in enumerate(together[slot]):
            np.testing.assert_array_equal(state(), expected_physics)
            np.testing.assert_array_equal(image, expected_image)
            if step < 8:
                image = libero_env.step(actions[slot, step])[0]["image"]


def test_least_recently_used_model_makes_room() -> None:
    table = SlotTable(SPEC, max_models=2)
    table.reset(0, 0, 0, 0)
    table.reset(1, 1, 0, 0)
    table.play(0, ELSEWHERE[None])
    table.reset(0, 2, 0, 0)  # slot 0 leaves task 0; slot 1 still plays task 1
    assert list(table._envs) == [1, 2]
    table.play(1, ELSEWHERE[None])
    with pytest.raises(RuntimeError, match=r"models_per_process is 2 .* task\(s\) \[1, 2\]"):
        table.reset(2, 3, 0, 0)
    assert not table.play(1, ELSEWHERE[None]).terminated


def test_no_step_without_an_episode() -> None:
    table = SlotTable(EnvSpec(name="synthetic", image_size=32, max_steps=1), max_models=1)
    with pytest.raises(RuntimeError, match="slot 0 has no episode"):
        table.play(0, ELSEWHERE[None])
    table.reset(0, 0, 0, 0)
    assert table.play(0, ELSEWHERE[None]).truncated
    with pytest.raises(RuntimeError, match="slot 0 has no episode"):
        table.play(0, ELSEWHERE[None])


def test_a_reset_during_another_slots_episode_leaves_it_alone() -> None:
    table = SlotTable(SPEC, max_models=1)
    table.reset(0, 0, 4, 7)
    table.reset(1, 0, 5, 8)
    after = table.play(0, ELSEWHERE[None]).image
    env = make_env(SPEC)
    env.reset(seed=7, options={"task_id": 0, "initial_state": 4})
    np.testing.assert_array_equal(after, env.step(ELSEWHERE)[0]["image"])


DRAWING = [SPEC, EnvSpec(name="tabletop", image_size=28)]


@pytest.mark.parametrize("spec", DRAWING, ids=lambda spec: spec.name)
def test_several_actions_in_one_message_are_as_one_after_the_other(spec: EnvSpec) -> None:
    actions = np.random.default_rng(0).uniform(0.7, 1.0, (6, 7))
    table, env = SlotTable(spec, max_models=1), make_env(spec)
    table.reset(0, 0, 3, 7)
    env.reset(seed=7, options={"task_id": 0, "initial_state": 3})
    one_by_one = [env.step(action) for action in actions]
    first, second = table.play(0, actions[:4]), table.play(0, actions[4:], every_frame=True)
    np.testing.assert_array_equal(first.image, one_by_one[3][0]["image"])
    np.testing.assert_array_equal(second.image, one_by_one[5][0]["image"])
    assert first.rewards + second.rewards == tuple(result[1] for result in one_by_one)
    assert first.frames == () and len(second.frames) == 1
    np.testing.assert_array_equal(second.frames[0], one_by_one[4][0]["image"])


@pytest.mark.parametrize("spec", DRAWING, ids=lambda spec: spec.name)
def test_a_cut_within_a_decision_is_drawn_and_nothing_else_but_the_last(
    spec: EnvSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(spec, max_steps=6)
    env, drawn = make_env(spec), list[int]()
    draw = "_draw" if spec.name == "tabletop" else "render"
    real = getattr(type(env), draw)
    monkeypatch.setattr(type(env), draw, lambda self: drawn.append(1) or real(self))
    monkeypatch.setattr(slots, "make_env", lambda spec: env)
    table = SlotTable(spec, max_models=1)
    table.reset(0, 0, 0, 0)
    actions = np.tile(ELSEWHERE, (4, 1))
    drawn.clear()
    whole = table.play(0, actions)
    assert (len(whole.rewards), whole.truncated, len(drawn)) == (4, False, 1)
    cut = table.play(0, actions)
    assert (len(cut.rewards), cut.truncated, len(drawn)) == (2, True, 2)
    env.reset(seed=0, options={"task_id": 0, "initial_state": 0})
    env.draws = True
    for _ in range(6):
        observation = env.step(ELSEWHERE)[0]
    np.testing.assert_array_equal(cut.image, observation["image"])


def test_a_success_ends_a_decision() -> None:
    env, table = make_env(SPEC), SlotTable(SPEC, max_models=1)
    table.reset(0, 0, 2, 5)
    env.reset(seed=5, options={"task_id": 0, "initial_state": 2})
    played = table.play(0, np.stack([env.target_action, ELSEWHERE, ELSEWHERE]))
    assert (played.rewards, played.terminated, played.success) == ((1.0,), True, True)
    np.testing.assert_array_equal(played.image, env.step(env.target_action)[0]["image"], "rewards look at it")
    with pytest.raises(RuntimeError, match="slot 0 has no episode"):
        table.play(0, ELSEWHERE[None])


def test_libero_renders_the_last_frame_of_a_decision_as_it_does_every_frame(
    libero_env: LiberoEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "make_env", lambda spec: libero_env)
    table = SlotTable(libero_env.env_spec, max_models=1)
    actions = np.clip(np.random.default_rng(0).normal(0, 0.4, (3, 7)), -1, 1)
    table.reset(0, TASK, initial_state=1, seed=1)
    played, seconds = table.play(0, actions), table.render_seconds
    table.reset(0, TASK, initial_state=1, seed=1)
    filmed = table.play(0, actions, every_frame=True)
    np.testing.assert_array_equal(played.image, filmed.image)
    assert len(filmed.frames) == 2 and seconds < 0.6 * table.render_seconds
