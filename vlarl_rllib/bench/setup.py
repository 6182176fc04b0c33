"""What is measured: the settings where there is no config, and the model."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlarl_rllib.envs.registry import DEFAULT_ENVIRONMENT
from vlarl_rllib.models.family import load_family
from vlarl_rllib.process.surroundings import cache_directory
from vlarl_rllib.runs.preflight import check, check_environment, check_sft, count_gpus
from vlarl_rllib.settings import Settings, SettingsError
from vlarl_rllib.settings.overrides import apply_override
from vlarl_rllib.settings.published import PUBLISHED_MODELS, RANDOM_7B

ON_CPU: dict[str, Any] = {
    "model": {"path": "tiny"},
    "env": {"name": "synthetic", "tasks": [0], "num_envs": 8},
    "rollout": {"steps_per_iteration": 16},
    "training": {"minibatch_size": 64},
    "evaluation": {"episodes": 0},
    "run": {"dashboard": False},
}
"""An environment that costs next to nothing, so that what is measured is the rest."""
SHARE = 0.45
"""Of a GPU, for the engine and for the learner."""
ON_GPU: dict[str, Any] = ON_CPU | {
    "model": {"path": "mini", "dtype": "bfloat16"},
    "env": ON_CPU["env"] | {"num_envs": 64, "num_processes": 8},
    "engines": {"gpus": SHARE, "dtype": "bfloat16", "max_batch": 64},
    "learners": {"gpus": SHARE},
    "training": {"minibatch_size": 64, "old_log_probs": "recompute"},
}


SIMULATOR: dict[str, Any] = {"name": DEFAULT_ENVIRONMENT, "tasks": [0]}
"""What `env` measures."""


def bench_settings(name: str, config: Path | None, overrides: Sequence[str]) -> Settings:
    """Those of a config, or those above; nothing is evaluated, logged or kept. Raises `SettingsError`.

    Args:
        name: of the benchmark.
    """
    if config is not None:
        settings = Settings.from_yaml(config, overrides)
        return settings.replaced(evaluation={"episodes": 0, "every": 0}, run={"wandb": None, "dashboard": False})
    values = {section: dict(keys) for section, keys in (ON_GPU if count_gpus() else ON_CPU).items()}
    if name == "env":
        values["env"] |= SIMULATOR
    for override in overrides:
        apply_override(values, override)
    return Settings.from_dict(values)


def prepared(name: str, settings: Settings) -> Settings:
    """With a model that is there, and checked for this benchmark. Raises `SettingsError`."""
    if settings.model.path == RANDOM_7B:
        settings = settings.replaced(model={"path": str(random_7b())})
    if name == "env":
        check_environment(settings.env.name)
    elif name == "sft":
        check_sft(settings, data_to_come=True)
    else:
        check(settings)
    if name in ("update", "iteration") and settings.model.critic == "separate":
        raise SettingsError("model.critic: separate has no plain loop to be measured beside; set it to shared_head")
    if name == "sync" and not settings.engines.num:
        raise SettingsError("engines.num: 0 leaves nobody to push weights to; set it to at least 1")
    return settings


def random_7b() -> Path:
    """A directory with it, written when it is first asked for: aside and renamed, so never half there."""
    directory = cache_directory() / "models" / RANDOM_7B
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{RANDOM_7B}-"))
    family = load_family(next(iter(PUBLISHED_MODELS.values())).family)
    try:
        family.write_preset(RANDOM_7B, scratch, 0)
        os.rename(scratch, directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return directory
