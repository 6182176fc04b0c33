"""The published OpenVLA checkpoints, and what fits each of them where the settings say nothing."""

from __future__ import annotations

from dataclasses import dataclass

FINE_TUNED_TEMPERATURE = 1.5
"""Checkpoints fine-tuned on one suite are so sure of their actions that they explore too little at temperature 1. VLA-RL
(arXiv 2505.18719) trains these very checkpoints with PPO at 1.5; in its ablation libero_spatial ends at 90.2 % with 1.5
and at 85.8 % with 1.0. SimpleVLA-RL's 1.6 is for another model (OpenVLA-OFT) and algorithm (GRPO)."""


@dataclass(frozen=True)
class PublishedModel:
    """One checkpoint on the Hugging Face Hub."""

    hub_id: str
    unnorm_key: str
    """Data set whose action statistics its tokens are meant for."""
    center_crop: bool
    """Whether it was trained with image augmentation (random crops of 90 % of the area), so that it sees centre crops."""
    temperature: float
    """At which reinforcement learning samples its actions."""


def _fine_tuned(suite: str) -> PublishedModel:
    return PublishedModel(f"openvla/openvla-7b-finetuned-{suite.replace('_', '-')}", suite, True, FINE_TUNED_TEMPERATURE)


PUBLISHED_MODELS = {
    # The base model, trained without augmentation; of its data sets, BridgeData V2 is the one that upstream's examples use.
    "openvla-7b": PublishedModel("openvla/openvla-7b", "bridge_orig", False, 1.0),
    "openvla-7b-finetuned-libero-spatial": _fine_tuned("libero_spatial"),
    "openvla-7b-finetuned-libero-object": _fine_tuned("libero_object"),
    "openvla-7b-finetuned-libero-goal": _fine_tuned("libero_goal"),
    "openvla-7b-finetuned-libero-10": _fine_tuned("libero_10"),
}
"""By the name that `model.path` takes; the hub id does too."""


def published_model(path: str) -> PublishedModel | None:
    """The checkpoint that `model.path` names by its name or hub id; None for any other model."""
    by_id = {model.hub_id: model for model in PUBLISHED_MODELS.values()}
    return PUBLISHED_MODELS.get(path) or by_id.get(path)
