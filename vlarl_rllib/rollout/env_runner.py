"""RLlib's EnvRunner for slots of vision-language-action environments, sampled by engines.

The Algorithm calls `attach` (which engines, which version), then `sample_slots` until the runner says that the
iteration is complete. Episodes stay in this node's object store; what returns is one reference per slot with its number
of steps.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import ray

from vlarl_rllib.rllib_compat import without_tensorflow

with without_tensorflow():
    from ray.rllib.core import DEFAULT_MODULE_ID
    from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics import NUM_MODULE_STEPS_SAMPLED, NUM_MODULE_STEPS_SAMPLED_LIFETIME

from vlarl_rllib.engines.client import LocalSampler, RemoteSampler, SamplerClient
from vlarl_rllib.engines.telemetry import watch_sampling
from vlarl_rllib.envs.registry import frames_per_second
from vlarl_rllib.rollout.contribution import Attached, Contribution, Order
from vlarl_rllib.rollout.curriculum import AdaptiveCurriculum
from vlarl_rllib.rollout.evaluation import Evaluation, EvaluationRound, StartQueue
from vlarl_rllib.rollout.loop import make_groups
from vlarl_rllib.rollout.players import TrainingPlayer
from vlarl_rllib.rollout.slots_runner import SlotsRunner
from vlarl_rllib.settings import Settings
from vlarl_rllib.types import Start, WeightManifest

logger = logging.getLogger(__name__)

NEWEST = sys.maxsize
"""Above every policy version."""


class VLAEnvRunner(SlotsRunner):
    """A runner as the Algorithm calls it."""

    def __init__(self, **kwargs: Any) -> None:
        self._iteration = self._generation = -1
        self._evaluation: Evaluation | None = None
        super().__init__(**kwargs)

    def sample(self, *, num_timesteps: int | None = None, **kwargs: Any) -> list[SingleAgentEpisode]:  # type: ignore[override]
        """Play an iteration's share and return the episodes themselves; `num_timesteps` divided over the slots where
        steps are counted."""
        rollout = self.settings.rollout
        per_slot = (
            -(-num_timesteps // self.num_envs)
            if num_timesteps and not rollout.episodes_per_iteration
            else rollout.quota
        )
        contribution = self.sample_slots(self._iteration + 1, per_slot)
        return [episode for portion in contribution.portions for episode in ray.get(portion.ref)]

    # The Algorithm's calls

    def reconfigure(self, config: Any, trial: int) -> None:
        """Play for another trial from now on, in the same environments: with its settings and seeds, from new episodes.

        Args:
            trial: its number, for `Attached`.
        """
        if self._failure:
            return
        self.begin_new_episodes()
        self.config, self.settings, self._trial = config, Settings.from_dict(config.vla), trial
        self._generation = -1
        self._make_players()
        self._tell.forget_counts()
        self.telemetry.follow(*self._run_labels())
        self.metrics.reset()

    def attach(
        self, engines: list[Any], version: int, manifest: WeightManifest | None, reward_worker: Any = None
    ) -> Attached:
        """Use these engine actors from now on, or an in-process sampler where there are none, at weights `version`; and
        this reward worker."""
        if self._failure:
            return Attached(os.getpid(), (), (), self._failure, self._trial)
        self._rewards.attach(reward_worker)
        if self.settings.engines.num:
            if not isinstance(self._sampler, RemoteSampler):
                self._sampler = RemoteSampler(self._loop.completions, engines)
            self._sampler.attach(engines)
        else:
            if not isinstance(self._sampler, LocalSampler):
                from vlarl_rllib.engines.torch_engine import TorchEngine

                engine = TorchEngine(self._engine_spec)
                watch_sampling(self.telemetry, engine, engine.actions)
                self._sampler = LocalSampler(engine, self._loop.completions)
            if manifest is not None and manifest.version != self._sampler.policy_version:
                self._sampler.load_weights(manifest)
        self._version = version
        self.module.weights_version = version
        evaluating = self._evaluation.queue.playing.values() if self._evaluation else ()
        return Attached(os.getpid(), self._slots.tasks, tuple(evaluating), trial=self._trial)

    def sample_slots(
        self, iteration: int, quota: int, weights: Mapping[tuple[int, int], float] | None = None
    ) -> Contribution:
        """Play until each slot has contributed `quota` decisions, or whole episodes, to `iteration`, or an engine
        fails.

        Called again with the same `iteration` it goes on where the failure stopped it, and hands all of it over at the
        end.

        Args:
            weights: of each (task, start), for an adaptive curriculum.
        """
        if isinstance(self._curriculum, AdaptiveCurriculum):
            self._curriculum.weights = weights or {}
        if iteration != self._iteration:
            self._iteration = iteration
            for player in self._players.values():
                player.begin_iteration(iteration, quota)
        contribution = self._play(self._current_version())
        contribution.missing = sum(player.missing for player in self._players.values())
        for player in self._players.values() if not contribution.missing else ():
            for fragments in player.take():
                self._hand_over(contribution, player, fragments, iteration)
        return self._logged(contribution)

    def play_ahead(self, attach: dict[str, Any], order: Order) -> Contribution:
        """Play on, for `order.seconds` or until all slots have one more share, and hand over what is finished.

        Args:
            attach: arguments of `attach`.
        """
        attached = self.attach(**attach)
        if attached.failure or order.trial != self._trial:
            return Contribution(runner=self.worker_index, attached=attached)
        if isinstance(self._curriculum, AdaptiveCurriculum):
            self._curriculum.weights = order.weights
        if order.generation != self._generation:
            self._generation = order.generation
            self._end_episodes(TrainingPlayer.abandon)
            for player in self._players.values():
                player.begin_iteration(order.first, order.quota)
        for player in self._players.values():
            player.run_ahead(order.last)
        before, end = self._through(), time.monotonic() + order.seconds
        contribution = self._play(
            range(order.oldest_version, NEWEST), lambda: self._through() > before or time.monotonic() > end
        )
        contribution.attached, contribution.generation = attached, order.generation
        contribution.through = self._through()
        for player in self._players.values():
            for iteration, fragments in player.take_shares():
                self._hand_over(contribution, player, fragments, iteration)
        return self._logged(contribution)

    def begin_new_episodes(self) -> None:
        """End the running episodes where they are, unseen, and count the next `sample_slots` as a new iteration,
        whatever its number; of shares that run ahead the running ones are begun anew."""
        self._iteration = -1
        ahead = self.settings.rollout.async_mode
        self._end_episodes(TrainingPlayer.begin_share_anew if ahead else TrainingPlayer.abandon)

    def _end_episodes(self, forget: Callable[[TrainingPlayer], None]) -> None:
        self._evaluation = None
        self._loop.abandon()
        for player in self._players.values():
            forget(player)

    def evaluate(
        self,
        starts: list[Start],
        *,
        change_tasks: bool = False,
        seconds: float | None = None,
        record: Collection[Start] = (),
    ) -> EvaluationRound:
        """Play one greedy episode from each of `starts`, and go on with those of the last call; `begin_new_episodes`
        ends it.

        Args:
            starts: as far as this call gets to them, the slots have their tasks, and no engine fails.
            change_tasks: whether slots may leave the task that they begin with, at the cost of building models.
            seconds: after which running episodes rest until the next call; None = play to the end.
            record: starts whose episodes are filmed.
        """
        if self._evaluation is None:
            self.begin_new_episodes()
            queue = StartQueue(
                self._slots.tasks,
                self.env.processes.slots_of_process(),
                self.settings.env.models_per_process,
                change_tasks=change_tasks,
            )
            self._evaluation = Evaluation(queue, self.num_envs, frames_per_second(self.settings.env.name))
        evaluation, deaths = self._evaluation, self._loop.env_deaths
        evaluation.begin_round(starts, seconds, record)
        self._loop.run(
            evaluation.players, self._require_sampler(), self._current_version(), self._groups(1), "evaluation"
        )  # the queue's order is one of all slots
        evaluation.round.env_deaths = self._loop.env_deaths - deaths
        evaluation.round.engine_error = str(self._loop.engine_error) if self._loop.engine_error else None
        return evaluation.round

    def _groups(self, count: int) -> list[tuple[int, ...]]:
        """So many groups of slots that keep in lockstep; each slot by itself without it."""
        return make_groups(self.env.processes.slots_of_process(), count if self.settings.lockstep else self.num_envs)

    def _require_sampler(self) -> SamplerClient:
        if self._sampler is None:
            raise RuntimeError("attach() comes before sampling: this runner knows no engine")
        return self._sampler

    def _current_version(self) -> range:
        return range(self._version, self._version + 1)

    def _through(self) -> int:
        """The newest iteration whose share all slots have played."""
        return min(player.through for player in self._players.values())

    def _play(self, versions: range, until: Callable[[], bool] = lambda: False) -> Contribution:
        """Run the loop; what it was like, with nothing handed over yet."""
        began, played = time.perf_counter(), sum(player.total_played for player in self._players.values())
        self._loop.run(self._players, self._require_sampler(), versions, self._groups(2), until=until)
        now, error = sum(player.total_played for player in self._players.values()), self._loop.engine_error
        return Contribution(
            played=max(0, now - played),  # below 0 where a death cost more than was played
            seconds=time.perf_counter() - began,
            engine_error=str(error) if error else None,
            runner=self.worker_index,
            pids={"runner": os.getpid(), "environments": self.env.processes.pids()},
        )

    def _hand_over(
        self, contribution: Contribution, player: TrainingPlayer, fragments: list[SingleAgentEpisode], iteration: int
    ) -> None:
        self._tell_of(fragments, player.slot)
        contribution.add(fragments, iteration, is_group=self.settings.rollout.group_size > 1)

    def _tell_of(self, fragments: list[SingleAgentEpisode], slot: int) -> None:
        """RLlib's callbacks for what is handed over; of an episode that ends they see the last fragment, and
        `custom_data` of the whole."""
        shared = {"env": self.env, "rl_module": self.module, "env_index": slot, "prev_episode_chunks": []}
        for fragment in fragments:
            if fragment.is_done:
                self._call_back("on_episode_end", episode=fragment, **shared)
        self._call_back("on_sample_end", samples=fragments)

    def _logged(self, contribution: Contribution) -> Contribution:
        """With metrics since the last call; RLlib adds up or averages them over runners."""
        results = [result for player in self._players.values() for result in player.results]
        dropped = sum(player.dropped_steps for player in self._players.values())
        for player in self._players.values():
            player.results, player.dropped_steps = [], 0
        contribution.results = results
        env_steps = contribution.env_steps
        self._increase_sampled_metrics(env_steps, len(results))
        for name, reduce in ((NUM_MODULE_STEPS_SAMPLED, "sum"), (NUM_MODULE_STEPS_SAMPLED_LIFETIME, "lifetime_sum")):
            # RLlib counts environment steps for its module, whose steps are decisions.
            self.metrics.log_value((name, DEFAULT_MODULE_ID), contribution.num_decisions - env_steps, reduce=reduce)
        for result in results:
            self._log_episode_metrics(result.length, result.reward, 0.0)
        self._tell.tell_of(results)
        failures = self._rewards.failures
        sums = self._tell.take_sums(contribution, dropped=dropped, failures=failures)
        for name, value in sums.items():
            self.metrics.log_value(name, value, reduce="sum")
        self._rewards.failures.clear()
        contribution.metrics = self.get_metrics()
        return contribution
