"""RLlib's own configuration fields, held against the settings: each reaches the run through a setting, or is refused by
name.

`AlgorithmConfig` has some 250 fields, which its setters, attributes and Tune's search space write. A run is described
by its settings alone; so `VLAPPOConfig.validate` asks here what was written since the fields were last derived from
them. docs/rllib.md has the table.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

from ray.rllib.callbacks.callbacks import RLlibCallback

from vlarl_rllib.settings import Settings, SettingsError
from vlarl_rllib.settings.overrides import with_keys

Changes = dict[str, Any]
"""Values of settings by dotted key."""
Lookup = Callable[[str], Any]
"""From a dotted key to its value, other fields counted in."""


def _same(key: str) -> Callable[[Any, Lookup], Changes]:
    return lambda value, lookup: {key: value}


def _batch(field: str, value: Any, learners: int, lookup: Lookup) -> Changes:
    """Steps of an iteration over all slots, as steps of each."""
    slots = lookup("rollout.num_runners") * lookup("env.num_envs")
    _refuse_steps_of_episodes(field, lookup)
    if slots < 1:  # which the settings refuse in their own words
        return {}
    if not isinstance(value, int) or value < 1 or value * learners % slots:
        raise SettingsError(
            f"{field}: {value!r} times {learners} does not divide over {slots} slots (rollout.num_runners x "
            "env.num_envs); "
            "use a multiple, or set rollout.steps_per_iteration"
        )
    return {"rollout.steps_per_iteration": value * learners // slots}


def _fragment(value: Any, lookup: Lookup) -> Changes:
    _refuse_steps_of_episodes("rollout_fragment_length", lookup)
    return {"rollout.steps_per_iteration": value}


def _refuse_steps_of_episodes(field: str, lookup: Lookup) -> None:
    if lookup("rollout.episodes_per_iteration"):
        raise SettingsError(
            f"{field}: rollout.episodes_per_iteration counts whole episodes; set that, or set it to null first"
        )


def _whole_batch(value: Any, lookup: Lookup) -> Changes:
    return _batch("train_batch_size", value, 1, lookup)


def _batch_of_a_learner(value: Any, lookup: Lookup) -> Changes:
    return _batch("train_batch_size_per_learner", value, max(1, lookup("learners.num")), lookup)


def _env_config(value: Any, lookup: Lookup) -> Changes:
    return {f"env.{key}": part for key, part in dict(value).items()}


HONOURED: dict[str, Callable[[Any, Lookup], Changes]] = {
    "lr": _same("training.lr"),
    "gamma": _same("training.gamma"),
    "lambda_": _same("training.gae_lambda"),
    "grad_clip": _same("training.grad_clip"),
    "num_epochs": _same("training.num_epochs"),
    "minibatch_size": _same("training.minibatch_size"),
    "clip_param": lambda value, lookup: {"training.clip_low": value, "training.clip_high": value},
    "vf_clip_param": _same("training.vf_clip"),
    "vf_loss_coeff": _same("training.vf_coeff"),
    "entropy_coeff": _same("training.entropy_coeff"),
    "num_env_runners": _same("rollout.num_runners"),
    "num_envs_per_env_runner": _same("env.num_envs"),
    "num_cpus_per_env_runner": _same("rollout.cpus_per_runner"),
    "num_learners": _same("learners.num"),
    "num_cpus_per_learner": _same("learners.cpus"),
    "num_gpus_per_learner": _same("learners.gpus"),
    "custom_resources_per_env_runner": _same("placement.runners.resources"),
    "custom_resources_per_learner": _same("placement.learners.resources"),
    "placement_strategy": _same("placement.strategy"),
    "env": _same("env.name"),
    "env_config": _env_config,
    "seed": _same("run.seed"),
    "evaluation_interval": lambda value, lookup: {"evaluation.every": value or 0},
    "evaluation_duration": _same("evaluation.episodes"),
    # Behind those that say how many slots and learners there are.
    "rollout_fragment_length": _fragment,
    "train_batch_size": _whole_batch,
    "_train_batch_size_per_learner": _batch_of_a_learner,
}
"""What a field's value sets."""

PASSED_ON = frozenset(
    (
        "callbacks_class", "callbacks_on_algorithm_init", "callbacks_on_env_runners_recreated",
        "callbacks_on_checkpoint_loaded",
        "callbacks_on_environment_created", "callbacks_on_episode_end", "callbacks_on_sample_end",
        "callbacks_on_train_result",
        "callbacks_on_evaluate_start", "callbacks_on_evaluate_end",
        "env_runner_cls", "_learner_class", "learner_config_dict", "log_level", "log_sys_usage",
        "metrics_num_episodes_for_smoothing", "stats_cls_lookup", "validate_env_runners_after_construction",
        "max_num_env_runner_restarts", "env_runner_health_probe_timeout_s", "env_runner_restore_timeout_s",
        "num_consecutive_env_runner_failures_tolerance",
    )
)  # fmt: skip
"""Fields that RLlib, or a subclass of ours, acts on by itself."""

OWN = frozenset(
    (
        "vla",
        "sampled",
        "run_dir",
        "run_name",
        "restore_from",
        "faults",
        "policy_version",
        "derived_fields",
        "derived_from",
    )
)
"""`VLAPPOConfig`'s own fields."""
INTERNAL = frozenset(
    (
        "algo_class",
        "_is_frozen",
        "exploration_config",
        "_prior_exploration_config",
        "policies",
        "_is_online",
        "class",
        "simple_optimizer",
    )
)
"""Fields that RLlib rewrites while it copies a config."""

