"""Models by name: presets, which are made from a seed by their family, and published checkpoints.

Importing this module loads no torch.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from vlarl_rllib.models.family import PolicyFacts, PolicyFamily, load_family, own_families
from vlarl_rllib.process.surroundings import cache_directory
from vlarl_rllib.settings.published import PUBLISHED_MODELS, absolute_unless_name

if TYPE_CHECKING:
    from vlarl_rllib.settings import ModelSettings

HUB_MODELS = {name: model.hub_id for name, model in PUBLISHED_MODELS.items()}
"""Hub ids of the published checkpoints, by name."""


@cache
def presets() -> dict[str, PolicyFamily]:
    """The family of each preset, by the preset's name."""
    return {preset: family for family in map(load_family, own_families()) for preset in family.preset_facts()}


def preset_facts(name: str) -> PolicyFacts:
    """Of a preset, before it is written."""
    return presets()[name].preset_facts()[name]


def resolve_model(path_or_preset: str | Path, cache_dir: str | Path | None = None) -> str:
    """Directory or Hub id that a family can load.

    Args:
        path_or_preset: a preset (`tiny`, `mini`), a published name (`openvla-7b`, ...), a checkpoint directory, or a
            Hub id of the form owner/name. A name means the same whatever lies in the working directory; `./tiny` is a
            directory.
        cache_dir: where a preset's checkpoint is written, once; another process doing the same at the same time is
            harmless. None = `surroundings.cache_directory`.

    Raises:
        ValueError: none of these.
    """
    name = absolute_unless_name(str(path_or_preset))
    if name in presets():
        return str(_cached_checkpoint(name, Path(cache_dir) if cache_dir else cache_directory() / "models"))
    if name in HUB_MODELS:
        return HUB_MODELS[name]
    if Path(name).is_dir() or (name.count("/") == 1 and not name.startswith("/")):
        return name
    choices = ", ".join([*presets(), *HUB_MODELS])
    raise ValueError(f"model '{name}' is no directory, preset or Hub id (owner/name); presets are: {choices}")


def models_here(model: ModelSettings) -> ModelSettings:
    """The same with the directories that the models have on this node.

    A preset is written where it is missing; the name and the code are the same on all nodes, so the bytes are.
    """
    critic = model.critic_path and resolve_model(model.critic_path)
    return model.model_copy(update={"path": resolve_model(model.path), "critic_path": critic})


def write_checkpoint(preset: str, directory: str | Path, seed: int = 0) -> None:
    """Write a complete checkpoint of a preset with random weights into `directory`.

    The same seed gives the same bytes. Raises ValueError for an unknown preset.
    """
    if preset not in presets():
        raise ValueError(f"preset '{preset}' does not exist; choose from {', '.join(presets())}")
    presets()[preset].write_preset(preset, Path(directory), seed)


def cache_name(preset: str) -> str:
    """Name of a preset's directory."""
    return f"{preset}-{presets()[preset].preset_digest(preset)}"


def _cached_checkpoint(preset: str, cache_dir: Path) -> Path:
    """Directory of the preset's checkpoint below `cache_dir`; written aside and renamed, so never seen half-made."""
    target = cache_dir / cache_name(preset)
    if target.is_dir():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=cache_dir, prefix=f".{preset}-"))
    try:
        write_checkpoint(preset, scratch)
        if not (scratch / "config.json").is_file():
            raise RuntimeError(f"preset {preset} was not written whole")
        os.rename(scratch, target)
    except OSError:
        # Another process finished first: renaming onto its directory fails, and its files are the same as ours.
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target
