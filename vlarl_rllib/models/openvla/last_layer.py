"""The language model's last layer, computed only where something reads it.

B = batch, L = sequence length, A = positions that are read, D = hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb


class LastDecoderLayer(LlamaDecoderLayer):
    """Llama's decoder layer, which may be asked for a few positions: keys and values of all tokens, everything else of
    those alone.

    A policy is read at its action tokens, 8 positions behind hundreds of patches and words. In a model of 2 layers that
    is a quarter of a training step, in one of 32 layers (by operations) 2 %.
    """

    def forward(self, hidden_states: Tensor, *args: Any, read_positions: Tensor | None = None, **kwargs: Any) -> Tensor:
        """[B, L, D] -> [B, L, D], or [B, A, D] of `read_positions` [B, A]: causal, with pads last, and a cache, if any,
        still empty; or, with `visible`, as that says."""
        if read_positions is None:
            return super().forward(hidden_states, *args, **kwargs)
        residual = gather_positions(hidden_states, read_positions)
        residual = residual + self._attend(self.input_layernorm(hidden_states), read_positions, **kwargs)
        return residual + self.mlp(self.post_attention_layernorm(residual))

    def _attend(
        self,
        hidden: Tensor,
        positions: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any = None,
        visible: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Self-attention [B, A, D] of the positions to tokens [B, L, D]: where `visible` [B, 1, 1, L] is true, or
        without it to all up to each."""
        attention: Any = self.self_attn
        batch, length = hidden.shape[:2]
        query = attention.q_proj(gather_positions(hidden, positions))
        query, key, value = (
            states.view(batch, states.shape[1], -1, attention.head_dim).transpose(1, 2)
            for states in (query, attention.k_proj(hidden), attention.v_proj(hidden))
        )
        cos, sin = (table.expand(batch, -1, -1) for table in position_embeddings)
        query, _ = apply_rotary_pos_emb(
            query, query, gather_positions(cos, positions), gather_positions(sin, positions)
        )
        key, _ = apply_rotary_pos_emb(key, key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, attention.layer_idx)
        if visible is None:
            visible = torch.arange(length, device=hidden.device) <= positions[:, None, :, None]
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, scale=attention.scaling, enable_gqa=attention.num_key_value_groups > 1
        )
        return attention.o_proj(attended.transpose(1, 2).reshape(batch, positions.shape[1], -1))


def gather_positions(states: Tensor, positions: Tensor) -> Tensor:
    """[B, L, D] at `positions` [B, A] -> [B, A, D]."""
    return states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))
