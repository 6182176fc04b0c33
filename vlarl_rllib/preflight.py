"""What is checked before Ray starts: the checkpoint, the renderer, the GPUs. Every finding is one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

from vlarl_rllib.models.checkpoint_facts import read_checkpoint_facts
from vlarl_rllib.models.presets import HUB_MODELS, PRESETS
from vlarl_rllib.settings import Settings, SettingsError, calculate_runtime_args


def check(settings: Settings) -> None:
    """Raise `SettingsError` for what would fail later anyway."""
    _check_model(settings)
    if settings.env.name == "libero":
        _check_libero()
    plan = calculate_runtime_args(settings)
    if plan.total_gpus and not os.environ.get("RAY_ADDRESS") and not count_gpus():
        raise SettingsError(
            f"engines.gpus, learners.gpus: the plan needs {plan.total_gpus:g} GPU(s) but this machine shows none; set both to 0 to run on the CPU"
        )


def _check_model(settings: Settings) -> None:
    path, key = settings.model.path, settings.model.unnorm_key
    if path in PRESETS:
        from vlarl_rllib.models.presets import action_statistics

        if key not in action_statistics():
            raise SettingsError(f"model.unnorm_key: {key!r} is not in preset {path!r}; choose from {', '.join(sorted(action_statistics()))}")
        return
    directory = Path(path).expanduser()
    if not directory.is_dir() and path not in HUB_MODELS and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
        raise SettingsError(f"model.path: {path!r} is no directory, preset or hub id; presets are {', '.join([*PRESETS, *HUB_MODELS])}")
    try:
        facts = read_checkpoint_facts(str(directory) if directory.is_dir() else HUB_MODELS.get(path, path))
    except json.JSONDecodeError as error:
        raise SettingsError(f"model.path: a JSON file of {path} cannot be read ({error}); copy the checkpoint again") from error
    except KeyError as error:
        raise SettingsError(f"model.path: config.json of {path} has no {error}; give an OpenVLA checkpoint") from error
    except (OSError, ValueError) as error:  # missing, not to be fetched, or another kind of model
        raise SettingsError(f"model.path: {error}") from error
    try:
        facts.action_statistics(key)
    except ValueError as error:
        raise SettingsError(f"model.unnorm_key: {error}") from error


def _check_libero() -> None:
    from vlarl_rllib.envs.rendering import choose_gl_backend

    try:
        choose_gl_backend()
    except RuntimeError as error:
        raise SettingsError(f"env.name: libero cannot render here: {error}") from error


def count_gpus() -> int:
    """NVIDIA GPUs that this process may see, without loading CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip()])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))
