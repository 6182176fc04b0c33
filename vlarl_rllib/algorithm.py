"""VLAPPO: sample from engines, update sharded learners, push the weights back; as an RLlib Algorithm under Ray Tune."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.rllib.algorithms.ppo import PPO
from ray.rllib.callbacks.utils import make_callback
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    ENV_RUNNER_SAMPLING_TIMER,
    LEARNER_RESULTS,
    LEARNER_UPDATE_TIMER,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    SYNCH_WORKER_WEIGHTS_TIMER,
    TIMERS,
)
from ray.train._internal.session import _TrainingResult
from ray.tune import PlacementGroupFactory
from ray.tune.registry import register_env
from ray.tune.result import DONE, RESULT_DUPLICATE

from vlarl_rllib.checkpoints import CheckpointStore, DamagedCheckpointError, number_of, replacing
from vlarl_rllib.config import ENVIRONMENT_NAME, VLAPPOConfig
from vlarl_rllib.coordination import Rollout, RolloutCollector, WeightSync, require_runners, told_why_runners_fail
from vlarl_rllib.curriculum import SuccessRecord
from vlarl_rllib.errors import lower_the_rates
from vlarl_rllib.learner.learner_group import LearnerError, LearnerGroupError
from vlarl_rllib.lost_output import LOST
from vlarl_rllib.models.fingerprint import model_fingerprints
from vlarl_rllib.observability.metrics import (
    FAULTS,
    LastRates,
    evaluation_metrics,
    fill_in_episode_means,
    iteration_details,
    iteration_metrics,
    plain_state,
    rllib_evaluation,
)
from vlarl_rllib.own_files import replace_file
from vlarl_rllib.pulse import EndRequested, Pulse
from vlarl_rllib.rllib_checkpoint import trial_directory, write_rllib_files
from vlarl_rllib.rollout.env_runner import REWARD_FAULTS
from vlarl_rllib.rollout.evaluation import held_out_starts
from vlarl_rllib.rollout.players import EpisodeResult
from vlarl_rllib.rollout.video import keep_videos
from vlarl_rllib.services import start_engines, start_reward_worker
from vlarl_rllib.settings import Settings, SettingsError, calculate_runtime_args

logger = logging.getLogger(__name__)


def _no_environment(context: Any) -> None:
    raise RuntimeError("the environments of vlarl_rllib live in VLAEnvRunner; RLlib does not create one")


register_env(ENVIRONMENT_NAME, _no_environment)


class VLAPPO(PPO):
    """PPO for vision-language-action models. Build it from a `VLAPPOConfig`, or give it to `ray.tune.Tuner`."""

    config: VLAPPOConfig

    @classmethod
    def get_default_config(cls) -> VLAPPOConfig:
        return VLAPPOConfig()

    @classmethod
    def default_resource_request(cls, config: Any) -> PlacementGroupFactory:
        """Bundles of the Algorithm, runners, learners, reward worker, and last the engines, which find theirs by counting from the end."""
        merged = cls.get_default_config().update_from_dict(config)
        try:
            bundles = calculate_runtime_args(merged.settings()).bundles
        except SettingsError:  # of one sample: its trial ends with that line, the others run
            bundles = ({"CPU": 1.0},)
        return PlacementGroupFactory(list(bundles), strategy=merged.placement_strategy)

    @classmethod
    def from_checkpoint(cls, path: str | Path, **kwargs: Any) -> VLAPPO:
        """Build the algorithm that a checkpoint is of, and load it. Nothing in the checkpoint is unpickled for the settings."""
        directory = CheckpointStore.resolve(Path(path))
        config = VLAPPOConfig.from_settings(Settings.from_dict(CheckpointStore.read_facts(directory)["settings"]))
        config.restore_from = str(directory)
        return config.build_algo(**kwargs)

    def __repr__(self) -> str:
        """RLlib's asks the config, which is not there yet when a mistake in it ends the constructor: Ray would hide that mistake behind its own."""
        return type(self).__name__

    # Set-up and end

    def setup(self, config: Any) -> None:
        began = time.perf_counter()
        self._vla = self.config.settings()
        self._plan = calculate_runtime_args(self._vla)
        self._pulse = Pulse(self.config.run_dir)
        self._seconds: dict[str, float] = {}
        self._faults = Counter[str]()
        self._initial_evaluation: dict[str, Any] | None = None
        self._failed_iteration: int | None = None
        self._episodes: list[EpisodeResult] = []
        self._successes = SuccessRecord(self._vla.curriculum.rule, self._vla.curriculum.temperature)
        self._rates = LastRates()
        self._origin: Path | None = None
        self._models = model_fingerprints(self._vla)
        self._store = self._make_store()
        # Engines and the judge take longest to start and need nothing from the rest, so they start first and are waited for last.
        self.reward_service = start_reward_worker(self._vla) if self._vla.rewards.process else None
        self.engine_pool = start_engines(self.config.engine_spec(), self._vla) if self._vla.engines.num else None
        self._pulse.doing = f"{self._vla.rollout.num_runners} runner(s) and {self._vla.learners.num} learner(s)"
        with told_why_runners_fail():
            super().setup(config)
        require_runners(self.env_runner_group)
        self.weight_sync = WeightSync(self.learner_group, self.engine_pool, self.config.policy_version)
        parts = self.env_runner_group, self.weight_sync, self.engine_pool, self.learner_group
        self.collector = RolloutCollector(
            *parts,
            reward_service=self.reward_service,
            restore_runners=lambda: self.restore_env_runners(self.env_runner_group),
            timeout_seconds=self._vla.rollout.timeout_seconds,
            ended=self._pulse.ended,
            filter_groups=self._vla.rollout.filter_groups,
            if_diverged=lower_the_rates({"training.lr": self._vla.training.lr, "training.value_lr": self._vla.training.value_lr}),
        )
        self._pulse.doing = f"{self._vla.engines.num} engine(s)"
        if self.engine_pool is not None:
            self.engine_pool.wait_until_ready()
        self._pulse.doing = "the reward worker"
        if self.reward_service is not None:
            self.reward_service.wait_until_ready()
        self._pulse.doing = "the first iteration"
        self._start_over()
        self._seconds["startup"] = time.perf_counter() - began

    def _make_store(self) -> CheckpointStore | None:
        """In the run's directory; in the trial's where a Tune experiment names none, and then Tune decides what is kept; else None."""
        if self.config.run_dir:
            return CheckpointStore(Path(self.config.run_dir) / "checkpoints", self._vla.run.keep_checkpoints)
        trial = trial_directory(self._storage)
        return CheckpointStore(trial / "checkpoints", keep=1, pointers=trial) if trial else None

    def cleanup(self) -> None:
        self._pulse.stop()
        if self._pulse.ended.is_set():  # RLlib's `stop` would wait for what they sample
            for runner in self.env_runner_group._worker_manager.actors().values():
                ray.kill(runner, no_restart=True)
        super().cleanup()
        for name in ("engine_pool", "reward_service"):
            if group := getattr(self, name, None):
                group.shutdown()

    # One iteration

    def step(self) -> dict[str, Any]:
        """An iteration; where the run is to end before its update has begun, a checkpoint of the last one, and no result."""
        try:
            return self._iterate()
        except EndRequested:
            self._save_in_run()
            return {DONE: True, RESULT_DUPLICATE: True}  # Tune's word for "nothing new"

    def _iterate(self) -> dict[str, Any]:
        """An iteration with what belongs around it: evaluation when it is due, and the numbers of `result["vlarl"]`."""
        began = time.perf_counter()
        if self.iteration == 0 and self._initial_evaluation is None:
            self._initial_evaluation = self._evaluate(due=True, after=0)
        results = self._train_on_learners_that_live()
        done = self.iteration + 1
        every = self._vla.evaluation.every
        evaluation = self._evaluate(due=done >= self._vla.run.iterations or (every > 0 and done % every == 0), after=done)
        seconds = dict(self._seconds)
        self._seconds = {}
        seconds["other"] = max(0.0, time.perf_counter() - began - sum(v for k, v in seconds.items() if k != "startup"))
        fill_in_episode_means(results[ENV_RUNNER_RESULTS])
        results["vlarl_details"] = iteration_details(self._episodes, self._initial_evaluation if done == 1 else None, evaluation)
        self._rates.add(results["vlarl_details"])
        results["vlarl"] = iteration_metrics(
            results,
            num_episodes=len(self._episodes),
            rates=self._rates,
            iteration=done,
            seconds=seconds,
            policy_version=self.weight_sync.version,
            manifest=self.weight_sync.manifest,
            faults=self._count_faults(results["env_runners"]),
        )
        return results

    def training_step(self) -> None:
        """Sample, update, sync."""
        with self._timed("sample", ENV_RUNNER_SAMPLING_TIMER):
            rollout: Rollout = self.collector.collect(self.iteration, self._vla.rollout.quota, self._successes.weights())
            self._episodes = rollout.results
            for result in self._episodes:
                self._successes.add(result.task_id, result.initial_state, result.success)
            self.metrics.aggregate(rollout.metrics, key=ENV_RUNNER_RESULTS)
            self._faults["dropped_steps"] += rollout.lost_steps
            self._write_processes(rollout)

        with self._timed("update", LEARNER_UPDATE_TIMER):
            steps = self.metrics.peek((ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME))
            learner_results = self.learner_group.update(iteration=self.iteration, timesteps={NUM_ENV_STEPS_SAMPLED_LIFETIME: steps})
            self.metrics.aggregate(learner_results, key=LEARNER_RESULTS)

        with self._timed("sync", SYNCH_WORKER_WEIGHTS_TIMER):
            self.weight_sync.push()

    @contextmanager
    def _timed(self, name: str, timer: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            with self.metrics.log_time((TIMERS, timer)):
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

    def _write_processes(self, rollout: Rollout) -> None:
        """Who is who, for py-spy and for tests that kill: `processes.json` in the run's directory."""
        if self._store is None:
            return
        processes = {
            "algorithm": os.getpid(),
            "runners": {str(index): pids for index, pids in rollout.pids.items()},
            "learners": self.learner_group.pids,
            "engines": self.engine_pool.pids if self.engine_pool is not None else [],
            "reward_worker": self.reward_service.pid if self.reward_service is not None else None,
        }
        file = self._store.root.with_name("processes.json")
        with LOST.counting(file.name):
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, json.dumps(processes, indent=2))

    # Faults

    def _train_on_learners_that_live(self) -> dict[str, Any]:
        """RLlib's iteration; where a learner is lost, all of them start anew from the newest checkpoint and go on from there.

        Raises:
            LearnerGroupError: where the new ones fail too, or fail again before they get past the iteration that failed: then the
                whole trial is to be started anew.
        """
        try:
            results = super().step()
        except LearnerGroupError as error:
            failed = self.iteration
            if not self.learner_group.is_remote or (self._failed_iteration is not None and failed <= self._failed_iteration):
                raise
            self._failed_iteration = failed
            began = time.perf_counter()
            logger.warning("iteration %d: %s; the learners start anew from the newest checkpoint", failed + 1, error)
            self.learner_group.rebuild()
            self._start_over()
            self._faults.update(learner_restarts=1, repeated_iterations=failed - self.iteration)
            self._seconds["recovery"] = time.perf_counter() - began
            results = super().step()
        if self._failed_iteration is not None and self.iteration >= self._failed_iteration:
            self._failed_iteration = None
        return results

    def _start_over(self) -> None:
        """Begin from what this trial saved or restored last, else the newest checkpoint that verifies, else from the model as it is."""
        if checkpoint := self._newest_checkpoint():
            return self.restore_from_path(checkpoint)
        self.metrics.reset()
        self._successes.set_state([])
        self._rates = LastRates()
        self._iteration = 0
        self.collector.begin_new_episodes()
        self.weight_sync.push()

    def _newest_checkpoint(self) -> Path | str | None:
        """A trial may go on from another's checkpoint (population based training), so its own newest is not always the one."""
        if self._origin is not None:
            try:
                return CheckpointStore.resolve(self._origin)
            except (FileNotFoundError, DamagedCheckpointError) as error:
                self._pass_over(str(error))
        return (self._store.newest(self._pass_over) if self._store else None) or self.config.restore_from

    def _pass_over(self, damage: str) -> None:
        logger.warning("%s; an older checkpoint is taken", damage)
        self._faults["damaged_checkpoints"] += 1

    def _count_faults(self, runner_results: dict[str, Any]) -> dict[str, int]:
        """Totals since the run began."""
        self._faults.update({name: int(runner_results[name]) for name in ("env_deaths", "dropped_steps", *REWARD_FAULTS)})
        restarts = {
            "runner_restarts": self.collector.num_restarts,
            "engine_restarts": self.engine_pool.num_restarts if self.engine_pool is not None else 0,
            "reward_worker_restarts": self.reward_service.num_restarts if self.reward_service is not None else 0,
        }
        self._faults["lost_output"] = LOST.count
        return {name: self.config.faults.get(name, 0) + self._faults[name] + restarts.get(name, 0) for name in FAULTS}

    # Evaluation

    def evaluate(self, parallel_train_future: Any = None) -> dict[str, Any]:
        """Play the greedy evaluation now, on the runners of training, whose running episodes end.

        Returns:
            `env_runners` with RLlib's names for episodes, their mean return (1 for a success) and length, and `vlarl` with ours.

        Raises:
            SettingsError: `evaluation.episodes` is 0.
        """
        if not self._plan.evaluation_episodes:
            raise SettingsError("evaluation.episodes: 0, so there is nothing to play; set how many episodes an evaluation has")
        if (metrics := self._evaluate(due=True, after=self.iteration)) is None:
            raise EndRequested
        return rllib_evaluation(metrics)

    def _evaluate(self, *, due: bool, after: int) -> dict[str, Any] | None:
        """The greedy evaluation behind so many iterations, where it is due."""
        if not (due and self._plan.evaluation_episodes):
            return None
        began = time.perf_counter()
        self._call_back("on_evaluate_start")
        starts = held_out_starts(self._vla, self._plan.evaluation_episodes)
        record = frozenset(starts[: self._vla.evaluation.videos]) if self.config.run_dir else frozenset()
        try:
            results = [result for played in self.collector.evaluate(starts, record=record) for result in played.results]
        except EndRequested:
            if after == 0:
                raise
            return None  # the iteration before it is whole, and counts
        if self.config.run_dir:
            keep_videos(Path(self.config.run_dir) / "videos", after, results)
        metrics = evaluation_metrics(results)
        self._seconds["evaluation"] = self._seconds.get("evaluation", 0.0) + time.perf_counter() - began
        self._call_back("on_evaluate_end", evaluation_metrics=metrics)
        return metrics

    def _call_back(self, name: str, **arguments: Any) -> None:
        functions = getattr(self.config, f"callbacks_{name}")
        make_callback(name, self.callbacks, functions, kwargs={"algorithm": self, "metrics_logger": self.metrics, **arguments})

    # Checkpoints

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Tune's checkpoint: a pointer to one in the run's directory. A failure to write is counted and the run goes on."""
        directory = Path(checkpoint_dir)
        if self._store is None:
            self.save_to_path(directory)
            return
        self._save_in_run()
        trial = trial_directory(self._storage)
        CheckpointStore.write_pointer(directory, self._origin, trial and trial / directory.name)
        write_rllib_files(directory, type(self), {"vla": self.config.vla})
        if not self._pulse.ended.is_set():  # the runners may still be at what nobody waits for
            self.collector.begin_new_episodes()

    def _save_in_run(self) -> None:
        """Write this iteration's checkpoint; at the end of a run it may be there already."""
        assert self._store is not None, "only a trial with a directory is told to end"
        saved = number_of(self._origin) if self._origin is not None and self._origin.parent == self._store.root else 0
        if self._pulse.ended.is_set() and saved >= self.iteration:
            return
        try:
            with self._store.writing(self.iteration) as partial:
                self._write_checkpoint(partial)
        except (OSError, LearnerError, LearnerGroupError) as error:
            logger.warning("no checkpoint of iteration %d: %s", self.iteration, error)
            self._faults["failed_checkpoints"] += 1
        else:
            self._origin = self._store.written

    def save(self, checkpoint_dir: str | None = None) -> Any:
        """Tune's call. Where Tune cannot copy the pointer, the checkpoint behind it is there all the same."""
        try:
            return super().save(checkpoint_dir)
        except OSError as error:
            if self._store is None or self._storage is None:
                raise
            logger.warning("Tune's pointer to the checkpoint of iteration %d: %s", self.iteration, error)
            LOST.count += 1
            return _TrainingResult(checkpoint=None, metrics=dict(self._last_result or {}))

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Tune's restart of a trial; where what it names is not there or damaged, as at the trial's own start."""
        try:
            if not CheckpointStore.points_nowhere(Path(checkpoint_dir)):
                self.restore_from_path(checkpoint_dir)
                return
        except (FileNotFoundError, DamagedCheckpointError) as error:
            self._pass_over(str(error))
        self._start_over()

    def save_to_path(self, path: str | Path | None = None, **kwargs: Any) -> str:  # type: ignore[override]
        """Write everything an exact continuation needs into `path`, a local directory; the running episodes end here.

        In this run too: a resumed one cannot have them. An earlier save there is replaced once this one is whole.

        Raises:
            SettingsError: `path` is of another file system, or holds something else.
        """
        if "://" in str(path):
            raise SettingsError(f"{path}: checkpoints are written to directories; give a local path, or one that all nodes share")
        directory = Path(path) if path else Path(tempfile.mkdtemp(prefix="vlarl-checkpoint-"))
        with replacing(directory) as partial:
            self._write_checkpoint(partial)
        self.collector.begin_new_episodes()
        return str(directory)

    def restore_from_path(self, path: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Read what `save_to_path` or `save_checkpoint` wrote, also into another number of learners, and push the weights.

        Raises:
            FileNotFoundError: where `path` holds no checkpoint.
            DamagedCheckpointError: where it is not as it was written.
        """
        directory = CheckpointStore.resolve(Path(path))
        facts = CheckpointStore.read_facts(directory)
        self.learner_group.call("load_sharded", str(directory / "learners"))
        running = CheckpointStore.read_algorithm(directory)
        self.metrics.set_state(running["metrics"])
        then, now = facts["settings"]["env"], self._vla.env
        same_tasks = (then["name"], then["suite"]) == (now.name, now.suite)
        self._successes.set_state(running["successes"] if same_tasks else [])
        self._rates = LastRates(**running["rates"]) if same_tasks else LastRates()
        self._iteration = facts["iteration"]
        self._origin = directory
        self.collector.begin_new_episodes()
        self.weight_sync.push(above=facts["policy_version"])
        self._call_back("on_checkpoint_loaded")

    def _write_checkpoint(self, directory: Path) -> None:
        (directory / "learners").mkdir()
        self.learner_group.call("save_sharded", str((directory / "learners").resolve()))
        CheckpointStore.write_facts(
            directory,
            iteration=self.iteration,
            policy_version=self.weight_sync.version,
            settings=self.config.vla,
            models=self._models,
            algorithm={"metrics": plain_state(self.metrics), "successes": self._successes.state(), "rates": asdict(self._rates)},
        )
        write_rllib_files(directory, type(self), {"vla": self.config.vla})
