"""OpenVLA as vLLM runs it: our vision backbone and projector, vLLM's Llama, raw frames and the action head.

N = sequences of a step, S = image side in pixels, P = image patches, D = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.inputs import MultiModalInput
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import BaseDummyInputsBuilder, BaseMultiModalProcessor, BaseProcessingInfo

from vlarl_rllib.engines.vllm.compat import VALUE_HEAD_KEY, engine_input
from vlarl_rllib.engines.vllm.frame_encoder import FrameEncoder
from vlarl_rllib.models.critic import ValueHead
from vlarl_rllib.models.openvla import OpenVLAConfig, PrismaticVisionBackbone
from vlarl_rllib.models.openvla.modeling import PrismaticProjector
from vlarl_rllib.weights.source import VALUE_HEAD_PREFIX


class FrameInfo(BaseProcessingInfo):
    """What vLLM asks about a prompt's image while it starts: there is one, and it becomes P embeddings."""

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)
        self.config = OpenVLAConfig.from_pretrained(ctx.model_config.model)

    def get_supported_mm_limits(self) -> dict[str, int | None]:
        return {"image": 1}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Any) -> dict[str, int]:
        return {"image": self.config.num_patches}


class NoDummyData(BaseDummyInputsBuilder[FrameInfo]):
    """Nothing: `DummyFrame` makes its input from the configuration."""

    def get_dummy_text(self, mm_counts: Any) -> str:
        return ""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Any, mm_options: Any) -> dict[str, Any]:
        return {}


class DummyFrame(BaseMultiModalProcessor[FrameInfo]):
    """A black frame, which some of vLLM's runners measure memory with.

    Requests do not pass here: `compat.engine_input` makes theirs.
    """

    def apply(self, inputs: Any, timing_ctx: Any) -> MultiModalInput:
        assert not inputs.mm_data_items, "this model takes no image through vLLM's renderer"
        config = self.info.config
        frame = np.zeros((config.image_size, config.image_size, 3), dtype=np.uint8)
        return engine_input([0], frame, [config.image_token_index] * config.num_patches, "dummy")

    # vLLM's own `apply` needs these two, and only that.
    def _get_mm_fields_config(self, *_: Any) -> NoReturn:
        raise NotImplementedError

    def _get_prompt_updates(self, *_: Any) -> NoReturn:
        raise NotImplementedError


@MULTIMODAL_REGISTRY.register_processor(DummyFrame, info=FrameInfo, dummy_inputs=NoDummyData)
class VlarlOpenVLA(nn.Module, SupportsMultiModal):
    """OpenVLA that samples action tokens and nothing else; parameter names are the published ones.

    Attributes:
        value_head: all values 0 until weights come; None where none is asked for.
        watcher: told the hidden states [N, D] of the positions that each step samples at.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = OpenVLAConfig.from_pretrained(vllm_config.model_config.model)
        self.vision_backbone = PrismaticVisionBackbone(config)
        self.projector = _projector(self.vision_backbone.embed_dim, config.text_config.hidden_size)
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config,
            hf_config=vllm_config.model_config.hf_config.text_config,
            prefix=maybe_prefix(prefix, "language_model"),
        )
        self._frames_to_patches: Callable[[Tensor], Tensor] = self._encode
        model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
        wanted = getattr(model.hf_config, VALUE_HEAD_KEY, False)
        self.value_head = ValueHead(config.text_config.hidden_size).float() if wanted else None
        self.watcher: Callable[[Tensor], None] | None = None
        if vllm_config.device_config.device_type == "cuda" and not model.enforce_eager:
            self._frames_to_patches = FrameEncoder(self._encode, scheduler.max_num_seqs)
        self._action_ids = config.action_token_ids
        self._vocab_size = config.text_config.vocab_size

    def get_language_model(self) -> nn.Module:
        return self.language_model

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        """Hidden states [tokens, D] of all sequences of a step, one behind the other."""
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def embed_multimodal(self, **kwargs: Any) -> Tensor | list[Tensor]:
        """Patch embeddings [images, P, D] of `pixel_values` [images, S, S, 3] uint8."""
        pixel_values = kwargs.get("pixel_values")
        if pixel_values is None:
            return []
        return self._frames_to_patches(pixel_values)

    def _encode(self, frames: Tensor) -> Tensor:
        return self.projector(self.vision_backbone(frames))

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Logits [N, vocabulary] float32, -inf at all but the 256 action ids, which alone go through the LM head.

        It takes the place of `allowed_token_ids`, of which vLLM would keep, copy and apply a list per request.
        """
        if self.watcher is not None:
            self.watcher(hidden_states)
        ids = slice(self._action_ids.start, self._action_ids.stop)
        lm_head: Any = self.language_model.lm_head
        logits = hidden_states.new_full((len(hidden_states), self._vocab_size), -torch.inf, dtype=torch.float32)
        logits[:, ids] = F.linear(hidden_states, lm_head.weight[ids]).float()
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take tensors under their published names; vLLM fuses q, k, v and gate, up itself.

        The value head counts as loaded, since no checkpoint has one.
        """
        own = {name for name, _ in self.named_parameters() if name.startswith(VALUE_HEAD_PREFIX)}
        return AutoWeightsLoader(self).load_weights(weights) | own


def _projector(vision_dim: int, text_dim: int) -> PrismaticProjector:
    """The learner's projector with vLLM's linear layers, which on CPUs multiply by weights packed beforehand."""
    with torch.device("meta"):
        projector = PrismaticProjector(vision_dim, text_dim)
    for name, linear in projector.named_children():
        setattr(projector, name, ReplicatedLinear(linear.in_features, linear.out_features, return_bias=False))
    return projector
