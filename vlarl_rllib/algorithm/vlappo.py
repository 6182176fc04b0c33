"""VLAPPO: sample from engines, update sharded learners, push the weights back; as an RLlib Algorithm under Ray Tune."""

from __future__ import annotations

import logging
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from vlarl_rllib.rllib_compat import (
    kill_runners,
    known_spaces,
    named_runners,
    trial_directory,
    trial_name,
    without_tensorflow,
)

with without_tensorflow():
    from ray.rllib.callbacks.utils import make_callback

from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.utils import metrics as names
from ray.tune import PlacementGroupFactory
from ray.tune.result import DONE, RESULT_DUPLICATE

from vlarl_rllib.algorithm.checkpointed import CheckpointedPPO
from vlarl_rllib.config import VLAPPOConfig
from vlarl_rllib.errors import lower_the_rates
from vlarl_rllib.learner.rank_group import LearnerGroupError
from vlarl_rllib.models.fingerprint import model_fingerprints
from vlarl_rllib.observability.ledger import Ledger
from vlarl_rllib.observability.metrics import LastRates, iteration_row, rllib_evaluation
from vlarl_rllib.observability.processes import write_processes
from vlarl_rllib.observability.self_test import SelfTest
from vlarl_rllib.process.calls import EndRequested
from vlarl_rllib.process.storage import place_of
from vlarl_rllib.ray_compat import nodes_of_actors
from vlarl_rllib.rollout.async_collector import AsyncCollector
from vlarl_rllib.rollout.collector import Rollout, RolloutCollector
from vlarl_rllib.rollout.curriculum import SuccessRecord
from vlarl_rllib.rollout.placement import NodesInUse, check_placement, places
from vlarl_rllib.rollout.runner_pool import require_runners
from vlarl_rllib.rollout.services import runner_options, runner_spaces, start_engines, start_reward_worker
from vlarl_rllib.runs.checkpoints import CheckpointStore
from vlarl_rllib.runs.greedy_evaluation import GreedyEvaluation
from vlarl_rllib.runs.pulse import Pulse
from vlarl_rllib.runs.trial import TrialRun
from vlarl_rllib.runs.trial_checkpoints import TrialCheckpoints
from vlarl_rllib.settings import Settings, SettingsError, calculate_runtime_args
from vlarl_rllib.settings.in_place import IN_PLACE, needs_new_processes
from vlarl_rllib.telemetry.actors import ActorNames
from vlarl_rllib.weights.sync import WeightSync

logger = logging.getLogger(__name__)


