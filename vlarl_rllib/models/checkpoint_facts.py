"""What runners and checks need to know of a checkpoint, read from its JSON files without torch or transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PUBLISHED_PADDING = 64
"""Rows that published checkpoints pad the vocabulary to a multiple of; the action ids lie below them."""
PUBLISHED_VOCABULARY = 32064


@dataclass(frozen=True)
class CheckpointFacts:
    """Sizes and statistics of an OpenVLA checkpoint."""

    image_size: int
    """Side of the square input image, in pixels."""
    action_vocab_size: int
    """One above the highest action id."""
    num_bins: int
    norm_stats: dict[str, Any]

    def action_statistics(self, unnorm_key: str) -> dict[str, Any]:
        """`q01`, `q99`, `mask` of a data set. Raises ValueError, naming the choices, for an unknown key."""
        for key in (unnorm_key, f"{unnorm_key}_no_noops"):
            if key in self.norm_stats:
                return self.norm_stats[key]["action"]
        raise ValueError(f"{unnorm_key!r} is not in this checkpoint's norm_stats; choose from {', '.join(sorted(self.norm_stats))}")


def read_checkpoint_facts(checkpoint: str) -> CheckpointFacts:
    """Read `config.json` and, where there is one, `dataset_statistics.json` of a directory or hub id.

    Raises:
        FileNotFoundError: no `config.json`.
        ValueError: not an OpenVLA checkpoint.
    """
    config_file = _find(checkpoint, "config.json")
    if config_file is None:
        raise FileNotFoundError(f"{checkpoint}: has no config.json; give an OpenVLA checkpoint directory, a hub id, or a preset such as tiny")
    config = json.loads(config_file.read_text())
    if config.get("model_type") != "openvla":
        raise ValueError(f"{checkpoint}: model_type is {config.get('model_type')!r}, must be 'openvla'; other policies are not supported")
    statistics_file = _find(checkpoint, "dataset_statistics.json")
    statistics = json.loads(statistics_file.read_text()) if statistics_file else {}
    vocabulary = config.get("text_config", {}).get("vocab_size", PUBLISHED_VOCABULARY)
    return CheckpointFacts(
        image_size=config["image_sizes"][0],
        action_vocab_size=vocabulary - config.get("pad_to_multiple_of", PUBLISHED_PADDING),
        num_bins=config.get("n_action_bins", 256),
        norm_stats={**config.get("norm_stats", {}), **statistics},
    )


def _find(checkpoint: str, name: str) -> Path | None:
    directory = Path(checkpoint)
    if directory.is_dir():
        return directory / name if (directory / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(checkpoint, name))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(f"{checkpoint}: cannot be fetched from the hub and is not in the local cache; download it first") from error
    except EntryNotFoundError:
        return None
