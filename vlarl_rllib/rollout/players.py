"""What a slot does with its frames: here, collect decisions to train on; `rollout/evaluation.py` has the greedy
episodes.

The event loop (`loop.SlotLoop`) asks a player what comes next and tells it what happened; it knows nothing about
episodes itself.

T = decisions of a fragment, A = tokens of a decision, K = its actions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import gymnasium as gym
import numpy as np
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from vlarl_rllib.envs.vector import SlotEvent
from vlarl_rllib.rewards import RewardEpisode, WeightedRewards
from vlarl_rllib.rollout.curriculum import FixedCurriculum
from vlarl_rllib.types import (
    DURATION_KEY,
    INSTRUCTION_KEY,
    LOG_PROBS_KEY,
    STEP_REWARDS_KEY,
    VALUE_KEY,
    VERSION_KEY,
    EpisodeResult,
    SampleReply,
    SampleRequest,
    Start,
    derive_seed,
)


class Player(Protocol):
    """One slot's purpose."""

    @property
    def every_frame(self) -> bool:
        """Whether the frame behind each action is wanted, not only those that are acted on."""
        ...

    def next_start(self) -> Start | None:
        """Where the next episode begins; None = this slot has nothing more to do."""
        ...

    def started(self, event: SlotEvent) -> None:
        """The environment was reset; `event.image` is the first frame."""
        ...

    def wants_action(self) -> bool:
        """Whether the newest frame is to be acted on; False = the slot rests for now."""
        ...

    def request(self) -> SampleRequest:
        """The request for the newest frame."""
        ...

    def stepped(self, reply: SampleReply, event: SlotEvent) -> None:
        """The actions of `reply` were played, until the episode ended."""
        ...

    def dropped(self) -> None:
        """The environment's process died; the running episode is lost."""
        ...


