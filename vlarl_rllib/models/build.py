"""The policy that a run trains, built from its settings: base weights, adapters, value head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vlarl_rllib.models.family import PolicyFamily, family_of
from vlarl_rllib.models.presets import models_here

if TYPE_CHECKING:
    from vlarl_rllib.settings import ModelSettings


def build_models(settings: ModelSettings, seed: int, device: torch.device | str = "cpu") -> tuple[Any, Any]:
    """The policy, with its value head where it has one, and the separate critic or None; the same on every rank, which
    keeps its own shard of them.

    Args:
        seed: of fresh adapters and value heads. It seeds torch's global generator.
        device: see `build_policy`.
    """
    torch.manual_seed(seed)
    policy = build_policy(settings, device)
    if settings.critic == "separate":
        return policy, build_critic(settings, seed, device)
    policy.add_value_head(seed)
    return policy, None


def build_policy(settings: ModelSettings, device: torch.device | str = "cpu") -> Any:
    """The policy with what is trained in float32 and what is frozen for good in `settings.dtype`, without a value head.

    Without adapters everything that a forward pass reads is trained. With them `policy.lora_config` is PEFT's config of
    them. Fresh adapters draw from torch's global generator.

    Args:
        device: where a quantised policy is put: on a CPU a 7B one takes minutes. Others stay on the CPU until FSDP
            places them.
    """
    settings = models_here(settings)
    family = family_of(settings.path, settings.family_reference)
    dtype = getattr(torch, settings.dtype)
    options: dict[str, Any] = {"dtype": dtype if settings.lora else torch.float32}
    if settings.quantization:
        from vlarl_rllib.models.quantization import quantization_config

        options |= {
            "quantization_config": quantization_config(settings.quantization, dtype, family.never_quantized),
            "device_map": {"": device},
        }
    policy = family.load(settings.path, **options)
    policy.lora_config = _add_adapters(policy, settings, family)
    family.freeze_unused(policy)
    return policy


def build_critic(settings: ModelSettings, seed: int, device: torch.device | str = "cpu") -> Any:
    """A separate critic: a policy of its own with a value head, trained as the policy is: whole, or with fresh
    adapters."""
    lora = settings.lora and settings.lora.model_copy(update={"adapter": None})
    settings = models_here(settings)
    own = settings.model_copy(update={"path": settings.critic_path or settings.path, "lora": lora})
    critic = build_policy(own, device)
    family_of(own.path, own.family_reference).freeze_token_head(critic)  # a critic reads hidden states
    critic.add_value_head(seed)
    return critic


def _add_adapters(policy: Any, settings: ModelSettings, family: PolicyFamily) -> Any:
    if settings.lora is None:
        return None
    from vlarl_rllib.models.lora import add_lora, set_dequantized_dtype

    config = add_lora(policy, settings.lora, family.lora_targets)
    set_dequantized_dtype(policy, getattr(torch, settings.dtype))
    return config
