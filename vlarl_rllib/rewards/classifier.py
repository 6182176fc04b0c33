"""The judge that `vlarl reward-model` trains: a small convolutional network, conditioned on the words of the
instruction.

An instruction is the mean embedding of its words and pairs of neighbouring words ("put the red cube on the blue zone"
and the reverse have the same words); it scales and shifts the channels behind every convolution (FiLM, arXiv
1709.07871).

N, B = frames, S = image side in pixels.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from vlarl_rllib.rewards.judge import (
    CLASSIFIER_TYPE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_judge,
    read_config,
    weights_digest,
)

CHANNELS = (24, 48, 64, 64)
"""Of each convolution; all but the last halve the picture."""
GROUPS = 8
EMBEDDING_SIZE = HIDDEN_SIZE = 64
MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 8, 4096
BATCH_SIZE = 128
"""Frames that are scored at once."""


@dataclass(frozen=True)
class ClassifierConfig:
    """What a network is built from; `config.json` holds it beside what it was trained on."""

    image_size: int
    """Side that frames are brought to, in pixels."""
    vocabulary: tuple[str, ...]
    """Words and pairs of words that have an embedding; others are passed over."""


class SuccessClassifier:
    """See the module, and `Judge` for `score`.

    Args:
        training: what it was trained on and how well, for `config.json`; not read again.
    """

    def __init__(self, config: ClassifierConfig, device: str = "cpu", training: dict[str, Any] | None = None) -> None:
        self.config, self.training = config, training or {}
        self.network = Network(len(config.vocabulary)).to(device).eval()
        self._index = {term: index for index, term in enumerate(config.vocabulary)}
        self._device = torch.device(device)

    @torch.no_grad()
    def score(self, images: np.ndarray, instruction: str) -> np.ndarray:
        """[N, S, S, 3] uint8 -> [N] float32 in [0, 1]."""
        bag = self.bags([instruction]).to(self._device)
        fragments = [images[first : first + BATCH_SIZE] for first in range(0, len(images), BATCH_SIZE)]
        logits = [self.network(self.pixels(fragment), bag.expand(len(fragment), -1)) for fragment in fragments]
        return torch.sigmoid(torch.cat(logits)).cpu().numpy()

    def pixels(self, images: np.ndarray) -> Tensor:
        """[N, H, W, 3] uint8 -> [N, 3, S, S] uint8 of the network's size, on its device."""
        return torch.from_numpy(resized(images, self.config.image_size)).to(self._device).permute(0, 3, 1, 2)

    def bags(self, instructions: Sequence[str]) -> Tensor:
        """[N, V] float32: the share of each term of the vocabulary in the known part of an instruction; zeros where
        nothing is known."""
        bags = torch.zeros(len(instructions), len(self.config.vocabulary))
        for row, instruction in enumerate(instructions):
            known = [self._index[term] for term in terms(instruction) if term in self._index]
            for index in known:
                bags[row, index] += 1.0 / len(known)
        return bags

    def save(self, directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, the first last: without it there is no judge."""
        root = Path(directory)
        root.mkdir(parents=True, exist_ok=True)
        weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in self.network.state_dict().items()})
        (root / WEIGHTS_FILE).write_bytes(weights)
        facts = {
            "model_type": CLASSIFIER_TYPE,
            **asdict(self.config),
            "weights_sha256": weights_digest(weights),
            "training": self.training,
        }
        (root / CONFIG_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path, device: str = "cpu") -> SuccessClassifier:
        """What `save` wrote. Raises ValueError, one line, where files are missing, damaged, or not each other's."""
        check_judge(directory)
        facts = read_config(directory)
        try:
            config = ClassifierConfig(int(facts["image_size"]), tuple(map(str, facts["vocabulary"])))
            if not MIN_IMAGE_SIZE <= config.image_size <= MAX_IMAGE_SIZE:
                raise ValueError(f"image_size is {config.image_size}, must be {MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE}")
            classifier = cls(config, device, facts.get("training"))
            classifier.network.load_state_dict(load((Path(directory) / WEIGHTS_FILE).read_bytes()))
        except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(
                f"{directory} is not a success classifier of this version ({reason}); run vlarl reward-model again"
            ) from error
        return classifier


class Network(nn.Module):
    """Pixels and a bag of terms to a logit."""

    def __init__(self, vocabulary_size: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(vocabulary_size, EMBEDDING_SIZE, bias=False)
        nn.init.normal_(self.embedding.weight)
        sizes = [5, *CHANNELS]  # colours, and where in the picture: x and y
        self.convolutions = nn.ModuleList(
            nn.Conv2d(
                before,
                after,
                5 if block == 0 else 3,
                stride=1 if block == len(CHANNELS) - 1 else 2,
                padding=2 if block == 0 else 1,
            )
            for block, (before, after) in enumerate(zip(sizes, CHANNELS, strict=False))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(GROUPS, channels) for channels in CHANNELS)
        self.modulations = nn.ModuleList(nn.Linear(EMBEDDING_SIZE, 2 * channels) for channels in CHANNELS)
        self.hidden = nn.Linear(2 * CHANNELS[-1], HIDDEN_SIZE)
        self.out = nn.Linear(HIDDEN_SIZE, 1)

    def forward(self, pixels: Tensor, bags: Tensor) -> Tensor:
        """[B, 3, S, S] uint8, [B, V] float32 -> [B] float32 logits."""
        x = pixels.float() / 127.5 - 1.0
        side = torch.linspace(-1.0, 1.0, x.shape[-1], device=x.device)
        across, down = side[None, None, None, :].expand_as(x[:, :1]), side[None, None, :, None].expand_as(x[:, :1])
        x = torch.cat([x, across, down], dim=1)
        words = self.embedding(bags)
        for convolution, norm, modulation in zip(self.convolutions, self.norms, self.modulations, strict=True):
            scale, shift = modulation(words)[:, :, None, None].chunk(2, dim=1)
            x = F.relu(norm(convolution(x)) * (1.0 + scale) + shift)
        pooled = torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)
        return self.out(F.relu(self.hidden(pooled)))[:, 0]


def terms(instruction: str) -> list[str]:
    """Words of an instruction in lower case, then the pairs of neighbours."""
    words = instruction.lower().replace(".", " ").replace(",", " ").split()
    return words + [f"{first} {second}" for first, second in itertools.pairwise(words)]


def resized(images: np.ndarray, side: int) -> np.ndarray:
    """[N, H, W, 3] uint8 -> [N, side, side, 3] uint8, bilinear with antialiasing; frames of that size as they are."""
    if images.shape[1:3] == (side, side):
        return images
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    small = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return small.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
