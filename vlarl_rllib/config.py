"""VLAPPOConfig: the settings as RLlib's AlgorithmConfig.

All of our settings live in ONE attribute, `vla`, a plain nested dict as in the YAML file. That is what Tune samples
(dotted keys of `vla`), what is pickled to actors, and what every actor validates again. RLlib's own fields are derived
from it; what its setters or Tune write into them afterwards reaches `vla` when the config is validated, or is refused
(`rllib_fields`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlarl_rllib.rllib_compat import is_placeholder, quiet_about_the_new_api_stack, without_tensorflow

with without_tensorflow():
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.core.rl_module.rl_module import RLModuleSpec
    from ray.rllib.utils import force_list

from vlarl_rllib.engines.protocol import EngineSpec
from vlarl_rllib.models.family import family_name
from vlarl_rllib.models.presets import presets, resolve_model
from vlarl_rllib.process.storage import place_of
from vlarl_rllib.runs.nodes import runner_cores
from vlarl_rllib.settings import Role, Settings, SettingsError, calculate_runtime_args, rllib_fields
from vlarl_rllib.settings.overrides import with_keys
from vlarl_rllib.settings.placement import MEMORY, RolePlacement

ENVIRONMENT_NAME = "vlarl_rllib"
"""What Tune calls the environment in a trial's name. RLlib makes none: `VLAEnvRunner` does, from the settings."""
NO_EVALUATION = 2**31 - 1
"""RLlib refuses a duration of 0 episodes. This is none that anybody asks for, so that 1 is one that somebody did."""


def resolved(settings: Settings) -> Settings:
    """The settings with what is to be the same for all actors filled in: hub ids of published models, how many cores
    there are for environments.

    A model preset keeps its name: each node writes it for itself (`models.presets.models_here`).

    Raises:
        ValueError: a model that is none.
    """
    cores = runner_cores(calculate_runtime_args(settings))
    paths = {"path": settings.model.path, "critic_path": settings.model.critic_path}
    return settings.replaced(
        model={key: path if path in presets() else resolve_model(path) for key, path in paths.items() if path},
        env={"num_processes": calculate_runtime_args(settings, cores=cores).num_processes},
    )


def _custom(place: RolePlacement) -> dict[str, float]:
    """What RLlib calls custom resources, which memory is not."""
    return {kind: amount for kind, amount in place.resources.items() if kind != MEMORY}