class VLAPPO(CheckpointedPPO):
    """PPO for vision-language-action models. Build it from a `VLAPPOConfig`, or give it to `ray.tune.Tuner`."""

    _run_name = ""  # before `setup`

    @classmethod
    def get_default_config(cls) -> VLAPPOConfig:
        return VLAPPOConfig()

    @classmethod
    def default_resource_request(cls, config: Any) -> PlacementGroupFactory:
        """The plan's bundles."""
        merged = cls.get_default_config().update_from_dict(config)
        try:
            return places(calculate_runtime_args(merged.settings()))
        except SettingsError:  # of one sample: its trial ends with that line, the others run
            return PlacementGroupFactory([{"CPU": 1.0}])

    @classmethod
    def from_checkpoint(cls, path: str | Path, **kwargs: Any) -> VLAPPO:
        """Build the algorithm that a checkpoint is of, and load it.

        Nothing in the checkpoint is unpickled for the settings, and they name no code but installed packages'.
        """
        directory = CheckpointStore.resolve(place_of(path))
        written = CheckpointStore.read_facts(directory)["settings"]
        config = VLAPPOConfig.from_settings(Settings.from_checkpoint(written, str(directory)))
        config.restore_from = str(directory)
        return config.build_algo(**kwargs)

    def __repr__(self) -> str:
        """What Ray's dashboard and logs call this actor, also where a mistake keeps the config from being there."""
        return f"{self._run_name}/algorithm" if self._run_name else type(self).__name__

    # Set-up and end

    def setup(self, config: Any) -> None:
        began = time.perf_counter()
        self._trial_number = 0
        self._earlier_restarts = Counter[str]()
        self._enter_trial(self.config)
        check_placement(self._plan)
        # Engines and the judge take longest to start and need nothing from the rest, so they start first and are waited
        # for last.
        self.reward_service = start_reward_worker(self._vla, self._run_name) if self._vla.rewards.process else None
        self.engine_pool = start_engines(self.config.engine_spec(), self._vla) if self._vla.engines.num else None
        self._pulse.doing = f"{self._vla.rollout.num_runners} runner(s) and {self._vla.learners.num} learner(s)"
        options = runner_options(self._plan, ActorNames(self._run_name))
        with named_runners(options), known_spaces(runner_spaces(self.config.engine_spec(), self._vla.env.num_envs)):
            super().setup(self.config)
        try:
            require_runners(self.env_runner_group)
        except RuntimeError:
            self.learner_group.shutdown()  # one in this process would leave its process group behind
            raise
        self._nodes = NodesInUse()
        self._connect(self.config.policy_version)
        started = {f"{self._vla.engines.num} engine(s)": self.engine_pool, "the reward worker": self.reward_service}
        for what, part in started.items():
            if part is not None:
                self._pulse.doing = what
                part.wait_until_ready()
        self._pulse.doing = "the first iteration"
        self._start_over()
        self.ledger.seconds["startup"] = time.perf_counter() - began

    def _enter_trial(self, config: VLAPPOConfig) -> None:
        """All that is of one run alone: settings, directory, checkpoints, counts."""
        self._trial_run, trial = None, None
        if config.run_dir is None and (trial := trial_directory(self)):
            self._trial_run = TrialRun(trial, config.settings())
            config = config.of_trial(trial, self._trial_run.last)
        self.config = config.named(otherwise=trial_name(self))
        self._vla, self._run_name = config.settings(), str(self.config.run_name)
        self._plan = calculate_runtime_args(self._vla)
        self._pulse = Pulse(config.run_dir)
        self.ledger = Ledger(config.faults, SelfTest.of(self._vla), self._run_name, self._vla.env.label)
        self._failed_iteration = -1
        self._successes = SuccessRecord(self._vla.curriculum.rule, self._vla.curriculum.temperature)
        self._models = model_fingerprints(self._vla)
        self._evaluation = GreedyEvaluation(self._vla, self._plan, config.run_dir, self.ledger, self._call_back)
        keep, origin = self._vla.run.keep_checkpoints, config.restore_from
        self.checkpoints = TrialCheckpoints(None if trial else config.run_dir, trial, keep, origin, self.ledger.faults)

    def _connect(self, version: int) -> None:
        """Wire learners, engines and runners for this trial; `version` is the newest one of the weights so far."""
        rollout = self._vla.rollout
        self.weight_sync = WeightSync(
            self.learner_group,
            self.engine_pool,
            version,
            transport=self._vla.weights.transport,
            keep=rollout.async_mode or not self._vla.engines.num,
        )
        make_collector = (
            partial(AsyncCollector, max_staleness=rollout.max_staleness) if rollout.async_mode else RolloutCollector
        )
        self.collector = make_collector(
            self.env_runner_group,
            self.weight_sync,
            self.engine_pool,
            enough=lambda: max(1, len(self.learner_group)),
            reward_service=self.reward_service,
            restore_runners=lambda: self.restore_env_runners(self.env_runner_group),
            timeout_seconds=rollout.timeout_seconds,
            ended=self._pulse.ended,
            filter_groups=rollout.filter_groups,
            if_diverged=lower_the_rates(self._vla.training.rates),
            trial=(self._trial_number, self.config),
        )

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Tune's `reuse_actors`: become another trial, whose settings differ in what `in_place.IN_PLACE` names. Its
        checkpoint comes by `load_checkpoint`, else it begins anew.

        Raises:
            SettingsError: the settings differ in something else.
        """
        config = type(self).get_default_config().update_from_dict(new_config)
        config.validate()
        config.freeze()
        if keys := needs_new_processes(self._vla.to_dict(), config.vla):
            raise SettingsError(
                f"reuse_actors: {keys[0]} differs between trials and needs new processes; leave reuse_actors out, or "
                f"search over {', '.join(IN_PLACE)} alone"
            )
        self._leave_trial()
        self._trial_number += 1
        self._enter_trial(config)
        self.learner_group.reconfigure(self.config)
        for part in (self.engine_pool, self.reward_service):
            if part is not None:
                part.follow_run(self._run_name, self._vla.env.label)
        self._connect(max(self.weight_sync.version, self.config.policy_version))
        self._earlier_restarts = self._restarts()
        self.metrics.reset()
        self._is_to_begin = True
        return True

    def _leave_trial(self) -> None:
        self._pulse.stop()
        self.ledger.close()
        if self._trial_run is not None:
            self._trial_run.close()

    def cleanup(self) -> None:
        self._leave_trial()
        if self._pulse.ended.is_set():
            kill_runners(self.env_runner_group)
        super().cleanup()
        for name in ("engine_pool", "reward_service"):
            if group := getattr(self, name, None):
                group.shutdown()

    # One iteration

    def step(self) -> dict[str, Any]:
        """An iteration; a checkpoint of the last one and no result where the run is to end before its update begins."""
        if self._is_to_begin:
            self._start_over()
        try:
            return self._iterate()
        except EndRequested:
            self._save_in_run()
            if self._trial_run is not None:  # Tune takes a trial that returns for one that has done its work
                self.checkpoints.leave()
                self._pulse.rest()
            return {DONE: True, RESULT_DUPLICATE: True}  # Tune's word for "nothing new"

    def _iterate(self) -> dict[str, Any]:
        """An iteration with what belongs around it: evaluation when it is due, and the numbers of `result["vlarl"]`."""
        began = time.perf_counter()
        self._grow_back()
        if self.iteration == 0 and self.ledger.initial_evaluation is None and self._evaluation.is_due(0):
            self.ledger.initial_evaluation = self._evaluation.play(self.collector, after=0)
        results = self._train_on_learners_that_live()
        self.ledger.faults["node_losses"] += self._nodes.take_losses()
        done = self.iteration + 1
        evaluation = self._evaluation.play(self.collector, after=done) if self._evaluation.is_due(done) else None
        self.ledger.close_iteration(
            results,
            iteration=done,
            wall_seconds=time.perf_counter() - began,
            evaluation=evaluation,
            policy_version=self.weight_sync.version,
            manifest=self.weight_sync.manifest,
            engines=self.engine_pool.statuses() if self.engine_pool else [],
            num_processes=self._plan.num_processes * self._vla.rollout.num_runners,
            restarts={name: count - self._earlier_restarts[name] for name, count in self._restarts().items()},
        )
        if self._trial_run is not None:
            self._trial_run.add(iteration_row(results))
        return results

    def _restarts(self) -> Counter[str]:
        """Of parts that count them themselves, for all trials that they have worked for."""
        return Counter(
            runner_restarts=self.collector.num_restarts,
            engine_restarts=self.engine_pool.num_restarts if self.engine_pool else 0,
            reward_worker_restarts=self.reward_service.num_restarts if self.reward_service else 0,
        )

    def training_step(self) -> None:
        """Collect, deliver and update, sync."""
        with self.ledger.timed("sample"), self.metrics.log_time((names.TIMERS, names.ENV_RUNNER_SAMPLING_TIMER)):
            wanted = self.iteration, self._vla.rollout.quota, self._successes.weights()
            rollout = self.collector.collect(*wanted)
            while lost := self._deliver(rollout):
                rollout.drop(lost)
                self.collector.collect(*wanted, rollout)
            self._take_note(rollout)

        on_gpu = ", in which passes are compiled or recorded for the GPU" if self._vla.learners.gpus else ""
        self._pulse.doing = f"the first update{on_gpu}"
        with (
            self.ledger.timed("update"),
            self.ledger.learners_work(),
            self.metrics.log_time((names.TIMERS, names.LEARNER_UPDATE_TIMER)),
        ):
            steps = self.metrics.peek((names.ENV_RUNNER_RESULTS, names.NUM_ENV_STEPS_SAMPLED_LIFETIME))
            timesteps = {names.NUM_ENV_STEPS_SAMPLED_LIFETIME: steps}
            learner_results = self.learner_group.update(
                iteration=self.iteration, timesteps=timesteps, meanwhile=self.collector.meanwhile
            )
            self.metrics.aggregate(learner_results, key=names.LEARNER_RESULTS)

        with (
            self.ledger.timed("sync"),
            self.ledger.learners_work(),
            self.metrics.log_time((names.TIMERS, names.SYNCH_WORKER_WEIGHTS_TIMER)),
        ):
            self.weight_sync.push()

    def _deliver(self, rollout: Rollout) -> list[int]:
        """Have the learners fetch what was sampled; the portions that were lost with their runners."""
        with self.ledger.learners_work():
            return self.learner_group.receive(rollout.refs, rollout.num_decisions)

    def _take_note(self, rollout: Rollout) -> None:
        """What an iteration's rollout says beside its steps."""
        self.ledger.episodes = rollout.results
        for result in rollout.results:
            self._successes.add(result.task_id, result.initial_state, result.success)
        self.metrics.aggregate(rollout.metrics, key=names.ENV_RUNNER_RESULTS)
        self.ledger.staleness = rollout.staleness or {0: sum(rollout.num_decisions)}
        self.ledger.faults.update(dropped_steps=rollout.lost_steps, stale_steps=rollout.stale_steps)
        if (store := self.checkpoints.store) is not None:
            write_processes(
                store.root.parent,
                runners=rollout.pids,
                learners=self.learner_group.pids,
                engines=self.engine_pool.pids if self.engine_pool else [],
                reward_worker=self.reward_service.pid if self.reward_service else None,
                nodes=nodes_of_actors(self._run_name),
            )

    # Faults

    def _train_on_learners_that_live(self) -> dict[str, Any]:
        """RLlib's iteration; where a learner is lost, all of them start anew from the newest checkpoint and go on from
        there.

        Raises:
            LearnerGroupError: where the new ones fail too, or fail again before they get past the iteration that
                failed: then the whole trial is to be started anew.
        """
        try:
            results = super().step()
        except LearnerGroupError as error:
            failed = self.iteration
            if not self.learner_group.is_remote or failed <= self._failed_iteration:
                raise
            self._failed_iteration = failed
            logger.warning("iteration %d: %s; the learners start anew from the newest checkpoint", failed + 1, error)
            with self.ledger.timed("recovery"):
                self.learner_group.rebuild()
                self._start_over()
            self.ledger.faults.update(learner_restarts=1, repeated_iterations=failed - self.iteration)
            results = super().step()
        if self.iteration >= self._failed_iteration:
            self._failed_iteration = -1
        return results

    def _grow_back(self) -> None:
        """Where learners are missing and their places are there again, all start anew with what has been learned."""
        if self.checkpoints.store is None or not self.learner_group.can_grow:
            return
        logger.warning("nodes are back: the learners start anew, as many as are planned")
        with self.ledger.timed("recovery"):
            if not self.checkpoints.has(self.iteration):
                self._save_in_run()
            self.learner_group.rebuild()
            self._start_over()

    def restore_env_runners(self, env_runner_group: Any) -> list[int]:
        """RLlib's, without the state that it would fetch from busy learners: `attach` brings all that a runner
        needs."""
        return list(env_runner_group.probe_unhealthy_env_runners())

    def _start_over(self) -> None:
        """Begin from the newest checkpoint (`TrialCheckpoints.newest`), else from the model as it is."""
        if checkpoint := self.checkpoints.newest():
            return self.restore_from_path(checkpoint)
        if self._trial_number:  # the learners have another trial's weights, or those of its seed
            self.learner_group.call("begin_anew")
        self._is_to_begin = False
        self.metrics.reset()
        self._successes.set_state([])
        self.ledger.rates = LastRates()
        self._iteration = 0
        self.collector.begin_new_episodes()
        self.weight_sync.push()

    def get_module(self, module_id: str = DEFAULT_MODULE_ID) -> Any:
        """The policy's RLModule: with its weights where `learners.num` is 0, else one that says where they are."""
        return self.learner_group.local_module or super().get_module(module_id)

    # Evaluation

    def evaluate(self, parallel_train_future: Any = None) -> dict[str, Any]:
        """Play the greedy evaluation now, on the runners of training, whose running episodes end.

        Returns:
            `env_runners` with RLlib's names for episodes, their mean return (1 for a success) and length, and `vlarl`
            with ours.

        Raises:
            SettingsError: `evaluation.episodes` is 0.
        """
        if not self._evaluation.num_episodes:
            raise SettingsError(
                "evaluation.episodes: 0, so there is nothing to play; set how many episodes an evaluation has"
            )
        if (metrics := self._evaluation.play(self.collector, after=self.iteration)) is None:
            raise EndRequested
        return rllib_evaluation(metrics)

    def _call_back(self, name: str, **arguments: Any) -> None:
        functions = getattr(self.config, f"callbacks_{name}")
        told = {"algorithm": self, "metrics_logger": self.metrics, **arguments}
        make_callback(name, self.callbacks, functions, kwargs=told)
