"""Sharded checkpoints of the learners' state (torch distributed checkpoint): every rank writes its shards, any number
of ranks reads them."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from vlarl_rllib.learner.shard_files import ShardFiles
from vlarl_rllib.process.storage import FileFacts, Place, facts_of

STEPPED_FILE = "stepped.json"
"""Which optimisers had stepped. torch's state-dict functions initialise an optimiser's state with a dummy step and
leave step = 1 behind, which would shift Adam's bias correction after a resume; so an optimiser without state is not
saved, and loads as one that has none."""


METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "pathlib": {"Path", "PosixPath"},
}  # fmt: skip
"""All that the pickle `.metadata` of a checkpoint names; torch would import and call whatever else it named (2.11 to
2.13)."""


def save_sharded(
    directory: Place, model: nn.Module, optimizers: dict[str, torch.optim.Optimizer]
) -> dict[str, FileFacts]:
    """Write model and optimisers into `directory`, which every rank must see. Collective; complete when all ranks have
    returned.

    Returns:
        Size and digest of each file that this rank has written, by name in `directory`: who puts them together can see
        whether all of them have come.

    Raises:
        OSError: where a rank could not write; raised on every rank.
    """
    stepped = [name for name, optimizer in optimizers.items() if optimizer.state]
    state = _state(model, optimizers, stepped)
    shards = directory / "shards"
    files = ShardFiles(shards)
    try:
        dcp.save(state, storage_writer=files.writer())
    except dcp.api.CheckpointException as error:  # no Exception: it would end a Ray actor
        raise OSError(f"{directory}: {_first_failure(error)}") from None
    written = {f"{shards.name}/{name}": facts for name, facts in files.written.items()}
    if dist.get_rank() == 0:
        text = json.dumps(stepped)
        (directory / STEPPED_FILE).write_text(text)
        written[STEPPED_FILE] = facts_of(text.encode())
    return written


def load_sharded(directory: Place, model: nn.Module, optimizers: dict[str, torch.optim.Optimizer]) -> None:
    """Read what `save_sharded` wrote, also into another number of ranks: weights and moments. Learning rates and the
    like stay as they are.

    Collective.

    Raises:
        FileNotFoundError: where `directory` holds no complete checkpoint.
        ValueError: where it holds something that torch does not write.
        OSError: where it is damaged, or of another model; raised on every rank.
    """
    if not (directory / STEPPED_FILE).is_file():
        raise FileNotFoundError(
            f"{directory}: no complete checkpoint here ({STEPPED_FILE} is missing); give an older one"
        )
    stepped = json.loads((directory / STEPPED_FILE).read_text())
    state = _state(model, optimizers, stepped)
    try:
        _refuse_foreign_metadata(directory / "shards")
        dcp.load(state, storage_reader=ShardFiles(directory / "shards").reader(), planner=_SafePlanner())
    except dcp.api.CheckpointException as error:
        raise OSError(f"{directory}: {_first_failure(error)}") from None
    for name, optimizer in optimizers.items():
        if name in stepped:
            settings = [
                {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
            ]
            set_optimizer_state_dict(model, optimizer, state[name])
            for group, own in zip(optimizer.param_groups, settings, strict=True):
                group.update(own)  # learning rate, weight decay and the like are the new run's
        else:
            optimizer.state.clear()


def load_trained(directory: Path, model: nn.Module) -> None:
    """Read the trained parameters that `model`, which is not sharded, has in common with a checkpoint. Needs no process
    group.

    Raises:
        ValueError: where the checkpoint holds something that torch does not write.
        OSError: where it is damaged, or lacks one of the parameters.
    """
    state = {"model": _trained(model)}
    try:
        _refuse_foreign_metadata(directory / "shards")
        dcp.load(state, checkpoint_id=directory / "shards", planner=_SafePlanner(), no_dist=True)
    except dcp.api.CheckpointException as error:
        raise OSError(f"{directory}: {_first_failure(error)}") from None


def _state(model: nn.Module, optimizers: dict[str, torch.optim.Optimizer], stepped: Sequence[str]) -> dict[str, Any]:
    """Trained parameters and the state of the optimisers named. What is frozen is `model.path`'s, and stays there."""
    return {"model": _trained(model)} | {name: get_optimizer_state_dict(model, optimizers[name]) for name in stepped}


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """By name, on the parameters' own memory, so that `dcp.load` fills the model.

    torch's `get_model_state_dict` fails on bitsandbytes' 8-bit layers: their state dict has entries (SCB) that are no
    attributes.
    """
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _first_failure(error: dcp.api.CheckpointException) -> str:
    failure, _ = next(iter(error.failures.values()))
    return f"{type(failure).__name__}: {failure}"


class _SafePlanner(dcp.DefaultLoadPlanner):
    """Reads what is no tensor (learning rates and the like) without unpickling classes."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # raises for anything but numbers, strings and tensors
        value.seek(0)
        super().load_bytes(read_item, value)


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in METADATA_CLASSES.get(module, ()):
            raise ValueError(
                f"the checkpoint names {module}.{name}, which torch's checkpoints have no use for; do not trust it"
            )
        return super().find_class(module, name)


def _refuse_foreign_metadata(shards: Place) -> None:
    with (shards / ".metadata").open("rb") as file:
        _MetadataUnpickler(file).load()
