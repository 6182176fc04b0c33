"""Telling one model from another without reading all of its weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from vlarl_rllib.models.presets import HUB_MODELS, cache_name, presets

if TYPE_CHECKING:
    from vlarl_rllib.settings import Settings

SAMPLES, SAMPLE_BYTES = 64, 16384
"""Of each file of weights, evenly spread: training changes every one of them."""


def fingerprint(model: str) -> str:
    """Equal for copies of a checkpoint's directory, different for another architecture or other weights.

    A preset and a hub id stand for themselves. Reads config.json and 1 MB of each safetensors file, so that 15 GB take
    milliseconds.
    """
    if model in presets():
        return cache_name(model)
    directory = Path(model)
    if any(directory.name == cache_name(preset) for preset in presets()):
        return directory.name
    if not directory.is_dir():
        return HUB_MODELS.get(model, model)
    digest = hashlib.sha256()
    config = directory / "config.json"
    digest.update(config.read_bytes() if config.is_file() else b"")
    for file in sorted(directory.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            for index in range(SAMPLES):
                content.seek(size * index // SAMPLES)
                digest.update(content.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def model_fingerprints(settings: Settings) -> dict[str, str]:
    """What a checkpoint remembers of the models that its run began with, by key."""
    paths = {"model.path": settings.model.path, "model.critic_path": settings.model.critic_path}
    return {key: fingerprint(path) for key, path in paths.items() if path}
