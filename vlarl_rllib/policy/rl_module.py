"""The policy as an RLModule.

RLlib reads weights from one learner and ships them as numpy, which a sharded bfloat16 policy cannot survive. So the
state that travels through RLlib is a token naming the weights' version; the weights themselves go from the learners to
the engines (`vlarl_rllib.weights`). In runners the module is a stub: engines sample.
"""

from __future__ import annotations

from typing import Any

from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from vlarl_rllib.settings import ModelSettings

ACTION_LOGITS = "action_logits"
VALUES = "values"
WEIGHTS_VERSION = "weights_version"


class VLARLModule(TorchRLModule, ValueFunctionAPI):
    """Holds the policy as `self.policy` in learners, None in runners, and a separate critic as `self.critic` where
    there is one.

    `model_config` is `{"model": the settings' model section, "seed": the run's, "device": where quantised weights go}`.
    """

    framework = "torch"

    def setup(self) -> None:
        self.weights_version = 0
        self.policy: Any = None
        self.critic: nn.Module | None = None
        if self.inference_only:
            return
        from vlarl_rllib.models.build import build_models

        model = ModelSettings.model_validate(self.model_config["model"])
        self.policy, self.critic = build_models(model, self.model_config["seed"], self.model_config["device"])

    @property
    def sharded_models(self) -> list[nn.Module]:
        """What FSDP shards, each on its own."""
        return [self.policy] if self.critic is None else [self.policy, self.critic]

    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        """Teacher-forced pass over `input_ids, attention_mask, pixel_values, action_tokens`.

        Returns `action_logits` [N, A, V] float32 and `values` [N] float32.
        """
        output = self._ask(self.policy, batch)
        return {
            ACTION_LOGITS: output.action_logits,
            VALUES: output.values if self.critic is None else self.compute_values(batch),
        }

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Tensor:
        """[N] float32 values of the observations in `batch` (keys as in training).

        Raises RuntimeError in runners, which have no weights.
        """
        if self.critic is None:
            return self._ask(self.policy, batch).values
        return self._ask(self.critic, {name: batch[name] for name in batch if name != "action_tokens"}).values

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        raise RuntimeError(
            f"VLARLModule got {sorted(batch)} to act on; actions come from the engines, through VLAEnvRunner"
        )

    def _ask(self, model: Any, batch: dict[str, Any]) -> Any:
        if model is None:
            raise RuntimeError(
                "this module has no weights, they are in the learners' processes; build the algorithm with "
                "learners.num 0, or load what vlarl export writes"
            )
        output = model(**batch)
        if isinstance(model, FSDPModule):  # without a backward pass it would stay gathered, and be saved so
            model.reshard()
        return output

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {WEIGHTS_VERSION: self.weights_version}

    def set_state(self, state: dict[str, Any]) -> None:
        self.weights_version = int(state[WEIGHTS_VERSION])


__all__ = ["ACTION_LOGITS", "VALUES", "WEIGHTS_VERSION", "VLARLModule"]
