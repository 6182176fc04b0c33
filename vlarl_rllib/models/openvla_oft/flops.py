"""OpenVLA-OFT's matrix products, from its configuration: OpenVLA's on longer sequences, and its own parts'.

L = prompt tokens, A = action tokens, K = actions of a chunk, D = width.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlarl_rllib.models.flops import Pass, PolicyFlops, Product
from vlarl_rllib.models.openvla.actions import NUM_ACTION_TOKENS
from vlarl_rllib.models.openvla.flops import (
    decoder_products,
    projector_products,
    tower_chains,
    value_head_products,
)
from vlarl_rllib.models.openvla_oft.component_files import ACTION_HEAD, PROPRIO_PROJECTOR
from vlarl_rllib.models.openvla_oft.components import NUM_RESIDUAL_BLOCKS
from vlarl_rllib.models.openvla_oft.configuration import OpenVLAOFTConfig
from vlarl_rllib.models.openvla_oft.proprio import PROPRIO_SIZE


def count_flops(config: OpenVLAOFTConfig, prompt_tokens: int) -> PolicyFlops:
    """Of each pass for a prompt of so many tokens, BOS among them; see `models.flops` for what counts. Sampling is one
    pass."""
    layout, width = config.layout, config.text_config.hidden_size
    action_ids, all_ids = len(config.action_token_ids), config.text_config.vocab_size
    rows = config.num_patches * layout.num_images + layout.proprio + prompt_tokens + layout.num_targets
    towers = tower_chains(config, layout.num_images)
    seen = (*projector_products(config, layout.num_images), *(_proprio(width) if layout.proprio else ()))
    score = tuple(decoder_products(config, rows, rows, layout.num_tokens, action_ids))
    if layout.l1_head:
        supervise = (*score, *_action_head(width, layout.chunk, score[-1].level))
    else:
        supervise = tuple(decoder_products(config, rows, rows, layout.num_targets, all_ids))
    value = tuple(value_head_products(config, score[-1].level))
    return PolicyFlops(
        score=Pass(towers, (*seen, *score, *value)),
        supervise=Pass(towers, (*seen, *supervise)),
        sample=Pass(towers, (*seen, *score)).forward_flops,
    )


def _proprio(width: int) -> Iterator[Product]:
    yield Product(f"{PROPRIO_PROJECTOR}.fc1", 0, 1, PROPRIO_SIZE, width)
    yield Product(f"{PROPRIO_PROJECTOR}.fc2", 1, 1, width, width)


def _action_head(width: int, chunk: int, level: int) -> Iterator[Product]:
    """Beside the token head, on all hidden states of an action at once."""
    name = f"{ACTION_HEAD}.model"
    yield Product(f"{name}.fc1", level, chunk, NUM_ACTION_TOKENS * width, width)
    for index in range(NUM_RESIDUAL_BLOCKS):
        yield Product(f"{name}.mlp_resnet_blocks.{index}.ffn.1", level + 1 + index, chunk, width, width)
    yield Product(f"{name}.fc2", level + 1 + NUM_RESIDUAL_BLOCKS, chunk, width, NUM_ACTION_TOKENS)
