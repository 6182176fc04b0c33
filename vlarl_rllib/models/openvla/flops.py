"""OpenVLA's matrix products, from its configuration: both vision towers, projector, Llama, heads.

P = patches, L = prompt tokens, A = action tokens, D = width.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlarl_rllib.models.critic import value_head_widths
from vlarl_rllib.models.flops import Pass, PolicyFlops, Product, attention
from vlarl_rllib.models.openvla.actions import NUM_ACTION_TOKENS
from vlarl_rllib.models.openvla.configuration import OpenVLAConfig, VisionTowerConfig
from vlarl_rllib.models.openvla.modeling import PROJECTOR_EXPANSION

LEVELS_OF_BLOCK = 5
"""Queries, keys and values; attention; its output; the MLP's first layer, or two; its last."""
COLORS = 3


def count_flops(config: OpenVLAConfig, prompt_tokens: int) -> PolicyFlops:
    """Of each pass for a prompt of so many tokens, BOS among them; see `models.flops` for what counts."""
    action_ids, all_ids = len(config.action_token_ids), config.text_config.vocab_size
    prefill = config.num_patches + prompt_tokens
    one_more = NUM_ACTION_TOKENS + 1  # the end of sequence
    towers = tower_chains(config)
    first = Pass(towers, (*projector_products(config), *decoder_products(config, prefill, prefill, 1, action_ids)))
    later = [
        Pass((), tuple(decoder_products(config, 1, prefill + index, 1, action_ids)))
        for index in range(1, NUM_ACTION_TOKENS)
    ]
    teacher_forced = prefill + NUM_ACTION_TOKENS - 1
    score = tuple(decoder_products(config, teacher_forced, teacher_forced, NUM_ACTION_TOKENS, action_ids))
    targets = tuple(decoder_products(config, teacher_forced + 1, teacher_forced + 1, one_more, all_ids))
    value = tuple(value_head_products(config, score[-1].level))
    return PolicyFlops(
        score=Pass(towers, (*projector_products(config), *score, *value)),
        supervise=Pass(towers, (*projector_products(config), *targets)),
        sample=first.forward_flops + sum(step.forward_flops for step in later),
    )


def tower_chains(config: OpenVLAConfig, num_images: int = 1) -> tuple[tuple[Product, ...], ...]:
    """Both towers on so many images."""
    return tuple(
        tuple(_tower(f"vision_backbone.{name}", tower, num_images))
        for name, tower in config.vision_tower_configs().items()
    )


def _tower(name: str, tower: VisionTowerConfig, num_images: int) -> Iterator[Product]:
    """The patch embedding, and each block but the last, which is never run."""
    width, keys = tower.embed_dim, tower.num_prefix_tokens + tower.num_patches
    tokens, patches, hidden = num_images * keys, num_images * tower.num_patches, int(width * tower.mlp_ratio)
    yield Product(f"{name}.patch_embed.proj", 0, patches, COLORS * tower.patch_size**2, width)
    for index in range(tower.depth - 1):
        block, level = f"{name}.blocks.{index}", 1 + index * LEVELS_OF_BLOCK
        yield Product(f"{block}.attn.qkv", level, tokens, width, 3 * width)
        yield attention(level + 1, tokens, keys, width)
        yield Product(f"{block}.attn.proj", level + 2, tokens, width, width)
        yield Product(f"{block}.mlp.fc1", level + 3, tokens, width, hidden)
        yield Product(f"{block}.mlp.fc2", level + 4, tokens, hidden, width)


def projector_products(config: OpenVLAConfig, num_images: int = 1) -> Iterator[Product]:
    seen = sum(tower.embed_dim for tower in config.vision_tower_configs().values())
    width = config.text_config.hidden_size
    sizes = (seen, PROJECTOR_EXPANSION * seen, width, width)
    for index in range(3):
        yield Product(f"projector.fc{index + 1}", index, num_images * config.num_patches, *sizes[index : index + 2])


def decoder_products(config: OpenVLAConfig, rows: int, keys: int, read: int, num_ids: int) -> Iterator[Product]:
    """The language model and its head.

    Args:
        rows: tokens that go through it.
        keys: tokens that each of them may attend to, those of the cache too.
        read: positions whose logits are wanted: all that the last layer computes beside keys and values.
        num_ids: whose logits are.
    """
    text = config.text_config
    width, inner = text.hidden_size, text.intermediate_size
    head = text.hidden_size // text.num_attention_heads
    queries, cached = head * text.num_attention_heads, head * text.num_key_value_heads
    for index in range(text.num_hidden_layers):
        layer, level = f"language_model.model.layers.{index}", 3 + index * LEVELS_OF_BLOCK
        wanted = read if index == text.num_hidden_layers - 1 else rows
        yield Product(f"{layer}.self_attn.q_proj", level, wanted, width, queries)
        yield Product(f"{layer}.self_attn.k_proj", level, rows, width, cached)
        yield Product(f"{layer}.self_attn.v_proj", level, rows, width, cached)
        yield attention(level + 1, wanted, keys, queries)
        yield Product(f"{layer}.self_attn.o_proj", level + 2, wanted, queries, width)
        yield Product(f"{layer}.mlp.gate_proj", level + 3, wanted, width, inner)
        yield Product(f"{layer}.mlp.up_proj", level + 3, wanted, width, inner)
        yield Product(f"{layer}.mlp.down_proj", level + 4, wanted, inner, width)
    yield Product("language_model.lm_head", 3 + text.num_hidden_layers * LEVELS_OF_BLOCK, read, width, num_ids)


def value_head_products(config: OpenVLAConfig, level: int) -> Iterator[Product]:
    """Beside the token head, on one hidden state."""
    sizes = value_head_widths(config.text_config.hidden_size)
    for index in range(3):
        yield Product(f"value_head.fc{index + 1}", level + index, 1, sizes[index], sizes[index + 1])