REMEDIES = {
    "num_gpus": "set learners.gpus and engines.gpus",
    "num_gpus_per_env_runner": "leave it out: runners render on a GPU without reserving one",
    "num_cpus_for_main_process": "leave it at 1",
    "framework_str": "leave it at torch",
    "explore": "leave it out: training samples at rollout.temperature, evaluations are greedy",
    "sample_timeout_s": "set rollout.timeout_seconds",
    "batch_mode": "set rollout.episodes_per_iteration for whole episodes",
    "use_critic": "set training.advantages to grpo or rloo to do without a critic",
    "use_gae": "set training.advantages",
    "use_kl_loss": "set training.kl_coeff",
    "kl_coeff": "set training.kl_coeff, which weighs the k3 estimate and does not adapt",
    "kl_target": "set training.kl_coeff, which does not adapt",
    "entropy_coeff_schedule": "set training.entropy_coeff",
    "lr_schedule": "set training.lr",
    "_model_config": "set the keys of model",
    "model": "set the keys of model",
    "_rl_module_spec": "set the keys of model",
    "evaluation_num_env_runners": "leave it out: the runners of training play the evaluations too",
    "evaluation_duration_unit": "leave it at episodes",
    "evaluation_config": "leave it out: evaluations are greedy, from held-out starts",
    "min_time_s_per_iteration": "set rollout.steps_per_iteration",
    "normalize_actions": "leave it out: model.unnorm_key says whose statistics actions are in",
    "clip_actions": "leave it out: model.unnorm_key says whose statistics actions are in",
    "restart_failed_sub_environments": "leave it out: a dead environment process is always replaced",
    "restart_failed_env_runners": "leave it out: a dead runner is always replaced",
    "torch_skip_nan_gradients": "set training.max_skipped_updates",
    "custom_evaluation_function": "leave it out, or subclass VLAPPO.evaluate",
}
"""What to do instead, for fields that people reach for."""
NEVER_CALLED = ("on_episode_created", "on_episode_start", "on_episode_step")
"""Callbacks for which the event loop has no place: they would slow down every step, or see an episode without frames.
"""
DOCUMENTATION = "docs/rllib.md says what reaches the run"


def fields_of(config: Any) -> dict[str, Any]:
    """All fields that are to be derived from the settings, or to be left alone; copies, since setters change some in
    place."""
    fields = {name: value for name, value in vars(config).items() if name not in OWN | INTERNAL | PASSED_ON}
    ours = {
        name: value for name, value in fields.items() if not name.startswith("__")
    }  # Tune's own: __trial_info__ and others
    return {name: deepcopy(value) if isinstance(value, dict | list) else value for name, value in ours.items()}


def written(fields: Mapping[str, Any], derived: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the fields that are not as they were derived; in the order of `HONOURED`."""
    found = {name: value for name, value in fields.items() if name not in derived or derived[name] != value}
    order = {name: index for index, name in enumerate(HONOURED)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def honour(settings: Settings, fields: Mapping[str, Any], before: Settings) -> Settings:
    """The settings with what these fields say; fields that say nothing about settings are left alone.

    Args:
        fields: see `written`.
        before: what the fields were derived from; a setting that is another now was written too.

    Raises:
        SettingsError: a value is not allowed, or two fields, or a field and a setting, say different things of one key.
    """
    said: dict[str, tuple[str, Any]] = {}

    def lookup(key: str) -> Any:
        return said[key][1] if key in said else value_of(settings, key)

    for name, value in fields.items():
        for key, wanted in HONOURED[name](value, lookup).items() if name in HONOURED else ():
            field, other = said.get(key, (name, wanted))
            if other != wanted:
                raise SettingsError(
                    f"{_shown(name)}: sets {key} to {wanted!r}, but {_shown(field)} sets it to {other!r}; set "
                    "one of them"
                )
            now = value_of(settings, key)
            if now not in (wanted, value_of(before, key)):
                raise SettingsError(
                    f"{_shown(name)}: sets {key} to {wanted!r}, but the settings say {now!r}; set one of them"
                )
            said[key] = (name, wanted)
    return Settings.from_dict(with_keys(settings.to_dict(), {key: wanted for key, (_, wanted) in said.items()}))


def refuse(fields: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raise `SettingsError` for the first field that nothing acts on.

    Args:
        known: all fields that there are.
    """
    for name, value in fields.items():
        if name in HONOURED:
            continue
        if name not in known:
            close = difflib.get_close_matches(name, [*known, *PASSED_ON, "vla"], n=1)
            raise SettingsError(
                f"{name}: RLlib has no such field; "
                + (f"did you mean {close[0]}?" if close else "settings go into vla")
            )
        remedy = REMEDIES.get(name, "leave it out")
        raise SettingsError(f"{_shown(name)}: {value!r:.60} would have no effect on VLAPPO; {remedy} ({DOCUMENTATION})")


def refuse_callbacks(classes: Sequence[Any]) -> None:
    """Raise `SettingsError` for a callback that would never be called."""
    for kind in classes:
        while isinstance(kind, functools.partial):
            kind = kind.func
        for name in NEVER_CALLED:
            if getattr(kind, name, None) not in (
                None,
                getattr(RLlibCallback, name),
            ):  # None: a function that makes them
                raise SettingsError(
                    f"callbacks: {kind.__name__}.{name} would never be called; use on_episode_end or "
                    f"on_sample_end ({DOCUMENTATION})"
                )


def value_of(settings: Settings, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = settings
    for part in key.split("."):
        value = getattr(value, part, None)
    return value


def _shown(field: str) -> str:
    """As RLlib's setters call it."""
    return field.lstrip("_").removesuffix("_str")