class TrainingPlayer:
    """Contributes a fixed number of decisions per iteration, where an episode may go on in the next one, or of whole
    episodes.

    Args:
        slot: index within the runner; `global_slot`: within the run.
        whole_episodes: what is counted.
        group_size: so many whole episodes, one after the other, have the same start.
        spaces: (observation, action) of one slot.
        rewards: what decisions are worth, asked when they are handed over.
        decode: action token ids [T, A] -> normalised actions [T, K, 7].
        num_actions: K
        gamma: of the rewards within a decision.
    """

    def __init__(
        self,
        slot: int,
        global_slot: int,
        *,
        curriculum: FixedCurriculum,
        spaces: tuple[gym.Space, gym.Space],
        temperature: float,
        rewards: WeightedRewards,
        decode: Callable[[np.ndarray], np.ndarray],
        num_actions: int,
        gamma: float,
        seed: int,
        whole_episodes: bool = False,
        group_size: int = 1,
    ) -> None:
        self.results: list[EpisodeResult] = []
        self.dropped_steps = 0
        self.slot, self._global_slot, self._seed = slot, global_slot, seed
        self._curriculum, self._spaces = curriculum, spaces
        self._temperature, self._rewards, self._decode = temperature, rewards, decode
        self._num_actions, self._gamma = num_actions, gamma
        self._whole_episodes, self._group_size = whole_episodes, group_size
        self._iteration, self._quota, self.missing, self.num_played = 0, 0, 0, 0
        self.total_played = 0
        """Decisions since the player was made, less those that died."""
        self._last: int | None = None
        """Newest iteration whose share may be begun; None = `begin_iteration` begins each."""
        self._shares: list[tuple[int, list[SingleAgentEpisode]]] = []
        """Finished ones that nobody has taken, with their iteration."""
        self._episodes_begun = self._episodes_ended = 0
        self._group_start: tuple[tuple[int, int], Start] | None = None
        """Group, as (iteration, number), that was last begun, and its start."""
        self._fragment: SingleAgentEpisode | None = None
        self._done_fragments: list[SingleAgentEpisode] = []
        self._instruction = ""
        self._image: np.ndarray | None = None
        self._frames: dict[str, list[np.ndarray]] = {}
        """By fragment, the frames behind its actions, where a reward asks for them."""

    @property
    def every_frame(self) -> bool:
        return self._rewards.every_frame

    def begin_iteration(self, iteration: int, quota: int) -> None:
        """Ask for so many decisions, or whole episodes; call it once per iteration.

        From then on `missing` of them are still to be played, and `num_played` counts decisions.
        """
        self._iteration, self._quota, self.missing, self.num_played = iteration, quota, quota, 0
        self._episodes_begun = self._episodes_ended = 0

    def run_ahead(self, last: int) -> None:
        """Go on from one iteration's share to the next by itself, up to that of iteration `last`; see `take_shares`."""
        self._last = last
        if not self.missing and self._iteration < last:
            self.begin_iteration(self._iteration + 1, self._quota)

    @property
    def through(self) -> int:
        """The newest iteration whose share is played."""
        return self._iteration - (self.missing > 0)

    def begin_share_anew(self) -> None:
        """Forget what of the running share was played."""
        self.dropped_steps += sum(map(num_env_steps, self._cut()))
        self._fragment = None
        if self.missing:
            self.begin_iteration(self._iteration, self._quota)

    def next_start(self) -> Start:
        # begun anew after a death; and the one that is reset while the learners update is the next iteration's first
        if self._whole_episodes:
            iteration, index = (self._iteration, self._episodes_ended) if self.missing else (self._iteration + 1, 0)
            group = (iteration, index // self._group_size)
            if (
                self._group_start is None or self._group_start[0] != group
            ):  # an adaptive curriculum's weights change between its episodes
                self._group_start = group, self._curriculum.next_start(self.slot, *group)
            return self._group_start[1]
        self._episodes_begun += 1
        return self._curriculum.next_start(self.slot, self._iteration, self._episodes_begun - 1)

    def started(self, event: SlotEvent) -> None:
        self._instruction, self._image = event.instruction, event.image
        self._fragment = SingleAgentEpisode(observation_space=self._spaces[0], action_space=self._spaces[1])
        self._fragment.custom_data.update(
            {INSTRUCTION_KEY: event.instruction, "task_id": event.task_id, "length": 0, "reward": 0.0}
        )
        self._fragment.add_env_reset(event.image)

    def wants_action(self) -> bool:
        return self.missing > 0

    def request(self) -> SampleRequest:
        assert self._image is not None, "a request without a frame"
        seed = derive_seed(self._seed, 2, self._global_slot, self._iteration, self.num_played)
        return SampleRequest(self._image, self._instruction, seed, self._temperature)

    def stepped(self, reply: SampleReply, event: SlotEvent) -> None:
        fragment = self._fragment
        assert fragment is not None, "a decision without an episode"
        step_rewards = np.zeros(self._num_actions, np.float32)
        step_rewards[: event.num_steps] = event.rewards
        fragment.add_env_step(
            event.image,
            reply.tokens,
            sum(event.rewards),
            terminated=event.terminated,
            truncated=event.truncated,
            extra_model_outputs={
                LOG_PROBS_KEY: reply.log_probs,
                STEP_REWARDS_KEY: step_rewards,
                DURATION_KEY: event.num_steps,
                VERSION_KEY: reply.policy_version,
                **({} if reply.value is None else {VALUE_KEY: reply.value}),
            },
        )
        if self.every_frame:
            assert event.image is not None, "a step event has a frame"
            self._frames.setdefault(fragment.id_, []).extend((*event.frames, event.image))
        fragment.custom_data["length"] += event.num_steps
        fragment.custom_data["reward"] += sum(event.rewards)
        self._image = event.image
        self.num_played += 1
        self.total_played += 1
        self.missing -= event.ended if self._whole_episodes else 1
        if event.ended:
            self._episodes_ended += 1
            length, total = fragment.custom_data["length"], fragment.custom_data["reward"]
            fragment.custom_data["success"] = event.success
            self.results.append(EpisodeResult(event.task_id, event.initial_state, length, event.success, total))
            self._done_fragments.append(fragment)
            self._fragment = None
        if not self.missing and self._last is not None:
            self._shares.append((self._iteration, self._cut()))
            self.run_ahead(self._last)

    def dropped(self) -> None:
        if self._fragment is not None:
            self.missing += 0 if self._whole_episodes else len(self._fragment)
            self.num_played -= len(self._fragment)
            self.total_played -= len(self._fragment)
            self.dropped_steps += num_env_steps(self._fragment)
            self._frames.pop(self._fragment.id_, None)
        self._fragment = None

    def take(self) -> list[list[SingleAgentEpisode]]:
        """The fragments played since the last call, the running episode cut here: one list of all, or one of each
        group; numpy inside."""
        return self._grouped(self._cut())

    def take_shares(self) -> list[tuple[int, list[SingleAgentEpisode]]]:
        """Under `run_ahead`, what `take` returns of the shares that were finished since the last call, with their
        iterations."""
        shares, self._shares = self._shares, []
        return [(iteration, group) for iteration, fragments in shares for group in self._grouped(fragments)]

    def _cut(self) -> list[SingleAgentEpisode]:
        """What was played since the last call; the running episode goes on in a new fragment."""
        fragments, self._done_fragments = self._done_fragments, []
        if self._fragment is not None and len(self._fragment):
            fragments.append(self._fragment)
            self._fragment = self._fragment.cut()
        return fragments

    def _grouped(self, fragments: list[SingleAgentEpisode]) -> list[list[SingleAgentEpisode]]:
        rewarded = [self._rewarded(fragment.to_numpy()) for fragment in fragments]
        size = self._group_size if self._group_size > 1 else max(1, len(rewarded))
        return [rewarded[first : first + size] for first in range(0, len(rewarded), size)]

    def _rewarded(self, fragment: SingleAgentEpisode) -> SingleAgentEpisode:
        tokens, images = np.asarray(fragment.get_actions()), np.asarray(fragment.get_observations())
        durations = np.asarray(fragment.get_extra_model_outputs(DURATION_KEY), dtype=np.int64)
        played = np.arange(self._num_actions) < durations[:, None]
        frames = self._frames.pop(fragment.id_, None)
        seen = RewardEpisode(
            images=images,
            tokens=tokens,
            durations=durations,
            actions=self._decode(tokens)[played],
            env_rewards=np.asarray(fragment.get_extra_model_outputs(STEP_REWARDS_KEY), dtype=np.float32)[played],
            frames=None if frames is None else np.stack([images[0], *frames]),
            instruction=fragment.custom_data[INSTRUCTION_KEY],
            terminated=bool(fragment.is_terminated),
            gamma=self._gamma,
        )
        fragment.set_rewards(new_data=self._rewards(seen))
        return fragment

    def abandon(self) -> None:
        """Forget the running episode and what was not taken, so that the next iteration begins anew."""
        self._fragment, self._done_fragments, self._shares, self._group_start = None, [], [], None
        self._frames.clear()

    @property
    def playing(self) -> bool:
        return self._fragment is not None


def num_env_steps(fragment: SingleAgentEpisode) -> int:
    """Environment steps of its decisions."""
    return int(sum(fragment.get_extra_model_outputs(DURATION_KEY))) if len(fragment) else 0


def success_by_task(results: list[EpisodeResult]) -> Mapping[int, float]:
    """Mean success of the episodes of each task."""
    tasks: dict[int, list[bool]] = {}
    for result in results:
        tasks.setdefault(result.task_id, []).append(result.success)
    return {task: float(np.mean(successes)) for task, successes in sorted(tasks.items())}


def is_uniform(episodes: Sequence[SingleAgentEpisode]) -> bool:
    """Whether whole episodes all succeed, which is what ends one before its horizon, or all fail."""
    return len({episode.is_terminated for episode in episodes}) == 1
