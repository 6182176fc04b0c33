"""VLAPPO: sample from engines, update sharded learners, push the weights back; as an RLlib Algorithm under Ray Tune."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.rllib.algorithms.ppo import PPO
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    ENV_RUNNER_SAMPLING_TIMER,
    LEARNER_RESULTS,
    LEARNER_UPDATE_TIMER,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    SYNCH_WORKER_WEIGHTS_TIMER,
    TIMERS,
)
from ray.tune import PlacementGroupFactory
from ray.tune.registry import register_env
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from vlarl_rllib.checkpoints import CheckpointStore
from vlarl_rllib.config import ENVIRONMENT_NAME, VLAPPOConfig
from vlarl_rllib.coordination import Rollout, RolloutCollector, WeightSync
from vlarl_rllib.curriculum import Start
from vlarl_rllib.engines.pool import EnginePool
from vlarl_rllib.observability.metrics import evaluation_metrics, iteration_metrics
from vlarl_rllib.settings import calculate_runtime_args

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
        """Bundles of the Algorithm, the runners, the learners, and last the engines, which find theirs by counting from the end."""
        merged = cls.get_default_config().update_from_dict(config)
        return PlacementGroupFactory(list(calculate_runtime_args(merged.settings()).bundles), strategy=merged.placement_strategy)

    # Set-up and end

    def setup(self, config: Any) -> None:
        began = time.perf_counter()
        self._vla = self.config.settings()
        self._plan = calculate_runtime_args(self._vla)
        self._seconds: dict[str, float] = {}
        self._store = CheckpointStore(Path(self.config.run_dir) / "checkpoints", self._vla.run.keep_checkpoints) if self.config.run_dir else None
        # Engines take longest to start and need nothing from the rest, so they start first and are waited for last.
        self.engine_pool = self._start_engines() if self._vla.engines.num else None
        super().setup(config)
        self.weight_sync = WeightSync(self.learner_group, self.engine_pool)
        self.collector = RolloutCollector(
            self.env_runner_group, self.weight_sync, self.engine_pool, lambda: self.restore_env_runners(self.env_runner_group)
        )
        if self.engine_pool is not None:
            self.engine_pool.wait_until_ready()
        if self.config.restore_from:
            self.load_checkpoint(self.config.restore_from)
        else:
            self.weight_sync.push()
        self._seconds["startup"] = time.perf_counter() - began

    def _start_engines(self) -> EnginePool:
        engines = self._vla.engines
        group = ray.util.get_current_placement_group()
        options: list[dict[str, Any]] = []
        for index in range(engines.num):
            options.append({"num_cpus": engines.cpus, "num_gpus": engines.gpus})
            if group is not None:
                bundle = group.bundle_count - engines.num + index
                options[-1]["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, bundle)
        return EnginePool(self.config.engine_spec(), engines.num, actor_options=options, start_timeout_seconds=engines.start_timeout_seconds)

    def cleanup(self) -> None:
        super().cleanup()
        if (pool := getattr(self, "engine_pool", None)) is not None:
            pool.shutdown()

    # One iteration

    def step(self) -> dict[str, Any]:
        """An iteration with what belongs around it: evaluation when it is due, and the numbers of `result["vlarl"]`."""
        began = time.perf_counter()
        initial = self._evaluate(due=self.iteration == 0)
        results = super().step()
        done = self.iteration + 1
        every = self._vla.evaluation.every
        evaluation = self._evaluate(due=done >= self._vla.run.iterations or (every > 0 and done % every == 0))
        seconds = dict(self._seconds)
        self._seconds = {}
        seconds["other"] = max(0.0, time.perf_counter() - began - sum(v for k, v in seconds.items() if k != "startup"))
        results["vlarl"] = iteration_metrics(
            results,
            iteration=done,
            seconds=seconds,
            policy_version=self.weight_sync.version,
            manifest=self.weight_sync.manifest,
            engine_restarts=self.engine_pool.num_restarts if self.engine_pool is not None else 0,
            initial_evaluation=initial,
            evaluation=evaluation,
        )
        return results

    def training_step(self) -> None:
        """Sample, update, sync."""
        with self._timed("sample", ENV_RUNNER_SAMPLING_TIMER):
            rollout: Rollout = self.collector.collect(self.iteration, self._vla.rollout.steps_per_iteration)
            self.metrics.aggregate(rollout.metrics, key=ENV_RUNNER_RESULTS)

        with self._timed("update", LEARNER_UPDATE_TIMER):
            learner_results = self.learner_group.update(
                episodes_refs=rollout.refs,
                num_steps=rollout.num_steps,
                iteration=self.iteration,
                timesteps={NUM_ENV_STEPS_SAMPLED_LIFETIME: self.metrics.peek((ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME))},
            )
            self.metrics.aggregate(learner_results, key=LEARNER_RESULTS)

        with self._timed("sync", SYNCH_WORKER_WEIGHTS_TIMER):
            self.weight_sync.push()

    @contextmanager
    def _timed(self, name: str, timer: str) -> Iterator[None]:
        began = time.perf_counter()
        with self.metrics.log_time((TIMERS, timer)):
            yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

    # Evaluation

    def _evaluate(self, *, due: bool) -> dict[str, Any] | None:
        if not due or not self._plan.evaluation_episodes:
            return None
        began = time.perf_counter()
        metrics = evaluation_metrics(self.collector.evaluate(self.evaluation_starts()))
        self._seconds["evaluation"] = self._seconds.get("evaluation", 0.0) + time.perf_counter() - began
        return metrics

    def evaluation_starts(self) -> list[Start]:
        """The held-out starts of an evaluation: the same every time, the tasks in turn."""
        from vlarl_rllib.envs.registry import EnvSpec, training_and_held_out_states

        env = self._vla.env
        spec = EnvSpec(name=env.name, suite=env.suite)
        held_out = {task: training_and_held_out_states(spec, task)[1] for task in self._vla.task_ids}
        rounds = range(max(map(len, held_out.values())))
        starts = [Start(task, held_out[task][i], seed=i) for i in rounds for task in held_out if i < len(held_out[task])]
        return starts[: self._plan.evaluation_episodes]

    # Checkpoints

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write everything an exact continuation needs; visible under its final name only when complete."""
        if self._store is None:
            self._write_checkpoint(Path(checkpoint_dir))
        else:
            with self._store.writing(self.iteration) as directory:
                self._write_checkpoint(directory)
            self._store.point_to(self.iteration, Path(checkpoint_dir))
        # The running episodes end here, in this run too: a resumed one cannot have them.
        self.env_runner_group.foreach_env_runner("begin_new_episodes", local_env_runner=False)

    def _write_checkpoint(self, directory: Path) -> None:
        super().save_checkpoint(str(directory / "algorithm"))
        (directory / "learners").mkdir(parents=True, exist_ok=True)
        self.learner_group.call("save_sharded", str(directory / "learners"))
        CheckpointStore.write_facts(directory, iteration=self.iteration, policy_version=self.weight_sync.version, settings=self.config.vla)

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Read what `save_checkpoint` wrote, or what it points to, also into another number of learners."""
        directory = CheckpointStore.resolve(Path(checkpoint_dir))
        super().load_checkpoint(str(directory / "algorithm"))
        self.learner_group.call("load_sharded", str(directory / "learners"))
        self.weight_sync.version = max(self.weight_sync.version, CheckpointStore.read_facts(directory)["policy_version"])
        self.weight_sync.push()