class VLAPPOConfig(PPOConfig):
    """Configuration of `VLAPPO`.

    >>> config = VLAPPOConfig.from_yaml("configs/libero_smoke_cpu.yaml", overrides=["training.lr=1e-5"])
    >>> algorithm = config.build_algo()
    """

    def __init__(self, algo_class: Any = None) -> None:
        from vlarl_rllib.algorithm import VLAPPO
        from vlarl_rllib.rollout.env_runner import VLAEnvRunner

        super().__init__(algo_class=algo_class or VLAPPO)
        self.vla: dict[str, Any]
        """The settings, nested as in the YAML file."""
        self.derived_fields: dict[str, Any]
        """RLlib's fields as they were derived from `derived_from`.

        One that is different now was written by RLlib's setters, or by Tune.
        """
        self.derived_from: dict[str, Any]
        """`vla` when RLlib's fields were last derived from it."""
        self.sampled: dict[str, Any] = {}
        """What Tune samples: values over `vla` by dotted key, or under one name a mapping of several such keys."""
        self.run_dir: str | None = None
        """Where checkpoints go; None = into the directory that Tune names."""
        self.run_name: str | None = None
        """What the run is called on Ray's dashboard and in metrics; None = as `run_dir`, else as Tune's trial."""
        self.restore_from: str | None = None
        """Checkpoint to begin with; None = the model as `model.path` has it."""
        self.faults: dict[str, int] = {}
        """Faults of earlier starts of the same run, by kind (`observability.metrics.FAULTS`)."""
        self.policy_version = 0
        """Newest version that earlier starts of the same run have used, also after the checkpoint that this one begins
        with."""
        self.framework("torch")
        self.fault_tolerance(
            restart_failed_env_runners=True,
            delay_between_env_runner_restarts_s=0.0,  # sleeps inside the dying runner
            restart_failed_sub_environments=False,
        )
        self.env_runners(env_runner_cls=VLAEnvRunner)
        self.reporting(min_time_s_per_iteration=0)
        self.debugging(log_level="WARN")
        self.resources(num_cpus_for_main_process=1)
        self._derive(Settings())

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> VLAPPOConfig:
        """Read and validate a YAML file. Raises `SettingsError`."""
        return cls.from_settings(Settings.from_yaml(path, overrides))

    @classmethod
    def from_settings(cls, settings: Settings, run_dir: str | Path | None = None) -> VLAPPOConfig:
        """Take validated settings."""
        config = cls()
        config.run_dir = str(run_dir) if run_dir else None
        config._derive(resolved(settings))
        return config

    def update_from_dict(self, config_dict: Mapping[str, Any]) -> VLAPPOConfig:
        """RLlib's, for what Tune samples.

        Raises:
            SettingsError: `Tuner.restore` was not told the space again, which it cannot write down.
        """
        for name, value in config_dict.items():
            if is_placeholder(value):
                raise SettingsError(
                    f"Tuner.restore: {name} is not in the files of the experiment, since it is no plain value; give "
                    "the space again: Tuner.restore(path, VLAPPO, param_space=...)"
                )
        return super().update_from_dict(config_dict)

    def named(self, otherwise: str) -> VLAPPOConfig:
        """A frozen copy with `run_name`, which is the run directory's name where there is one."""
        named = self.copy(copy_frozen=False)
        named.run_name = self.run_name or (place_of(self.run_dir).name if self.run_dir else otherwise)
        named.freeze()
        return named

    def of_trial(self, directory: Path, last: Mapping[str, Any] | None) -> VLAPPOConfig:
        """A frozen copy for a trial of a Tune experiment in this directory.

        Args:
            last: newest row of earlier starts of the trial.
        """
        config = self.copy(copy_frozen=False)
        config.run_dir = str(directory)
        config.run_name = config.run_name or f"{directory.parent.name}/{directory.name}"
        if last is not None:
            config.faults, config.policy_version = dict(last["faults"]), last["policy_version"]
        config.freeze()
        return config

    def settings(self) -> Settings:
        """The typed settings, with what RLlib's setters or Tune have written into RLlib's fields.

        Raises:
            SettingsError: that is impossible, or contradicts itself.
        """
        if self._is_frozen:  # `validate` has put into `vla` what is sampled
            return Settings.from_dict(self.vla)
        settings = Settings.from_dict(with_keys(self.vla, self.sampled))
        return rllib_fields.honour(settings, self._written_fields(), Settings.from_dict(self.derived_from))

    def _written_fields(self) -> dict[str, Any]:
        return rllib_fields.written(rllib_fields.fields_of(self), self.derived_fields)

    def engine_spec(self) -> EngineSpec:
        """How to start an engine."""
        settings = self.settings()
        engines = settings.engines
        return EngineSpec(
            model_path=settings.model.path,
            family=family_name(resolve_model(settings.model.path), settings.model.family_reference),
            dtype=engines.dtype,
            gpus=engines.gpus,
            max_batch=calculate_runtime_args(settings).engine_batch,
            enforce_eager=engines.enforce_eager,
            mix_calls=not settings.lockstep,
            seed=settings.run.seed,
            values=settings.training.values == "engine",
            quantization=engines.quantization,
            run=self.run_name or "vlarl",
            suite=settings.env.label,
            transport=settings.weights.transport,
        )

    def validate(self) -> None:
        written_by_user = (
            not self._is_frozen and not self.in_evaluation
        )  # RLlib derives a config for evaluations, which is not used
        if written_by_user:
            settings = self.settings()
            rllib_fields.refuse(self._written_fields(), self.derived_fields)
            rllib_fields.refuse_callbacks(force_list(self.callbacks_class))
            self._derive(resolved(settings))
        with quiet_about_the_new_api_stack():
            super().validate()
        if written_by_user:
            self.derived_fields = rllib_fields.fields_of(self)  # RLlib fills in some of its own

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        from vlarl_rllib.policy.rl_module import VLARLModule

        return RLModuleSpec(module_class=VLARLModule)

    def get_default_learner_class(self) -> type:
        from vlarl_rllib.learner.learner import VLALearner

        return VLALearner

    def build_learner_group(
        self, *, env: Any = None, spaces: Any = None, rl_module_spec: Any = None, placement_group: Any = None
    ) -> Any:
        from vlarl_rllib.learner.learner_group import VLALearnerGroup

        settings = self.settings()
        plan = calculate_runtime_args(settings)
        return VLALearnerGroup(
            config=self.copy(),
            module_spec=rl_module_spec or self.get_multi_rl_module_spec(env=env, spaces=spaces),
            bundles=[plan.bundle_of(Role.LEARNER, rank) for rank in range(settings.learners.num)],
        )

    def _derive(self, settings: Settings) -> None:
        """Take these settings, and set RLlib's fields from them."""
        plan = calculate_runtime_args(settings)
        training, learners, placement = settings.training, settings.learners, settings.placement
        self.vla = settings.to_dict()
        self.env_config: dict[str, Any] = {}
        self.environment(env=ENVIRONMENT_NAME, normalize_actions=False, clip_actions=False)
        self.env_runners(
            num_env_runners=settings.rollout.num_runners,
            num_envs_per_env_runner=settings.env.num_envs,
            num_cpus_per_env_runner=settings.rollout.cpus_per_runner,
            custom_resources_per_env_runner=_custom(placement.runners),
            rollout_fragment_length=settings.rollout.quota,
            batch_mode="truncate_episodes",
            sample_timeout_s=None,  # RLlib drops rollouts that take longer
            validate_env_runners_after_construction=False,  # learners start meanwhile; see `require_runners`
            merge_env_runner_states=False,  # no connector has any, and runners may be at work
            broadcast_env_runner_states=False,
            add_default_connectors_to_env_to_module_pipeline=False,
            add_default_connectors_to_module_to_env_pipeline=False,
        )
        self.learners(
            num_learners=learners.num,
            num_cpus_per_learner=learners.cpus,
            num_gpus_per_learner=learners.gpus,
            custom_resources_per_learner=_custom(placement.learners),
            add_default_connectors_to_learner_pipeline=False,
        )
        self.resources(placement_strategy=placement.strategy)
        self.training(
            train_batch_size=None,  # the next but two says it
            lr=training.lr,
            gamma=training.gamma,
            lambda_=training.gae_lambda,
            train_batch_size_per_learner=-(-plan.num_slots * settings.rollout.quota // max(1, learners.num)),
            minibatch_size=None,  # RLlib's is a learner's and must not exceed its batch; ours is global
            num_epochs=training.num_epochs,
            grad_clip=training.grad_clip,
            clip_param=training.clip_high if training.clip_high == training.clip_low else None,
            vf_clip_param=training.vf_clip,
            vf_loss_coeff=training.vf_coeff,
            entropy_coeff=training.entropy_coeff,
            use_kl_loss=False,
        )
        model = settings.model.model_dump(mode="json")
        self.rl_module(
            model_config={"model": model, "seed": settings.run.seed, "device": "cuda" if learners.gpus else "cpu"}
        )
        self.evaluation(evaluation_interval=None, evaluation_duration=settings.evaluation.episodes or NO_EVALUATION)
        self.debugging(seed=settings.run.seed)
        # A dict of its own: Tune looks for placeholders in both, and `vla` is written in place.
        self.derived_fields, self.derived_from = rllib_fields.fields_of(self), settings.to_dict()
