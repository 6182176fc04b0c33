"""The names that models go by: presets, the published OpenVLA checkpoints, and what fits each of those where the
settings say nothing."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

FINE_TUNED_TEMPERATURE = 1.5
"""Checkpoints fine-tuned on one suite are so sure of their actions that they explore too little at temperature 1.
VLA-RL (arXiv 2505.18719) trains these very checkpoints with PPO at 1.5; in its ablation libero_spatial ends at 90.2 %
with 1.5 and at 85.8 % with 1.0. SimpleVLA-RL's 1.6 is for another model (OpenVLA-OFT) and algorithm (GRPO)."""


@dataclass(frozen=True)
class PublishedResult:
    """A success rate that was published, with OpenVLA's LIBERO protocol."""

    suite: str
    success: float
    standard_error: float
    """Percent; of three seeds of 500 episodes."""

    def spread(self, episodes: int) -> float:
        """Percentage points within which an evaluation of so many episodes lies in 19 of 20 cases: what chance does to
        both numbers."""
        chance = self.success * (100.0 - self.success) / episodes
        return 1.96 * math.sqrt(self.standard_error**2 + chance)


RESULTS_FROM = "arXiv 2406.09246, appendix E, and the README of openvla/openvla"


@dataclass(frozen=True)
class PublishedModel:
    """One checkpoint on the Hugging Face Hub."""

    hub_id: str
    unnorm_key: str
    """Data set whose action statistics its tokens are meant for."""
    center_crop: bool
    """Whether it was trained with image augmentation (random crops of 90 % of the area), so that it sees centre crops.
    """
    temperature: float
    """At which reinforcement learning samples its actions."""
    result: PublishedResult | None = None
    """What it should score; None = it was not made for LIBERO."""
    num_parameters: int = 7_541_237_184
    """Of all tensors in its files."""
    image_size: int = 224
    """Side of the frames that it sees, in pixels."""
    family: str = "openvla"
    """Kind of policy, as `model.family`."""


def _fine_tuned(suite: str, success: float, standard_error: float) -> PublishedModel:
    hub_id = f"openvla/openvla-7b-finetuned-{suite.replace('_', '-')}"
    result = PublishedResult(suite, success, standard_error)
    return PublishedModel(hub_id, suite, True, FINE_TUNED_TEMPERATURE, result)


PUBLISHED_MODELS = {
    # The base model, trained without augmentation; of its data sets, BridgeData V2 is the one that upstream's examples
    # use.
    "openvla-7b": PublishedModel("openvla/openvla-7b", "bridge_orig", False, 1.0),
    "openvla-7b-finetuned-libero-spatial": _fine_tuned("libero_spatial", 84.7, 0.9),
    "openvla-7b-finetuned-libero-object": _fine_tuned("libero_object", 88.4, 0.8),
    "openvla-7b-finetuned-libero-goal": _fine_tuned("libero_goal", 79.2, 1.0),
    "openvla-7b-finetuned-libero-10": _fine_tuned("libero_10", 53.7, 1.3),
}
"""By the name that `model.path` takes; the hub id does too."""

PRESET_NAMES = ("tiny", "small", "mini")
"""Of `models.presets.PRESETS`: small models that are made from a seed, for trying things out."""

RANDOM_7B = "random-7b"
"""What `vlarl bench` calls a model of the published sizes with random weights: 15 GB, made when it is first asked for,
by `PolicyFamily.write_preset` of the published checkpoints' family."""


def published_model(path: str) -> PublishedModel | None:
    """The checkpoint that `model.path` names by its name or hub id; None for any other model."""
    by_id = {model.hub_id: model for model in PUBLISHED_MODELS.values()}
    return PUBLISHED_MODELS.get(path) or by_id.get(path)


def absolute_path(path: str) -> str:
    """`~` expanded, relative to the working directory, links followed: what a name like runs/latest means today it
    means tomorrow."""
    return os.path.realpath(os.path.expanduser(path))


def is_model_name(text: str) -> bool:
    """Whether `text` is the name of a model rather than of a directory.

    A preset's or published name always is, whatever lies in the working directory (`./tiny` is the directory). Of the
    others, owner/name is one unless it reads like a path: there is such a directory or one called owner, or it begins
    with `runs/`.
    """
    if text in PRESET_NAMES or published_model(text):
        return True
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        return False
    owner, slash, _ = text.partition("/")
    return owner != "runs" and not os.path.isdir(owner) if slash else not os.path.isdir(text)


def absolute_unless_name(text: str) -> str:
    """What `model.path` means wherever it is read: a name, or an absolute path."""
    return text if is_model_name(text) else absolute_path(text)
