"""OpenVLA as vLLM runs it: vLLM's own class with our vision towers, raw frames and the action head, and its weight
updates.

N = sequences of a step, S = image side in pixels, P = image patches, D = hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import vllm.model_executor.models.openvla as in_tree
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import AutoWeightsLoader
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.transformers_utils.processors.openvla import OpenVLAImageProcessor

from vlarl_rllib.engines.vllm.compat import LayerwiseTransferEngine, UpdateInfo, vision_backbone_from
from vlarl_rllib.models.openvla import OpenVLAConfig, PrismaticVisionBackbone
from vlarl_rllib.types import WeightManifest
from vlarl_rllib.weights import make_reader


class RawImageProcessor(OpenVLAImageProcessor):
    """Hands frames on as they are; the model normalises them on its own device.

    A frame crosses to the model as [3, S, S] uint8: an eighth of the bytes and 1 % of the time of normalising here.
    Only what vLLM itself asks for while it starts passes here; of a request, `vllm_compat.engine_input` makes the same.
    It stays a subclass because vLLM 0.26 inspects the class of a processor's parts.
    """

    def __call__(self, images: Any = None, **_: object) -> dict[str, object]:
        if images is None or len(images) == 0:
            return {}
        frames = np.stack([np.asarray(image) for image in images])
        return {"pixel_values": torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()}


class RawProcessingInfo(in_tree.OpenVLAProcessingInfo):
    """What vLLM asks about inputs, answered by our configuration: any image and patch size."""

    def __init__(self, ctx: Any) -> None:
        self._own = OpenVLAConfig.from_pretrained(ctx.model_config.model)
        super().__init__(ctx)
        self.hf_processor.image_processor = RawImageProcessor(image_size=self._own.image_size)

    def get_hf_config(self) -> Any:
        config = super().get_hf_config()
        # vLLM's default, 32000, lies outside a small vocabulary, and the id does reach the embedding.
        config.image_token_index = self._own.image_token_index
        return config

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        return self._own.num_patches

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Any) -> dict[str, int]:
        return {"image": self._own.num_patches}


@MULTIMODAL_REGISTRY.register_processor(
    in_tree.OpenVLAMultiModalProcessor,
    info=RawProcessingInfo,
    dummy_inputs=in_tree.OpenVLADummyInputsBuilder,
)
class VlarlOpenVLA(in_tree.OpenVLAForActionPrediction):
    """OpenVLA that samples action tokens and nothing else; parameter names are the published ones."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        own = OpenVLAConfig.from_pretrained(vllm_config.model_config.model)
        vllm_config.model_config.hf_config.image_token_index = own.image_token_index
        with vision_backbone_from(lambda: PrismaticVisionBackbone(own)):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._action_ids = own.action_token_ids
        self._vocab_size = own.text_config.vocab_size

    def embed_multimodal(self, **kwargs: Any) -> Tensor | list[Tensor]:
        """Patch embeddings [images, P, D] of `pixel_values` [images, 3, S, S] uint8."""
        pixel_values = kwargs.get("pixel_values")
        if pixel_values is None:
            return []
        return self.projector(self.vision_backbone(pixel_values))

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Logits [N, vocabulary] float32, -inf at all but the 256 action ids, which alone go through the LM head.

        It takes the place of `allowed_token_ids`, of which vLLM would keep, copy and apply a list per request.
        """
        ids = slice(self._action_ids.start, self._action_ids.stop)
        lm_head: Any = self.language_model.lm_head
        logits = hidden_states.new_full((len(hidden_states), self._vocab_size), -torch.inf, dtype=torch.float32)
        logits[:, ids] = F.linear(hidden_states, lm_head.weight[ids]).float()
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take tensors under their published names; vLLM fuses q, k, v and gate, up itself."""
        return AutoWeightsLoader(self).load_weights(weights)


class ManifestTransferEngine(LayerwiseTransferEngine):
    """Loads one published version, bucket by bucket, through the transport that its manifest names."""

    def receive_weights(self, update_info: UpdateInfo) -> None:
        manifest = WeightManifest(**update_info.manifest)
        model: Any = self.model
        for bucket in make_reader(manifest.transport).buckets(manifest):
            model.load_weights(iter(bucket.items()))
