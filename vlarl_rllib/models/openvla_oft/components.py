"""The parts that only OpenVLA-OFT has, which lie beside a published checkpoint's weights in files of their own: the
projector of the robot's state, and the head that regresses actions.

B = batch, K = actions of a chunk, D = width of the language model.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlarl_rllib.models.files import AGAIN
from vlarl_rllib.models.openvla.actions import NUM_ACTION_TOKENS
from vlarl_rllib.models.openvla_oft.component_files import component_file
from vlarl_rllib.models.openvla_oft.proprio import PROPRIO_SIZE

NUM_RESIDUAL_BLOCKS = 2
DDP_PREFIX = "module."
"""In front of every name of a component's file."""


class ProprioProjector(nn.Module):
    """Two-layer MLP from a normalised state [B, 8] to one token [B, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(PROPRIO_SIZE, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, proprio: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(proprio.to(self.fc1.weight.dtype))))


class ResidualBlock(nn.Module):
    """x + ReLU(linear(norm(x)))"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.ffn(hidden)


class ResidualMLP(nn.Module):
    """[..., inputs] -> [..., outputs] through two residual blocks of `width`."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(inputs)
        self.fc1 = nn.Linear(inputs, width)
        self.mlp_resnet_blocks = nn.ModuleList([ResidualBlock(width) for _ in range(NUM_RESIDUAL_BLOCKS)])
        self.layer_norm2 = nn.LayerNorm(width)
        self.fc2 = nn.Linear(width, outputs)

    def forward(self, seen: Tensor) -> Tensor:
        hidden = F.relu(self.fc1(self.layer_norm1(seen)))
        for block in self.mlp_resnet_blocks:
            hidden = block(hidden)
        return self.fc2(self.layer_norm2(hidden))


class L1RegressionActionHead(nn.Module):
    """Hidden states [B, 7 K, D] at a chunk's positions -> normalised actions [B, K, 7] float32, each from its own
    seven; nothing bounds them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.model = ResidualMLP(NUM_ACTION_TOKENS * width, width, NUM_ACTION_TOKENS)

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.unflatten(1, (-1, NUM_ACTION_TOKENS)).flatten(2)
        return self.model(rows.to(self.model.fc1.weight.dtype)).float()


def load_component(module: nn.Module, name: str, checkpoint: str, **hub_options: Any) -> None:
    """Copy what `<name>--<step>_checkpoint.pt` of a directory or hub id holds into `module`.

    Raises:
        FileNotFoundError: the checkpoint has none.
        ValueError: in one line, several of them, or one that is damaged, holds anything but tensors or does not fit.
    """
    file = component_file(checkpoint, name, **hub_options)
    if file is None:
        raise FileNotFoundError(
            f"checkpoint '{checkpoint}' has no {name}--*_checkpoint.pt and no such weights; copy that file too, or say "
            "that the model has no such part"
        )
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
        tensors = {key.removeprefix(DDP_PREFIX): tensor for key, tensor in stored.items()}
        module.load_state_dict(tensors)
    except (OSError, RuntimeError, pickle.UnpicklingError, AttributeError, TypeError, EOFError) as error:
        raise ValueError(f"{Path(file)}: {' '.join(str(error).split())[:200]}; {AGAIN}") from None
