"""vLLM inside this process, one step at a time. Everything here runs in the engine's loop thread.

Importing this imports vLLM.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlarl_rllib.engines.protocol import EngineError, EngineSpec
from vlarl_rllib.engines.step_loop import Sampled
from vlarl_rllib.engines.vllm import compat as vllm_compat
from vlarl_rllib.engines.vllm.plugin import TRANSFER_BACKEND, architecture_of, register
from vlarl_rllib.engines.vllm.prompt_values import PromptValues
from vlarl_rllib.models.family import load_family
from vlarl_rllib.types import SampleRequest


class VLLMStepper:
    """Admits requests to vLLM and collects what has finished. After any exception the object is beyond use."""

    def __init__(self, spec: EngineSpec) -> None:
        family = load_family(spec.family)
        assert family.vllm_model is not None, "asked for by `make_stepper`"
        register(in_process=family.vllm_model)
        config = family.load_config(spec.model_path)
        num_tokens = family.read_facts(spec.model_path).actions.num_tokens
        self._processor = family.processor(spec.model_path)
        architecture = architecture_of(family.vllm_model)
        self._engine = vllm_compat.build_engine(spec, config, num_tokens, architecture, TRANSFER_BACKEND)
        image_ids = [config.image_token_index] * config.num_patches
        self._admission = vllm_compat.Admission(self._engine, num_tokens, image_ids)
        self._values = PromptValues(self._engine) if spec.values else None
        self.device = vllm_compat.device_name()
        self.library = vllm_compat.library_version()

    def add(self, request_id: str, request: SampleRequest) -> None:
        """Queue one checked request."""
        self._admission.add(request_id, request, self._processor.prompt_ids(request.instruction))

    def step(self) -> list[Sampled]:
        """One forward pass for everything in flight; returns what it finished."""
        finished = []
        for output in self._engine.step():
            if not output.finished:
                continue
            value = None if self._values is None else self._values.take(output.request_id)
            completion: Any = output.outputs[0]  # type: ignore[index]
            token_ids = list(completion.token_ids)
            if completion.logprobs is None or len(completion.logprobs) != len(token_ids):
                raise EngineError("vLLM returned tokens without their log-probabilities")
            log_probs = [entry[token].logprob for token, entry in zip(token_ids, completion.logprobs, strict=True)]
            finished.append(Sampled(output.request_id, token_ids, log_probs, value))
        return finished

    def begin_load(self) -> None:
        """See `Stepper.begin_load`."""
        vllm_compat.begin_weights(self._engine)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """See `Stepper.load`."""
        vllm_compat.load_weights(self._engine, tensors)

    def end_load(self) -> None:
        """See `Stepper.end_load`."""
        vllm_compat.end_weights(self._engine)
