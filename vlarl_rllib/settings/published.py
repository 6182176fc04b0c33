"""The names that models go by: presets, the published OpenVLA and OpenVLA-OFT checkpoints, and what fits each of those
where the settings say nothing."""

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
    """A success rate that was published for LIBERO."""

    suite: str
    success: float
    standard_error: float
    """Percent; of three seeds of 500 episodes. 0 = not published."""
    source: str = "arXiv 2406.09246, appendix E, and the README of openvla/openvla"
    """Where, and with which protocol, if not with OpenVLA's."""

    def spread(self, episodes: int) -> float:
        """Percentage points within which an evaluation of so many episodes lies in 19 of 20 cases: what chance does to
        both numbers."""
        chance = self.success * (100.0 - self.success) / episodes
        return 1.96 * math.sqrt(self.standard_error**2 + chance)


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
    """Kind of policy, as `models.family.load_family` takes it."""


def _fine_tuned(suite: str, success: float, standard_error: float) -> PublishedModel:
    hub_id = f"openvla/openvla-7b-finetuned-{suite.replace('_', '-')}"
    result = PublishedResult(suite, success, standard_error)
    return PublishedModel(hub_id, suite, True, FINE_TUNED_TEMPERATURE, result)


OFT_TEMPERATURE = 1.6
"""SimpleVLA-RL (arXiv 2509.09674) samples at it, in GRPO on its own checkpoints."""
REGRESSED = "openvla_oft?num_images=2&proprio=true&l1_head=true"
TOKENS = "openvla_oft?num_images=1&proprio=false"
"""Their files say neither that they are OpenVLA-OFT nor how it was trained."""


def _oft_regressed(suite: str, success: float) -> PublishedModel:
    hub_id = f"moojink/openvla-7b-oft-finetuned-{suite.replace('_', '-')}"
    result = PublishedResult(suite, success, 0.0, "arXiv 2502.19645, eight actions played of each pass")
    return PublishedModel(hub_id, suite, True, 1.0, result, family=REGRESSED)


def _oft_tokens(name: str, suite: str, success: float) -> PublishedModel:
    result = PublishedResult(suite, success, 0.0, "arXiv 2509.09674, its own protocol of at most 512 steps")
    return PublishedModel(f"Haozhan72/{name}", suite, True, OFT_TEMPERATURE, result, family=TOKENS)


PUBLISHED_MODELS = {
    # The base model, trained without augmentation; of its data sets, BridgeData V2 is the one that upstream's examples
    # use.
    "openvla-7b": PublishedModel("openvla/openvla-7b", "bridge_orig", False, 1.0),
    "openvla-7b-finetuned-libero-spatial": _fine_tuned("libero_spatial", 84.7, 0.9),
    "openvla-7b-finetuned-libero-object": _fine_tuned("libero_object", 88.4, 0.8),
    "openvla-7b-finetuned-libero-goal": _fine_tuned("libero_goal", 79.2, 1.0),
    "openvla-7b-finetuned-libero-10": _fine_tuned("libero_10", 53.7, 1.3),
    # OpenVLA-OFT that regresses its actions: for evaluation, since nothing of them has a probability
    "openvla-7b-oft-finetuned-libero-spatial": _oft_regressed("libero_spatial", 97.6),
    "openvla-7b-oft-finetuned-libero-object": _oft_regressed("libero_object", 98.4),
    "openvla-7b-oft-finetuned-libero-goal": _oft_regressed("libero_goal", 97.9),
    "openvla-7b-oft-finetuned-libero-10": _oft_regressed("libero_10", 94.5),
    # OpenVLA-OFT with tokens, of one demonstration a task (trajall: of all): where reinforcement learning begins
    **{
        name: _oft_tokens(name, suite, success)
        for name, suite, success in (
            ("Openvla-oft-SFT-libero-spatial-traj1", "libero_spatial", 63.6),
            ("Openvla-oft-SFT-libero-object-traj1", "libero_object", 54.9),
            ("Openvla-oft-SFT-libero-goal-traj1", "libero_goal", 59.6),
            ("Openvla-oft-SFT-libero10-traj1", "libero_10", 17.3),
            ("Openvla-oft-SFT-libero10-trajall", "libero_10", 86.5),
        )
    },
}
"""By the name that `model.path` takes; the hub id does too."""

PRESET_NAMES = ("tiny", "small", "mini", "tiny-oft", "mini-oft")
"""Of `models.presets.presets`: small models that are made from a seed, for trying things out."""

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
