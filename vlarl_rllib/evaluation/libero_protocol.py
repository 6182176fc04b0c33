"""What is asked of an evaluation: LIBERO's protocol, and the few things that may be varied.

Protocol (openvla/openvla, `experiments/robot/libero/run_libero_eval.py`): each task of a suite from each of its 50
published initial states, trial i = state i; ten settle steps, then at most the suite's horizon of greedy steps; a trial
counts as success once LIBERO's goal check holds. One difference: there the poses of fixtures come from one global
random stream that runs through all episodes; here they are drawn from a seed of each episode, `derive_seed(seed,
trial)`, so that an episode depends on nothing that was played before.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vlarl_rllib.envs import registry
from vlarl_rllib.process.surroundings import check_ray, cluster_address
from vlarl_rllib.runs.export import TrainingCheckpoint, find_training_checkpoint, resolve_policy
from vlarl_rllib.runs.preflight import check_environment, check_model, count_gpus
from vlarl_rllib.settings import Settings, SettingsError
from vlarl_rllib.settings.published import absolute_unless_name, is_model_name
from vlarl_rllib.types import EnvSpec, Start, derive_seed

ENGINES = ("vllm", "torch")
DTYPES = ("float32", "bfloat16")
DEFAULT_SUITE = "libero_spatial"
"""Stands in where the environment has no suites."""
RUNNER_TIMEOUT_SECONDS = 900.0
"""For one call of a runner: longer than an environment (600 s) and a request (120 s) may take after one another."""


@dataclass(frozen=True)
class EvaluationRequest:
    """One evaluation. Defaults are LIBERO's protocol; `check` finds mistakes."""

    checkpoint: str
    """Model directory, hub id, preset, run directory (its newest checkpoint) or training checkpoint."""
    suite: str | None = None
    """LIBERO suite; None for the environments without suites."""
    env: str = "libero"
    tasks: tuple[int, ...] | None = None
    """Task indices; None = all of the suite."""
    trials: int = 50
    """Initial states of each task, from the first."""
    seed: int = 7
    """Of the fixtures' poses; upstream's default."""
    max_steps: int | None = None
    """Policy steps after which an episode is cut off; None = the suite's horizon."""
    family: str | None = None
    """Kind of policy, as `model.family`; None = the run's that trained it, else what its config.json says."""
    unnorm_key: str | None = None
    """Action statistics of the checkpoint; None = those that the run trained with, else the suite's or environment's.
    """
    center_crop: bool = True
    fast_render: bool = False
    engine: str = "vllm"
    """vllm, or torch: in each runner's process."""
    dtype: str | None = None
    """float32 or bfloat16; None = bfloat16 on a GPU, float32 on a CPU."""
    gpus: float = 0.0
    """GPUs of each engine; 0 = CPU."""
    num_engines: int = 1
    num_runners: int = 1
    num_envs: int | None = None
    """Slots of each runner; None = cores."""
    num_processes: int | None = None
    """Environment subprocesses of each runner, each with one MuJoCo model; None = cores, at most `num_envs`."""
    videos: int = 1
    """Films of each task: of its first episodes."""

    @cached_property
    def env_spec(self) -> EnvSpec:
        """For the registry's questions."""
        return EnvSpec(name=self.env, suite=self.suite or DEFAULT_SUITE, max_steps=self.max_steps)

    @property
    def task_ids(self) -> list[int]:
        return (
            list(range(registry.num_tasks(self.env_spec.suite, name=self.env)))
            if self.tasks is None
            else list(self.tasks)
        )

    @property
    def statistics(self) -> str:
        """`unnorm_key`, or what it is by default: that of the run which trained the policy, else the environment's."""
        if self.unnorm_key:
            return self.unnorm_key
        trained = self._trained
        return trained.settings.unnorm_key if trained else registry.default_statistics(self.env, self.env_spec.suite)

    @property
    def compute_type(self) -> str:
        """`dtype`, or what it is by default."""
        return self.dtype or ("bfloat16" if self.gpus else "float32")

    @cached_property
    def policy_path(self) -> str:
        """What the engines load. A run or training checkpoint is exported here, once, with torch."""
        return resolve_policy(self.checkpoint, self.family) if self._trained else absolute_unless_name(self.checkpoint)

    @property
    def _trained(self) -> TrainingCheckpoint | None:
        return _find_training_checkpoint(self.checkpoint, self.family)

    @property
    def _family(self) -> str | None:
        """`family`, or what it is by default."""
        return self.family or (self._trained.settings.model.family_reference if self._trained else None)

    def starts(self) -> list[Start]:
        """Every episode of the evaluation, once."""
        return [
            Start(task, trial, derive_seed(self.seed, trial)) for task in self.task_ids for trial in range(self.trials)
        ]

    def held_out(self) -> dict[int, frozenset[int]]:
        """By task, the initial states that no training of this package uses."""
        return {
            task: frozenset(registry.training_and_held_out_states(self.env_spec, task)[1]) for task in self.task_ids
        }

    def instructions(self) -> dict[int, str]:
        all_of_suite = registry.task_instructions(self.env_spec.suite, name=self.env)
        return {task: all_of_suite[task] for task in self.task_ids}

    def question(self) -> dict[str, Any]:
        """All that the outcome depends on, as JSON: two evaluations with equal questions have the same episodes."""
        directory = Path(self.policy_path).expanduser()
        local = not is_model_name(self.policy_path) and directory.is_dir()
        return {
            "checkpoint": str(directory.resolve()) if local else self.policy_path,
            "checkpoint_files": _fingerprint(directory) if local else None,
            "env": self.env,
            "suite": self.suite,
            "tasks": self.task_ids,
            "trials": self.trials,
            "seed": self.seed,
            "max_steps": self.max_steps or registry.horizon(self.env_spec.suite, name=self.env),
            "family": self._family,
            "unnorm_key": self.statistics,
            "center_crop": self.center_crop,
            "fast_render": self.fast_render,
            "engine": self.engine,
            "dtype": self.compute_type,
        }

    def deviations(self) -> list[str]:
        """In what this is not the published protocol; empty where it is."""
        found = []
        if self.env != "libero":
            found.append(f"environment {self.env}")
        if len(self.task_ids) < registry.num_tasks(self.env_spec.suite, name=self.env):
            found.append(f"{len(self.task_ids)} task(s) of the suite")
        if self.trials < registry.num_initial_states(self.env_spec.suite, self.task_ids[0], name=self.env):
            found.append(f"{self.trials} trial(s) of each task")
        if (horizon := registry.horizon(self.env_spec.suite, name=self.env)) != (self.max_steps or horizon):
            found.append(f"episodes cut off after {self.max_steps} steps instead of {horizon}")
        if self.fast_render:
            found.append("fast rendering, whose pictures no checkpoint was trained on")
        if not self.center_crop:
            found.append("no centre crop")
        return found

    def settings(self, starts: Sequence[Start]) -> Settings:
        """Settings of engines and runners for what is left to play."""
        import psutil

        cores = psutil.cpu_count() or 1
        slots = self.num_envs or min(self.num_processes or cores, -(-len(starts) // self.num_runners))
        processes = min(slots, self.num_processes or cores)
        tasks = list(dict.fromkeys(start.task_id for start in starts))
        return Settings.from_dict(
            {
                "model": {
                    "path": self.policy_path,
                    "family": self._family,
                    "unnorm_key": self.statistics,
                    "center_crop": self.center_crop,
                    "dtype": self.compute_type,
                },
                "env": {
                    "name": self.env,
                    "suite": self.env_spec.suite,
                    "tasks": tasks[: self.num_runners * processes],  # which slots begin with; the others follow
                    "num_envs": slots,
                    "num_processes": processes,
                    "models_per_process": 1,
                    "max_steps": self.max_steps,
                    "fast_render": self.fast_render,
                },
                "rollout": {
                    "num_runners": self.num_runners,
                    "steps_per_iteration": 1,
                    "timeout_seconds": RUNNER_TIMEOUT_SECONDS,
                },
                "engines": {
                    "num": self.num_engines if self.engine == "vllm" else 0,
                    "gpus": self.gpus,
                    "dtype": self.compute_type,
                    "max_batch": max(1, min(64, slots)),
                },
                "learners": {"num": 0},
                "training": {"minibatch_size": 1},
                "evaluation": {"episodes": 0},
                "run": {"seed": self.seed, "dashboard": False},
            }
        )

    def check(self) -> None:
        """Raise `SettingsError` for the first mistake. Nothing is started, and nothing heavy imported."""
        self._check_choices()
        self._check_starts()
        self._check_sizes()
        if cluster_address() is None:  # else `check_nodes` asks the nodes that draw
            check_environment(self.env)
        trained = self._trained
        model = trained.settings.model.path if trained else self.checkpoint  # which its export has the statistics of
        check_model(model, self.statistics, self._family, path_name="CHECKPOINT", key_name="--unnorm-key")
        check_ray()

    def _check_choices(self) -> None:
        _check_choice("--env", self.env, registry.environments())
        try:
            registry.env_class(self.env)
        except ValueError as error:
            raise SettingsError(f"--env: {error}") from error
        _check_choice("--engine", self.engine, ENGINES)
        if self.dtype is not None:
            _check_choice("--dtype", self.dtype, DTYPES)
        if self.env != "libero":
            if self.suite is not None:
                raise SettingsError(f"--suite: {self.suite!r} means nothing to --env {self.env}; leave it out")
            return
        if self.suite is None:
            raise SettingsError(f"--suite: missing; choose one of {', '.join(registry.suites(self.env))}")
        _check_choice("--suite", self.suite, registry.suites(self.env))

    def _check_starts(self) -> None:
        where = self.suite or self.env
        available = registry.num_tasks(self.env_spec.suite, name=self.env)
        if not self.task_ids:
            raise SettingsError("--tasks: empty; name at least one task, or leave it out for all of them")
        for task in self.task_ids:
            if not 0 <= task < available:
                raise SettingsError(f"--tasks: {task} is not a task of {where}, whose tasks are 0 to {available - 1}")
        if len(set(self.task_ids)) != len(self.task_ids):
            raise SettingsError(f"--tasks: {','.join(map(str, self.task_ids))} names a task twice; name each once")
        states = min(registry.num_initial_states(self.env_spec.suite, task, name=self.env) for task in self.task_ids)
        if not 1 <= self.trials <= states:
            raise SettingsError(
                f"--trials: {self.trials} must be between 1 and {states}, the initial states of each task of {where}"
            )

    def _check_sizes(self) -> None:
        if self.seed < 0:
            raise SettingsError(f"--seed: {self.seed} must be at least 0")
        if self.videos < 0:
            raise SettingsError(f"--videos: {self.videos} must be at least 0")
        for name in ("max_steps", "num_engines", "num_runners", "num_envs", "num_processes"):
            value = vars(self)[name]
            if value is not None and value < 1:
                raise SettingsError(f"--{name.replace('_', '-')}: {value} must be at least 1")
        if self.num_envs and self.num_processes and self.num_processes > self.num_envs:
            raise SettingsError(
                f"--num-processes: {self.num_processes} is more than --num-envs {self.num_envs}; use at most one "
                "process per slot"
            )
        if self.engine == "torch" and (self.gpus or self.num_engines != 1):
            raise SettingsError(
                "--engine: torch samples on the CPU inside each runner; leave out --gpus and --num-engines, or use vllm"
            )
        if self.gpus < 0 or self.gpus > 8:
            raise SettingsError(f"--gpus: {self.gpus:g} must be between 0 and 8 for each engine")
        total = self.num_engines * self.gpus
        if total and not cluster_address() and not count_gpus():
            raise SettingsError(
                f"--gpus: {total:g} GPU(s) are needed but this machine shows none; use --gpus 0 to run on the CPU"
            )


def _check_choice(option: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise SettingsError(f"{option}: {value!r} does not exist, choose one of {', '.join(choices)}{hint}")


def _find_training_checkpoint(checkpoint: str, family: str | None) -> TrainingCheckpoint | None:
    """Of a run or of itself; None for a model. Raises `SettingsError`."""
    if is_model_name(checkpoint):
        return None
    try:
        return find_training_checkpoint(Path(absolute_unless_name(checkpoint)), family)
    except (OSError, ValueError) as error:
        raise SettingsError(f"CHECKPOINT: {error}") from None


def _fingerprint(directory: Path) -> str:
    """Changes when a file of the checkpoint is written anew: names, sizes and times, since reading 15 GB would take a
    minute."""
    files = sorted(file for pattern in ("*.safetensors", "*.json") for file in directory.glob(pattern))
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
