"""What a slot contributes: exact quotas, fragments of episodes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from vlarl_rllib.envs.vector import SlotEvent
from vlarl_rllib.rewards import Reward, RewardEpisode, Success, WeightedRewards
from vlarl_rllib.rollout.curriculum import AdaptiveCurriculum, FixedCurriculum
from vlarl_rllib.rollout.players import TrainingPlayer, is_uniform, num_env_steps
from vlarl_rllib.types import VALUE_KEY, EpisodeResult, SampleReply

SPACES = (gym.spaces.Box(0, 255, (2, 2, 3), np.uint8), gym.spaces.MultiDiscrete([256] * 7))


def event(
    kind: str, frame: int, *, reward: float = 0.0, terminated: bool = False, truncated: bool = False
) -> SlotEvent:
    image = np.full((2, 2, 3), frame, np.uint8)
    return SlotEvent(
        slot=0, kind=kind, image=image, rewards=(reward,) * (kind == "step"), terminated=terminated,
        truncated=truncated, success=terminated, instruction="reach", task_id=0, initial_state=3,
    )  # fmt: skip


def reply(version: int = 7) -> SampleReply:
    return SampleReply(np.arange(7), np.full(7, -1.0, np.float32), version)


def player(
    *,
    whole_episodes: bool = False,
    group_size: int = 1,
    curriculum: FixedCurriculum | None = None,
    num_actions: int = 1,
    decode: Callable[[np.ndarray], np.ndarray] = lambda tokens: (tokens / 256)[:, None],
    reward: Reward | None = None,
) -> TrainingPlayer:
    curriculum = curriculum or FixedCurriculum([0], {0: range(40)}, first_slot=0, seed=1)
    rewards = WeightedRewards([(5.0, reward or Success())], timeout_seconds=10.0, traceback_dir=Path("unused"))
    return TrainingPlayer(
        0, 0, curriculum=curriculum, spaces=SPACES, temperature=1.0, rewards=rewards,
        decode=decode, num_actions=num_actions, gamma=0.5, seed=1,
        whole_episodes=whole_episodes, group_size=group_size,
    )  # fmt: skip


def test_values_go_under_rllibs_name_and_only_where_the_sampler_gives_them() -> None:
    assert VALUE_KEY == Columns.VF_PREDS
    for value, values in ((None, []), (-0.5, [-0.5, -0.5])):
        slot = player()
        slot.begin_iteration(0, 2)
        slot.started(event("reset", 0))
        for frame in (1, 2):
            slot.stepped(replace(reply(), value=value), event("step", frame))
        ((episode,),) = slot.take()
        found = episode.get_extra_model_outputs(VALUE_KEY) if VALUE_KEY in episode.extra_model_outputs else []
        assert list(found) == values


def test_an_episode_goes_on_across_iterations_and_a_success_is_scaled() -> None:
    slot = player()
    slot.begin_iteration(0, 2)
    slot.started(event("reset", 0))
    for frame in (1, 2):
        assert slot.wants_action()
        slot.stepped(reply(), event("step", frame))
    assert not slot.wants_action() and slot.missing == 0
    ((first,),) = slot.take()
    assert len(first) == 2 and not first.is_done and slot.results == []
    assert first.get_observations()[:, 0, 0, 0].tolist() == [0, 1, 2]

    slot.begin_iteration(1, 2)
    slot.stepped(reply(8), event("step", 3, reward=1.0, terminated=True))
    slot.started(event("reset", 10))
    slot.stepped(reply(8), event("step", 11, truncated=True))
    ((success, timed_out),) = slot.take()
    assert success.get_observations()[:, 0, 0, 0].tolist() == [2, 3]
    assert success.get_rewards().tolist() == [5.0] and success.is_terminated
    assert timed_out.is_truncated and not timed_out.is_terminated
    assert success.get_extra_model_outputs("policy_version").tolist() == [8]
    assert slot.results == [EpisodeResult(0, 3, 3, True, 1.0), EpisodeResult(0, 3, 1, False, 0.0)]


def test_a_dead_environment_costs_the_running_fragment_and_the_quota_is_still_met() -> None:
    slot = player()
    slot.begin_iteration(0, 3)
    slot.started(event("reset", 0))
    slot.stepped(reply(), event("step", 1, truncated=True))
    slot.started(event("reset", 5))
    slot.stepped(reply(), event("step", 6))
    slot.dropped()
    assert (slot.dropped_steps, slot.missing) == (1, 2)
    slot.started(event("reset", 8))
    for frame in (9, 10):
        slot.stepped(reply(), event("step", frame))
    assert [[len(fragment) for fragment in fragments] for fragments in slot.take()] == [
        [1, 2]
    ] and not slot.wants_action()


def test_a_request_seed_depends_on_slot_iteration_and_step_alone() -> None:
    def seeds(iteration: int) -> list[int]:
        slot = player()
        slot.begin_iteration(iteration, 3)
        slot.started(event("reset", 0))
        found = []
        for frame in (1, 2, 3):
            found.append(slot.request().seed)
            slot.stepped(reply(), event("step", frame))
        return found

    assert seeds(0) == seeds(0) and len(set(seeds(0) + seeds(1))) == 6


def test_groups_are_whole_episodes_from_one_start_also_after_a_death_and_from_one_iteration_to_the_next() -> None:
    slot = player(whole_episodes=True, group_size=2)
    begun = []

    def play(frames: int, *, dies: bool = False) -> None:
        begun.append(slot.next_start())
        slot.started(event("reset", 0))
        for frame in range(frames):
            slot.stepped(reply(), event("step", frame, terminated=frame + 1 == frames and not dies))
        if dies:
            slot.dropped()

    slot.begin_iteration(0, 4)
    play(3)
    play(1, dies=True)
    play(2)
    play(1)
    assert (slot.missing, slot.num_played, slot.dropped_steps) == (1, 6, 1)
    play(1)
    assert not slot.wants_action()
    assert [[len(fragment) for fragment in group] for group in slot.take()] == [[3, 2], [1, 1]]
    assert begun[0] == begun[1] == begun[2] and begun[3] == begun[4] != begun[0]

    ahead = slot.next_start()  # the environment is reset while the learners update
    slot.begin_iteration(1, 2)
    assert slot.next_start() == ahead not in begun


def test_a_group_keeps_its_start_though_the_curriculum_weighs_anew() -> None:
    curriculum = AdaptiveCurriculum([[0]], {0: range(40)}, first_slot=0, seed=1)
    slot = player(whole_episodes=True, group_size=2, curriculum=curriculum)
    ahead = slot.next_start()  # the environment is reset while the learners update
    curriculum.weights = {(0, ahead.initial_state): 1e-9}
    slot.begin_iteration(1, 2)
    slot.started(event("reset", 0))
    slot.stepped(reply(), event("step", 1, terminated=True))
    assert slot.next_start() == ahead
    slot.abandon()  # as a resumed run, which knows nothing of the draw
    assert slot.next_start() != ahead


def test_a_group_is_uniform_by_success_whatever_its_returns() -> None:
    def episode(reward: float, success: bool) -> SingleAgentEpisode:
        played = SingleAgentEpisode()
        played.add_env_reset(0)
        played.add_env_step(0, 0, reward, terminated=success, truncated=not success)
        return played.to_numpy()

    assert is_uniform([episode(0.25, True), episode(1.0, True)]) and is_uniform(
        [episode(-0.5, False), episode(0.0, False)]
    )
    assert not is_uniform([episode(0.0, True), episode(0.0, False)])


def chunky(frame: int, *rewards: float, frames: tuple[int, ...] = (), **ends: bool) -> SlotEvent:
    """A step event of so many environment steps."""
    pictures = tuple(np.full((2, 2, 3), number, np.uint8) for number in frames)
    return replace(event("step", frame, **ends), rewards=rewards, frames=pictures)


def test_a_decision_of_several_actions_is_one_step_with_the_discounted_sum_of_its_rewards() -> None:
    tokens = np.arange(6)
    slot = player(num_actions=3, decode=lambda tokens: np.zeros((len(tokens), 3, 7)))
    slot.begin_iteration(0, 3)
    slot.started(event("reset", 0))
    long = SampleReply(tokens, np.full(6, -1.0, np.float32), 7)
    slot.stepped(long, chunky(3, 0.0, 2.0, 4.0))
    slot.stepped(long, chunky(5, 0.0, 1.0, terminated=True))
    slot.started(event("reset", 9))
    slot.stepped(long, chunky(10, 0.0, 0.0, 0.0))
    assert slot.missing == 0 and slot.num_played == 3
    ((success, running),) = slot.take()
    # gamma 0.5, weight 5: 5 (0 + 0.5*2 + 0.25*4) = 10;  5 (0 + 0.5*1) = 2.5
    assert success.get_rewards().tolist() == [10.0, 2.5] and running.get_rewards().tolist() == [0.0]
    assert success.get_extra_model_outputs("duration").tolist() == [3, 2]
    assert slot.results == [EpisodeResult(0, 3, 5, True, 7.0)], "lengths count environment steps, returns no discount"
    assert (num_env_steps(success), num_env_steps(running)) == (5, 3)


def test_a_reward_that_asks_for_them_sees_the_frames_between_the_actions() -> None:
    class Brightness(Reward):
        name, every_frame = "brightness", True

        def __call__(self, episode: RewardEpisode) -> np.ndarray:
            assert episode.frames is not None and episode.images[:, 0, 0, 0].tolist() == [0, 3, 5]
            return episode.per_decision(episode.frames[1:, 0, 0, 0].astype(np.float32))

    slot = player(num_actions=3, decode=lambda tokens: np.zeros((len(tokens), 3, 7)), reward=Brightness())
    assert slot.every_frame and not player().every_frame
    slot.begin_iteration(0, 2)
    slot.started(event("reset", 0))
    slot.stepped(reply(), chunky(3, 0.0, 0.0, 0.0, frames=(1, 2)))
    slot.stepped(reply(), chunky(5, 0.0, 0.0, frames=(4,), truncated=True))
    ((fragment,),) = slot.take()
    # 5 (1 + 0.5*2 + 0.25*3), 5 (4 + 0.5*5)
    assert fragment.get_rewards().tolist() == [13.75, 32.5]


def test_a_slot_that_runs_ahead_goes_from_share_to_share_and_hands_over_whole_ones() -> None:
    slot = player()
    slot.begin_iteration(4, 2)
    slot.run_ahead(5)
    slot.started(event("reset", 0))
    for frame in range(1, 4):
        assert slot.wants_action() and slot.through == (3 if frame < 3 else 4)
        slot.stepped(reply(version=frame), event("step", frame))
    ((iteration, fragments),) = slot.take_shares()
    assert (iteration, [len(fragment) for fragment in fragments]) == (4, [2]) and slot.take_shares() == []
    slot.stepped(reply(), event("step", 4))
    assert slot.through == 5 and not slot.wants_action(), "iteration 6 is not allowed yet"
    slot.run_ahead(6)
    assert slot.wants_action() and slot.through == 5
    ((iteration, (share,)),) = slot.take_shares()
    assert iteration == 5 and share.get_extra_model_outputs("policy_version").tolist() == [3, 7]
    assert not share.is_done and len(np.asarray(share.get_observations())) == 3


def test_an_evaluation_costs_a_slot_that_runs_ahead_the_running_share_alone() -> None:
    slot = player()
    slot.begin_iteration(0, 2)
    slot.run_ahead(3)
    slot.started(event("reset", 0))
    for frame in range(1, 4):
        slot.stepped(reply(), event("step", frame))
    slot.begin_share_anew()
    assert (slot.through, slot.missing, slot.dropped_steps, slot.playing) == (0, 2, 1, False)
    assert [iteration for iteration, _ in slot.take_shares()] == [0]
