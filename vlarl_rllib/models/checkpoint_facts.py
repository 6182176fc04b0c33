"""What runners and checks need to know of a checkpoint, read from its JSON files without torch or transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlarl_rllib.models.files import AGAIN, check_weights, refuse_foreign_code
from vlarl_rllib.process.json_files import read_json_object
from vlarl_rllib.types import NUM_ACTION_TOKENS

CONFIG_FILE, STATISTICS_FILE = "config.json", "dataset_statistics.json"
PUBLISHED_PADDING = 64
"""Rows that published checkpoints pad the vocabulary to a multiple of; the action ids lie below them."""
PUBLISHED_VOCABULARY = 32064
MAX_IMAGE_SIZE = 4096
LARGEST = 1e30
"""Absolute value of an action, in whatever units: beyond it float32 would be near its end (NaN is not below it)."""


@dataclass(frozen=True)
class CheckpointFacts:
    """Sizes and statistics of an OpenVLA checkpoint."""

    image_size: int
    """Side of the square input image, in pixels."""
    action_vocab_size: int
    """One above the highest action id."""
    num_bins: int
    norm_stats: dict[str, Any]
    origins: dict[str, str]
    """By key of `norm_stats`, the file that it is from."""

    def action_statistics(self, unnorm_key: str) -> dict[str, Any]:
        """`q01`, `q99`, `mask` of a data set, checked.

        Raises ValueError: an unknown key, naming the choices, or numbers that scale no action.
        """
        for key in (unnorm_key, f"{unnorm_key}_no_noops"):
            if key in self.norm_stats:
                return action_statistics(self.norm_stats[key], f"{self.origins[key]}: {key}")
        raise ValueError(
            f"{unnorm_key!r} is not in this checkpoint's norm_stats; choose from {', '.join(sorted(self.norm_stats))}"
        )


def read_checkpoint_facts(checkpoint: str) -> CheckpointFacts:
    """Read `config.json` and, where there is one, `dataset_statistics.json` of a directory or hub id; see that a
    directory's weights are whole.

    Raises:
        FileNotFoundError: no `config.json`.
        KeyError: one without the sizes.
        ValueError: not an OpenVLA checkpoint, or one with a damaged file, in one line.
    """
    config_file = _find(checkpoint, CONFIG_FILE)
    if config_file is None:
        raise FileNotFoundError(
            f"{checkpoint}: has no config.json; give an OpenVLA checkpoint directory, a hub id, or a preset such "
            "as tiny"
        )
    config = read_json_object(config_file, AGAIN)
    if config.get("model_type") != "openvla":
        raise ValueError(
            f"{checkpoint}: model_type is {config.get('model_type')!r}, must be 'openvla'; other policies are "
            "not supported"
        )
    refuse_foreign_code(config, str(config_file))
    statistics_file = _find(checkpoint, STATISTICS_FILE)
    of_config, of_file = (
        config.get("norm_stats") or {},
        read_json_object(statistics_file, AGAIN) if statistics_file else {},
    )
    if not isinstance(of_config, dict):
        raise ValueError(f"{config_file}: norm_stats is {type(of_config).__name__}, must be an object by data set")
    try:
        vocabulary = int(config.get("text_config", {}).get("vocab_size", PUBLISHED_VOCABULARY))
        image_size, num_bins = int(config["image_sizes"][0]), int(config.get("n_action_bins", 256))
        action_vocab_size = vocabulary - int(config.get("pad_to_multiple_of", PUBLISHED_PADDING))
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{config_file}: its sizes cannot be read ({type(error).__name__}: {error}); copy the checkpoint again"
        ) from None
    if not (1 <= image_size <= MAX_IMAGE_SIZE and 2 <= num_bins <= action_vocab_size):
        raise ValueError(
            f"{config_file}: {num_bins} bins of {action_vocab_size} ids, frames of {image_size} pixels make no policy"
        )
    if Path(checkpoint).is_dir():
        check_weights(Path(checkpoint))
    return CheckpointFacts(
        image_size=image_size,
        action_vocab_size=action_vocab_size,
        num_bins=num_bins,
        norm_stats={**of_config, **of_file},
        origins=dict.fromkeys(of_config, str(config_file)) | dict.fromkeys(of_file, str(statistics_file)),
    )


def action_statistics(entry: Any, where: str) -> dict[str, Any]:
    """The `action` part of an entry of `norm_stats`, checked. Raises ValueError, beginning with `where`."""
    statistics = entry.get("action") if isinstance(entry, dict) else None
    check_action_statistics(statistics, f"{where}: action")
    assert isinstance(statistics, dict), "it was checked"
    return statistics


def check_action_statistics(statistics: Any, where: str) -> None:
    """Raise ValueError, in one line that begins with `where`, for statistics that an action must not be scaled with.

    Quantiles are 7 finite numbers each, no upper one below its lower one where `mask` (7 booleans, all true where
    absent) holds. Equal ones
    pass: a dimension that never changes, such as the rotations of `tabletop`, has them, and scales to that constant.
    """
    if not isinstance(statistics, dict):
        raise ValueError(
            f"{where} is {type(statistics).__name__}, must be an object with q01 and q99; make the statistics anew"
        )
    for name in ("q01", "q99"):
        numbers = statistics.get(name)
        if not isinstance(numbers, list) or len(numbers) != NUM_ACTION_TOKENS or not all(map(_is_finite, numbers)):
            raise ValueError(
                f"{where}.{name} is {_shortened(numbers)}, must be {NUM_ACTION_TOKENS} finite numbers; make the "
                "statistics anew"
            )
    mask = statistics.get("mask", [True] * NUM_ACTION_TOKENS)
    if (
        not isinstance(mask, list)
        or len(mask) != NUM_ACTION_TOKENS
        or not all(isinstance(entry, bool) for entry in mask)
    ):
        raise ValueError(
            f"{where}.mask is {_shortened(mask)}, must be {NUM_ACTION_TOKENS} booleans; make the statistics anew"
        )
    for index, (low, high, used) in enumerate(zip(statistics["q01"], statistics["q99"], mask, strict=True)):
        if used and not (low <= high and math.isfinite(high - low)):
            raise ValueError(
                f"{where}: q99 is {high} and q01 {low} at number {index}, must not be lower; make the statistics anew"
            )


def _is_finite(number: Any) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and abs(number) <= LARGEST


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _find(checkpoint: str, name: str) -> Path | None:
    directory = Path(checkpoint)
    if directory.is_dir():
        return directory / name if (directory / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(checkpoint, name))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{checkpoint}: cannot be fetched from the hub and is not in the local cache; download it first"
        ) from error
    except EntryNotFoundError:
        return None
