"""The value head: what return the policy's own backbone expects from the current frame and instruction."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_WIDTHS = (512, 128)
"""Widths of the two inner layers for large backbones (RLinf's OpenVLA value head); smaller backbones cap them."""


def value_head_widths(hidden_size: int) -> tuple[int, int, int, int]:
    """Of what goes into each layer, and comes out of the last."""
    first, second = (min(width, hidden_size) for width in MAX_WIDTHS)
    return hidden_size, first, second, 1


class ValueHead(nn.Module):
    """Three-layer MLP on one hidden state: [B, hidden_size] -> [B] float32.

    The last layer starts at zero, so that every initial value is 0 and the first advantages are plain returns. The
    weights depend on `seed` alone, so that all learners start alike. Everything is computed in float32, whatever dtype
    the weights or hidden states have.
    """

    def __init__(self, hidden_size: int, seed: int = 0) -> None:
        super().__init__()
        _, first, second, last = value_head_widths(hidden_size)
        self.fc1 = nn.Linear(hidden_size, first)
        self.fc2 = nn.Linear(first, second)
        self.fc3 = nn.Linear(second, last)
        self._initialize(seed)

    @torch.no_grad()
    def _initialize(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.fc1, self.fc2):
            noise = torch.randn(layer.weight.shape, generator=generator, device="cpu", dtype=torch.float32)
            layer.weight.copy_(noise * layer.in_features**-0.5)
            layer.bias.zero_()
        self.fc3.weight.zero_()
        self.fc3.bias.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden.float()
        for layer in (self.fc1, self.fc2):
            hidden = F.gelu(F.linear(hidden, layer.weight.float(), layer.bias.float()))
        return F.linear(hidden, self.fc3.weight.float(), self.fc3.bias.float()).squeeze(-1)
