"""The policy that a run trains, built from its settings: base weights, adapters, value head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vlarl_rllib.models.openvla import OpenVLAForActionPrediction

if TYPE_CHECKING:
    from peft import LoraConfig

    from vlarl_rllib.settings import ModelSettings


def build_policy(settings: ModelSettings, device: torch.device | str = "cpu") -> OpenVLAForActionPrediction:
    """The policy with what is trained in float32 and what is frozen for good in `settings.dtype`, without a value head.

    Without adapters everything that a forward pass reads is trained. With them `policy.lora_config` is PEFT's config of
    them. Fresh adapters draw from torch's global generator.

    Args:
        device: where a quantised policy is put: on a CPU a 7B one takes minutes. Others stay on the CPU until FSDP
            places them.
    """
    dtype = getattr(torch, settings.dtype)
    options: dict[str, Any] = {"dtype": dtype if settings.lora else torch.float32}
    if settings.quantization:
        from vlarl_rllib.models.quantization import quantization_config

        options |= {
            "quantization_config": quantization_config(settings.quantization, dtype),
            "device_map": {"": device},
        }
    policy = OpenVLAForActionPrediction.from_pretrained(settings.path, **options)
    policy.lora_config = _add_adapters(policy, settings)
    _freeze_unused(policy)
    return policy


def build_critic(settings: ModelSettings, seed: int, device: torch.device | str = "cpu") -> OpenVLAForActionPrediction:
    """A separate critic: an OpenVLA of its own with a value head, trained as the policy is: whole, or with fresh
    adapters."""
    lora = settings.lora and settings.lora.model_copy(update={"adapter": None})
    critic = build_policy(
        settings.model_copy(update={"path": settings.critic_path or settings.path, "lora": lora}), device
    )
    critic.language_model.lm_head.requires_grad_(False)  # a critic reads hidden states
    critic.add_value_head(seed)
    return critic


def _add_adapters(policy: OpenVLAForActionPrediction, settings: ModelSettings) -> LoraConfig | None:
    if settings.lora is None:
        return None
    from vlarl_rllib.models.lora import add_lora, set_dequantized_dtype

    config = add_lora(policy, settings.lora)
    set_dequantized_dtype(policy, getattr(torch, settings.dtype))
    return config


def _freeze_unused(policy: OpenVLAForActionPrediction) -> None:
    """Freeze what lies behind the feature block of each tower: published, but read by nothing, so it never gets a
    gradient."""
    for tower in (policy.vision_backbone.featurizer, policy.vision_backbone.fused_featurizer):
        read = {parameter for block in tower.live_blocks for parameter in block.parameters()}
        for name, parameter in tower.named_parameters():
            if name.startswith(("blocks.", "norm.", "attn_pool.")) and parameter not in read:
                parameter.requires_grad_(False)
