"""VLAPPOConfig: the settings as RLlib's AlgorithmConfig.

All of our settings live in ONE attribute, `vla`, a plain nested dict as in the YAML file. That is what Tune samples (dotted keys of
`vla`), what is pickled to actors, and what every actor validates again. `_apply` maps it to RLlib's own fields; nothing else does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.util.debug import log_once

from vlarl_rllib.engines.protocol import EngineSpec
from vlarl_rllib.settings import Settings, calculate_runtime_args

ENVIRONMENT_NAME = "vlarl_rllib"
"""Name under which RLlib knows the environment; the runners build the real one from the settings."""


class VLAPPOConfig(PPOConfig):
    """Configuration of `VLAPPO`.

    >>> config = VLAPPOConfig.from_yaml("configs/libero_smoke_cpu.yaml", overrides=["training.lr=1e-5"])
    >>> algorithm = config.build_algo()
    """

    def __init__(self, algo_class: Any = None) -> None:
        from vlarl_rllib.algorithm import VLAPPO

        super().__init__(algo_class=algo_class or VLAPPO)
        self.vla: dict[str, Any] = Settings().to_dict()
        self.run_dir: str | None = None
        """Where checkpoints go; None = into the directory that Tune names."""
        self.restore_from: str | None = None
        """Checkpoint to begin with; None = the model as `model.path` has it."""
        self.faults: dict[str, int] = {}
        """Faults of earlier starts of the same run, by kind (`observability.metrics.FAULTS`)."""
        self.policy_version = 0
        """Newest version that earlier starts of the same run have used, also after the checkpoint that this one begins with."""
        self._apply(Settings())

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> VLAPPOConfig:
        """Read and validate a YAML file. Raises `SettingsError`."""
        return cls.from_settings(Settings.from_yaml(path, overrides))

    @classmethod
    def from_settings(cls, settings: Settings, run_dir: str | Path | None = None) -> VLAPPOConfig:
        """Take validated settings. A model preset is written to disk here, so that every actor finds it."""
        from vlarl_rllib.models.presets import resolve_model

        config = cls()
        config.vla = settings.to_dict()  # whose paths are absolute
        for key in ("path", "critic_path"):
            if config.vla["model"][key]:
                config.vla["model"][key] = resolve_model(config.vla["model"][key])
        # Once for all, since other nodes may have other numbers of cores.
        config.vla["env"]["num_processes"] = calculate_runtime_args(settings).num_processes
        config.run_dir = str(run_dir) if run_dir else None
        config._apply(Settings.from_dict(config.vla))
        return config

    def settings(self) -> Settings:
        """The typed settings. Raises `SettingsError` where Tune sampled something impossible."""
        return Settings.from_dict(self.vla)

    def engine_spec(self) -> EngineSpec:
        """How to start an engine."""
        settings = self.settings()
        engines = settings.engines
        return EngineSpec(
            model_path=settings.model.path,
            dtype=engines.dtype,
            gpus=engines.gpus,
            max_batch=engines.max_batch,
            enforce_eager=engines.enforce_eager,
            mix_calls=not settings.lockstep,
            seed=settings.run.seed,
        )

    def validate(self) -> None:
        if not self._is_frozen:
            self._apply(self.settings())
        log_once(f"{self.algo_class.__name__}_on_new_api_stack")  # or RLlib explains its new API stack to users, who did not choose it
        super().validate()

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        from vlarl_rllib.policy.rl_module import OpenVLARLModule

        return RLModuleSpec(module_class=OpenVLARLModule)

    def get_default_learner_class(self) -> type:
        from vlarl_rllib.learner.learner import VLALearner

        return VLALearner

    def build_learner_group(self, *, env: Any = None, spaces: Any = None, rl_module_spec: Any = None, placement_group: Any = None) -> Any:
        from vlarl_rllib.learner.learner_group import VLALearnerGroup

        settings = self.settings()
        first = 1 + settings.rollout.num_runners
        return VLALearnerGroup(
            config=self.copy(),
            module_spec=rl_module_spec or self.get_multi_rl_module_spec(env=env, spaces=spaces),
            bundles=range(first, first + settings.learners.num),
        )

    def _apply(self, settings: Settings) -> None:
        """Set RLlib's fields from ours."""
        from vlarl_rllib.rollout.env_runner import VLAEnvRunner

        plan = calculate_runtime_args(settings)
        training, learners = settings.training, settings.learners
        self.framework("torch")
        self.environment(env=ENVIRONMENT_NAME, normalize_actions=False, clip_actions=False)
        self.env_runners(
            env_runner_cls=VLAEnvRunner,
            num_env_runners=settings.rollout.num_runners,
            num_envs_per_env_runner=settings.env.num_envs,
            num_cpus_per_env_runner=settings.rollout.cpus_per_runner,
            rollout_fragment_length=settings.rollout.quota,
            batch_mode="truncate_episodes",
            sample_timeout_s=None,  # RLlib drops rollouts that take longer
            add_default_connectors_to_env_to_module_pipeline=False,
            add_default_connectors_to_module_to_env_pipeline=False,
        )
        self.learners(
            num_learners=learners.num,
            num_cpus_per_learner=learners.cpus,
            num_gpus_per_learner=learners.gpus,
            add_default_connectors_to_learner_pipeline=False,
        )
        self.training(
            lr=training.lr,
            gamma=training.gamma,
            lambda_=training.gae_lambda,
            train_batch_size_per_learner=-(-plan.num_slots * settings.rollout.quota // max(1, learners.num)),
            minibatch_size=None,
            num_epochs=training.num_epochs,
            grad_clip=training.grad_clip,
            use_kl_loss=False,
        )
        model = settings.model.model_dump(mode="json")
        self.rl_module(model_config={"model": model, "seed": settings.run.seed, "device": "cuda" if learners.gpus else "cpu"})
        self.fault_tolerance(
            restart_failed_env_runners=True,
            delay_between_env_runner_restarts_s=0.0,  # sleeps inside the dying runner
            restart_failed_sub_environments=False,
        )
        self.evaluation(evaluation_interval=None)
        self.reporting(min_time_s_per_iteration=0)
        self.debugging(seed=settings.run.seed, log_level="WARN")
        self.resources(num_cpus_for_main_process=1)
        self.placement_strategy = "PACK"
