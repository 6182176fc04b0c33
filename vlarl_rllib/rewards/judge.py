"""A judge looks at frames and says how likely the instruction has been carried out. What directory holds one.

Nothing heavy is imported here, so that a wrong directory is answered at once; `judges.py` loads one.

T = steps of a fragment of an episode, S = image side in pixels.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from vlarl_rllib.models.files import WEIGHTS_FILE, check_weights, refuse_foreign_code
from vlarl_rllib.process.json_files import read_json_object

CONFIG_FILE = "config.json"
CLASSIFIER_TYPE = "vlarl_success_classifier"
"""`model_type` of what `vlarl reward-model` writes."""
REMEDY = "give a directory that vlarl reward-model wrote, or one of a Hugging Face vision-language model"

JudgeKind = Literal["classifier", "vision_language"]


class Judge(Protocol):
    """Knows a solved task when it sees one."""

    def score(self, images: np.ndarray, instruction: str) -> np.ndarray:
        """How likely each frame shows the task solved, or nearly.

        Args:
            images: [T+1, S, S, 3] uint8.

        Returns:
            [T+1] float32 in [0, 1].
        """
        ...


def judge_kind(directory: str | Path) -> JudgeKind:
    """Which judge a directory holds, by its config.json alone. Raises ValueError, one line, where it holds none."""
    config = read_config(directory)
    if config.get("model_type") == CLASSIFIER_TYPE:
        return "classifier"
    if "vision_config" in config:  # as all of transformers' image-text-to-text models that judge frames have
        return "vision_language"
    raise ValueError(
        f"{directory} holds a model of type {config.get('model_type')!r}, which cannot judge frames; {REMEDY}"
    )


def check_judge(directory: str | Path) -> JudgeKind:
    """`judge_kind`, and whether the weights are there and whole, a classifier's as they were written.

    Raises:
        ValueError: in one line, what is wrong with the directory.
    """
    kind, root = judge_kind(directory), Path(directory)
    if kind == "vision_language":
        refuse_foreign_code(read_config(directory), str(root / CONFIG_FILE))
        try:
            check_weights(root)
        except FileNotFoundError as error:
            raise ValueError(str(error)) from None
        return kind
    if not (root / WEIGHTS_FILE).is_file():
        raise ValueError(f"{directory} has no {WEIGHTS_FILE}; run vlarl reward-model again")
    if weights_digest((root / WEIGHTS_FILE).read_bytes()) != read_config(directory).get("weights_sha256"):
        raise ValueError(
            f"{directory}: {WEIGHTS_FILE} is not the file that {CONFIG_FILE} was written with; run vlarl "
            "reward-model again"
        )
    return kind


def read_config(directory: str | Path) -> dict[str, Any]:
    """`config.json` of a directory. Raises ValueError, one line, where there is none that can be read."""
    file = Path(directory) / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"{directory} has no {CONFIG_FILE}; {REMEDY}")
    return read_json_object(file, "copy or make the model again")


def weights_digest(content: bytes) -> str:
    """What a classifier's config.json remembers its weights by."""
    return hashlib.sha256(content).hexdigest()
