"""The players of a runner's slots, made from the settings: at its start, and when it takes over another trial's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlarl_rllib.envs.registry import training_and_held_out_states
from vlarl_rllib.models.family import ActionFormat
from vlarl_rllib.models.interfaces import ActionCodec
from vlarl_rllib.rewards import WeightedRewards
from vlarl_rllib.rollout.curriculum import AdaptiveCurriculum, FixedCurriculum
from vlarl_rllib.rollout.players import TrainingPlayer
from vlarl_rllib.rollout.slot_env import SlotVectorEnv
from vlarl_rllib.settings import Settings
from vlarl_rllib.types import ACTION_SIZE, EnvSpec


@dataclass(frozen=True)
class RunnerSlots:
    """What of a runner's slots stays as it is, whatever trial they play for."""

    spec: EnvSpec
    env: SlotVectorEnv
    tasks: tuple[int, ...]
    """Of each slot, as it begins with."""
    first: int
    """Number of the first one within the run."""
    codec: ActionCodec
    actions: ActionFormat

    def make_players(
        self, settings: Settings, rewards: WeightedRewards
    ) -> tuple[FixedCurriculum, dict[int, TrainingPlayer]]:
        """The curriculum that all slots share, and a player for each."""
        curriculum = self._make_curriculum(settings)
        players = {
            slot: TrainingPlayer(
                slot,
                self.first + slot,
                curriculum=curriculum,
                spaces=(self.env.single_observation_space, self.env.single_action_space),
                temperature=settings.temperature,
                rewards=rewards,
                decode=self.codec.normalized,
                num_actions=self.actions.num_actions,
                gamma=settings.gamma_within_decisions,
                seed=settings.run.seed,
                whole_episodes=settings.rollout.episodes_per_iteration is not None,
                group_size=settings.rollout.group_size,
            )
            for slot in range(len(self.tasks))
        }
        return curriculum, players

    def _make_curriculum(self, settings: Settings) -> FixedCurriculum:
        seed, tasks = settings.run.seed, settings.task_ids
        states = {
            task: training_and_held_out_states(self.spec, task)[0][: settings.curriculum.starts_per_task]
            for task in tasks
        }
        if settings.curriculum.kind == "fixed":
            return FixedCurriculum(self.tasks, states, first_slot=self.first, seed=seed)
        playable: dict[int, Sequence[int]] = {}
        for slots in self.env.processes.slots_of_process():
            models = list(dict.fromkeys(self.tasks[slot] for slot in slots))
            playable |= dict.fromkeys(slots, tasks if settings.env.models_per_process >= len(tasks) else models)
        return AdaptiveCurriculum(
            [playable[slot] for slot in range(len(playable))], states, first_slot=self.first, seed=seed
        )

    def check_decisions(self, executed: int | None) -> None:
        """Raise ValueError where not so many actions can be played, or the codec is not what `ActionCodec` says."""
        if executed and executed > self.actions.num_actions:
            raise ValueError(
                f"rollout.execute_actions: {executed} is more than the {self.actions.num_actions} action(s) of a "
                "decision"
            )
        tokens = np.full(self.actions.num_tokens, self.actions.token_ids[0])
        shape = (self.actions.num_actions, ACTION_SIZE)
        for made in (self.codec.decode(tokens), self.codec.normalized(tokens)):
            if np.shape(made) != shape:
                raise ValueError(
                    f"model.family: its codec makes {np.shape(made)} of a reply, must be {shape}: K actions of "
                    f"{ACTION_SIZE} numbers"
                )
