"""Sharded checkpoints of the learners' state (torch distributed checkpoint): every rank writes its shards, any number of ranks reads them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

STEPPED_FILE = "stepped.json"
"""Which optimisers had stepped. torch's state-dict functions initialise an optimiser's state with a dummy step and leave step = 1
behind, which would shift Adam's bias correction after a resume; so an optimiser without state is neither saved nor loaded."""


def save_sharded(directory: Path, model: nn.Module, optimizers: dict[str, torch.optim.Optimizer]) -> None:
    """Write model and optimisers into `directory`, which every rank must see. Collective; complete when all ranks have returned.

    Raises:
        OSError: where a rank could not write; raised on every rank.
    """
    stepped = [name for name, optimizer in optimizers.items() if optimizer.state]
    state = {"model": get_model_state_dict(model)} | {name: get_optimizer_state_dict(model, optimizers[name]) for name in stepped}
    try:
        dcp.save(state, checkpoint_id=directory / "shards")
    except dcp.api.CheckpointException as error:  # no Exception: it would end a Ray actor
        raise OSError(f"{directory}: {_first_failure(error)}") from None
    if dist.get_rank() == 0:
        (directory / STEPPED_FILE).write_text(json.dumps(stepped))


def load_sharded(directory: Path, model: nn.Module, optimizers: dict[str, torch.optim.Optimizer]) -> None:
    """Read what `save_sharded` wrote, also into another number of ranks. Collective.

    Raises:
        FileNotFoundError: where `directory` holds no complete checkpoint.
        OSError: where it is damaged, or of another model; raised on every rank.
    """
    if not (directory / STEPPED_FILE).is_file():
        raise FileNotFoundError(f"{directory}: no complete checkpoint here ({STEPPED_FILE} is missing); give an older one")
    stepped = json.loads((directory / STEPPED_FILE).read_text())
    state = {"model": get_model_state_dict(model)} | {name: get_optimizer_state_dict(model, optimizers[name]) for name in stepped}
    try:
        dcp.load(state, checkpoint_id=directory / "shards")
    except dcp.api.CheckpointException as error:
        raise OSError(f"{directory}: {_first_failure(error)}") from None
    set_model_state_dict(model, state["model"])
    for name in stepped:
        set_optimizer_state_dict(model, optimizers[name], state[name])


def _first_failure(error: dcp.api.CheckpointException) -> str:
    failure, _ = next(iter(error.failures.values()))
    return f"{type(failure).__name__}: {failure}"
