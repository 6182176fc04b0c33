"""From a run or a training checkpoint to what other tools load: a merged Hugging Face checkpoint, or a PEFT adapter.

A training checkpoint holds what was trained; what was frozen comes from the run's `model.path`, which must still be
there.
"""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlarl_rllib.models.family import PolicyFamily, family_of
from vlarl_rllib.models.files import AGAIN
from vlarl_rllib.models.presets import resolve_model
from vlarl_rllib.models.statistics import action_statistics
from vlarl_rllib.process.json_files import read_json_object
from vlarl_rllib.process.own_files import own_folder
from vlarl_rllib.runs.checkpoints import FACTS_FILE, POINTER_FILE, CheckpointStore, local
from vlarl_rllib.runs.sealing import FILES_FILE, file_digest
from vlarl_rllib.settings import Settings, SettingsError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

MAX_SHARD_SIZE = "5GB"
PROVENANCE_FILE = "vlarl_export.json"
MAX_REASON = 300
"""Characters of what a library says of a damaged file."""


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A complete checkpoint of a run."""

    directory: Path
    iteration: int
    settings: Settings


def find_training_checkpoint(path: Path, family: str | None = None) -> TrainingCheckpoint | None:
    """The checkpoint at `path`, or the newest one where `path` is a run's directory; None where it is neither.

    Args:
        family: of its policy; None = as its settings have it, unless they name code.

    Raises:
        SettingsError: a pointer to no checkpoint, or damaged ones alone; settings that name code.
    """
    damages: list[str] = []
    if (path / FACTS_FILE).is_file() or (path / POINTER_FILE).is_file():
        try:
            directory: Path | None = local(CheckpointStore.resolve(path))
        except FileNotFoundError as error:
            raise SettingsError(str(error)) from None
    else:
        newest = CheckpointStore(path / "checkpoints", keep=1).newest(damages.append)
        directory = local(newest) if newest else None
    if directory is None:
        if damages:
            raise SettingsError("; ".join(damages))
        return None
    for damage in damages:
        logger.warning("%s; %s is taken", damage, directory.name)
    facts = CheckpointStore.read_facts(directory)
    settings = Settings.from_dict(facts["settings"])
    written = settings.model.family
    if written and ":" in written and not family:
        raise SettingsError(
            f"{directory}: its settings name model.family {written!r}, and a checkpoint chooses no code; say --family "
            f"{written}"
        )
    if family:
        settings = settings.replaced(model={"family": family})
    return TrainingCheckpoint(directory, facts["iteration"], settings)


def resolve_policy(path: str, family: str | None = None) -> str:
    """What `from_pretrained` loads for a run's directory, training checkpoint, model directory, preset or hub id.

    A run or training checkpoint is exported once, into `exports/` of its run, or beside one that lies elsewhere.
    `family` as in `find_training_checkpoint`.

    Raises:
        SettingsError: none of these.
    """
    checkpoint = find_training_checkpoint(Path(path).expanduser(), family)
    if checkpoint is None:
        try:
            return resolve_model(path)
        except ValueError as error:
            raise SettingsError(f"CHECKPOINT: {error}, nor a run with a checkpoint") from None
    directory = checkpoint.directory
    if directory.parent.name == "checkpoints":
        target = own_folder(own_folder(directory.parent.parent, "exports", "CHECKPOINT"), directory.name, "CHECKPOINT")
    else:
        target = own_folder(directory.parent, f"{directory.name}-exported", "CHECKPOINT")
    if not _is_export_of(checkpoint, target):
        shutil.rmtree(target, ignore_errors=True)
        export_merged(checkpoint, target)
    return str(target)


def _is_export_of(checkpoint: TrainingCheckpoint, target: Path) -> bool:
    """Whether `target` is whole and made from this very checkpoint: another one may have had its name."""
    file = target / PROVENANCE_FILE  # written last
    return file.is_file() and read_json_object(file, AGAIN).get("files_sha256") == file_digest(
        checkpoint.directory / FILES_FILE
    )


def export_merged(checkpoint: TrainingCheckpoint, out: Path, dtype: str | None = None) -> None:
    """Write a checkpoint with the published names, files and shards, adapters merged.

    Args:
        dtype: "float32" or "bfloat16"; None = the engines' own, so that the export gives exactly the actions that they
            gave.
    """
    import torch

    from vlarl_rllib.weights.source import iterate_weights

    dtype = dtype or checkpoint.settings.engines.dtype
    tensors = dict(iterate_weights(load_policy(checkpoint), getattr(torch, dtype)))
    model = checkpoint.settings.model
    family = family_of(resolve_model(model.path), model.family_reference)
    write_model(tensors, family=family, base=model.path, out=out, dtype=dtype)
    _write_provenance(checkpoint, out, "merged")


def write_model(
    tensors: dict[str, Tensor],
    *,
    family: PolicyFamily,
    base: str,
    out: Path,
    dtype: str,
    norm_stats: dict[str, Any] | None = None,
) -> None:
    """Write weights under their published names as a Hugging Face checkpoint; everything else is the base checkpoint's.

    Args:
        norm_stats: action statistics by data set, instead of the base's, in whose units the weights no longer act; None
            = the base's.

    Raises:
        ValueError: statistics that scale no action.
    """
    from huggingface_hub import save_torch_state_dict

    if norm_stats:
        for key, entry in norm_stats.items():
            action_statistics(entry, key)
    out.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(tensors, out, max_shard_size=MAX_SHARD_SIZE, metadata={"format": "pt"})
    family.write_files(resolve_model(base), out, dtype, norm_stats)


def export_adapter(checkpoint: TrainingCheckpoint, out: Path) -> None:
    """Write the adapter as PEFT does. Raises SettingsError where the run trained none."""
    from vlarl_rllib.models.lora import save_adapter

    if checkpoint.settings.model.lora is None:
        raise SettingsError(
            "--adapter: the run trained all weights (model.lora is null), so there is no adapter; use --merge"
        )
    policy = load_policy(checkpoint)
    save_adapter(policy, policy.lora_config, out, resolve_model(checkpoint.settings.model.path))
    _write_provenance(checkpoint, out, "adapter")


def load_policy(checkpoint: TrainingCheckpoint) -> Any:
    """The policy of a training checkpoint, adapters not yet merged, without its value head; on the CPU unless it is
    quantised.

    Raises:
        SettingsError: checkpoint or base model are damaged, or hold what is not read.
    """
    import torch
    from torch import nn

    from vlarl_rllib.learner.checkpoint import load_trained
    from vlarl_rllib.models.build import build_policy

    # adapters that no forward reads are not stored: they are as they were drawn
    torch.manual_seed(checkpoint.settings.run.seed)
    settings = checkpoint.settings.model
    try:
        policy = build_policy(settings, "cuda" if settings.quantization and torch.cuda.is_available() else "cpu")
        load_trained(checkpoint.directory / "learners", nn.ModuleDict({"policy": policy}))
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        EOFError,
        RuntimeError,
        pickle.UnpicklingError,
    ) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_REASON]
        raise SettingsError(
            f"{checkpoint.directory}: its policy cannot be read ({reason}); give an older checkpoint, or mend "
            "model.path"
        ) from error
    return policy.eval()


def _write_provenance(checkpoint: TrainingCheckpoint, out: Path, kind: str) -> None:
    origin = {
        "kind": kind,
        "checkpoint": str(checkpoint.directory),
        "files_sha256": file_digest(checkpoint.directory / FILES_FILE),
        "iteration": checkpoint.iteration,
        "base_model": checkpoint.settings.model.path,
        "unnorm_key": checkpoint.settings.unnorm_key,
    }
    (out / PROVENANCE_FILE).write_text(json.dumps(origin, indent=2) + "\n")
