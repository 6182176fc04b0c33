"""OpenVLA as an RLModule.

RLlib reads weights from one learner and ships them as numpy, which a sharded bfloat16 policy cannot survive. So the state that
travels through RLlib is a token naming the weights' version; the weights themselves go from the learners to the engines
(`vlarl_rllib.weights`). In runners the module is a stub: engines sample.
"""

from __future__ import annotations

from typing import Any

import torch
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from torch import Tensor

ACTION_LOGITS = "action_logits"
VALUES = "values"
WEIGHTS_VERSION = "weights_version"


class OpenVLARLModule(TorchRLModule, ValueFunctionAPI):
    """Holds the policy as `self.policy` in learners, and nothing in runners.

    `model_config` is `{"path": checkpoint directory or hub id}`.
    """

    framework = "torch"

    def setup(self) -> None:
        self.weights_version = 0
        if self.inference_only:
            return
        from vlarl_rllib.models.openvla import OpenVLAForActionPrediction

        self.policy = OpenVLAForActionPrediction.from_pretrained(self.model_config["path"], dtype=torch.float32)
        self.policy.add_value_head()
        _freeze_unused(self.policy)

    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        """Teacher-forced pass over `input_ids, attention_mask, pixel_values, action_tokens`.

        Returns `action_logits` [N, A, 256] float32 and `values` [N] float32.
        """
        output = self.policy(**batch)
        return {ACTION_LOGITS: output.action_logits, VALUES: output.values}

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Tensor:
        """[N] float32 values of the observations in `batch` (keys as in training)."""
        return self.policy(**batch).values

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        raise RuntimeError(f"OpenVLARLModule got {sorted(batch)} to act on; actions come from the engines, through VLAEnvRunner")

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {WEIGHTS_VERSION: self.weights_version}

    def set_state(self, state: dict[str, Any]) -> None:
        self.weights_version = int(state[WEIGHTS_VERSION])


def _freeze_unused(policy: Any) -> None:
    """Freeze what lies behind the feature block of each tower: published, but read by nothing, so it never gets a gradient."""
    for tower in (policy.vision_backbone.featurizer, policy.vision_backbone.fused_featurizer):
        read = {parameter for block in tower.live_blocks for parameter in block.parameters()}
        for name, parameter in tower.named_parameters():
            if name.startswith(("blocks.", "norm.", "attn_pool.")) and parameter not in read:
                parameter.requires_grad_(False)


__all__ = ["ACTION_LOGITS", "VALUES", "WEIGHTS_VERSION", "OpenVLARLModule"]
