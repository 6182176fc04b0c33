"""Golden checkpoints and small models shared by the model tests."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from vlarl_rllib.models.openvla import OpenVLAForActionPrediction, OpenVLAProcessor

GOLDEN_DIR = Path(__file__).parents[1] / "data" / "golden"


@dataclass
class Golden:
    """A tiny checkpoint and what the original implementation computed with it."""

    name: str
    directory: Path
    vision_towers: dict
    arrays: dict
    tolerance: float
    """Absolute, for hidden states, logits and log-probs."""
    model: OpenVLAForActionPrediction
    processor: OpenVLAProcessor

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[name])

    def inputs(self, samples: slice = slice(None)) -> dict[str, torch.Tensor]:
        """Stored model inputs of the golden samples (8 images x 3 instructions)."""
        images = self.tensor("sample_image")[samples]
        instructions = self.tensor("sample_instruction")[samples]
        input_ids = self.tensor("input_ids")
        mask = torch.arange(input_ids.shape[1]) < self.tensor("input_len")[:, None]
        return {
            "input_ids": input_ids[instructions],
            "attention_mask": mask.long()[instructions],
            "pixel_values": self.tensor("pixel_values")[images],
        }


def load_golden(name: str, folder: Path) -> Golden:
    directory = folder / name
    towers = json.loads((directory / "vision_towers.json").read_text())
    return Golden(
        name=name,
        directory=directory,
        vision_towers=towers,
        arrays=dict(np.load(folder / f"golden_{name}.npz")),
        tolerance=5e-4 if name == "A" else 2e-4,
        model=OpenVLAForActionPrediction.from_pretrained(directory, vision_towers=towers, dtype=torch.float32),
        processor=OpenVLAProcessor.from_pretrained(directory),
    )


@pytest.fixture(scope="session", params=["S", "B", "A"])
def golden(request) -> Golden:
    """Each golden checkpoint in turn."""
    if request.param == "S":
        return request.getfixturevalue("golden_s")
    folder = os.environ.get("VLARL_GOLDEN_DIR")
    if folder is None:
        pytest.skip(f"VLARL_GOLDEN_DIR is not set: golden checkpoint {request.param} is kept outside the repository")
    return load_golden(request.param, Path(folder))


@pytest.fixture(scope="session")
def golden_s() -> Golden:
    """The smallest golden checkpoint. Tests that change it must copy it."""
    return load_golden("S", GOLDEN_DIR)
