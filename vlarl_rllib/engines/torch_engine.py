"""The policy itself as a sampler: no vLLM, no Ray, one batch at a time.

It is the oracle of the engine tests, what `engines.num: 0` samples with, and what engine actors run where the family
has no model for vLLM.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import torch
import transformers
from torch import Tensor

from vlarl_rllib.engines.protocol import EngineError, EngineSpec, EngineStatus, check_requests, checked_reply
from vlarl_rllib.engines.recorded_passes import RecordedPasses
from vlarl_rllib.engines.step_loop import NO_WHOLE_VERSION, Sampled
from vlarl_rllib.models.family import load_family
from vlarl_rllib.models.replay import GraphCapture
from vlarl_rllib.types import HALF_LOADED, INITIAL_VERSION, SampleReply, SampleRequest, WeightManifest
from vlarl_rllib.weights.protocol import TransferError
from vlarl_rllib.weights.receiver import Receiver
from vlarl_rllib.weights.source import expected_tensors

NO_VALUES = "the policy's sample_action_tokens gives no values; set training.values to learner, or have it give them"


class TorchEngine:
    """See `Engine`. Not for several threads at once; `LocalSampler` takes care of that.

    Attributes:
        policy_version: of the weights in use.
        max_batch: sequences of one forward pass.
        mix_calls: see `EngineSpec.mix_calls`; for `LocalSampler`.
        actions: what a reply is.
        expected: names and shapes of its tensors.
        num_decisions, busy_seconds: see `EngineStatus`.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self.policy_version = INITIAL_VERSION
        self.max_batch, self.mix_calls = spec.max_batch, spec.mix_calls
        self._device = torch.device("cuda" if spec.gpus else "cpu")
        family = load_family(spec.family)
        self._facts = family.read_facts(spec.model_path)
        self._model = family.load(spec.model_path, dtype=getattr(torch, spec.dtype))
        if spec.values:
            self._model.add_value_head(spec.seed)
        self._with_values = spec.values
        self._model.to(self._device).eval()
        self._parameters = dict(self._model.named_parameters())
        self.expected, self._base = expected_tensors(self._model, value_head=spec.values), ""
        self._processor = family.processor(spec.model_path)
        self.actions = self._facts.actions
        records = spec.gpus and self.actions.parallel and not spec.enforce_eager
        self._recorded = RecordedPasses(self._model, spec.max_batch, GraphCapture()) if records else None
        self.num_decisions = 0
        self.busy_seconds = 0.0

    def check(self, requests: Sequence[SampleRequest]) -> None:
        """Raise ValueError for the first malformed request."""
        check_requests(requests, self._facts.image_size)

    def sample(self, requests: Sequence[SampleRequest]) -> list[SampleReply]:
        """See `Engine.sample`."""
        self.check(requests)
        if self.policy_version == HALF_LOADED:
            raise EngineError(NO_WHOLE_VERSION)
        begin = time.perf_counter()
        replies: list[SampleReply] = []
        for start in range(0, len(requests), self.max_batch):
            replies += self._sample_batch(requests[start : start + self.max_batch])
        self.num_decisions += len(replies)
        self.busy_seconds += time.perf_counter() - begin
        return replies

    def load_weights(self, manifest: WeightManifest) -> int:
        """Take a version that is kept; returns it.

        Raises:
            ValueError: names or shapes are not exactly the model's own; it goes on with the weights it has.
            TransferError: the version is gone; so it does.
            EngineError: it went while it was being loaded.
        """
        if manifest.version == self.policy_version:
            return self.policy_version
        receiver, has_begun = Receiver(manifest, self.expected, self._device.type), False
        try:
            for bucket in manifest.buckets:
                if not (bucket.frozen and self._base == manifest.base):
                    tensors, has_begun = receiver.fetch(bucket), True
                    self.load(tensors)
        except TransferError as error:
            if not has_begun:
                raise
            self.policy_version = HALF_LOADED
            raise EngineError(f"the engine may hold weights of two versions: {error}") from error
        self._base, self.policy_version = manifest.base, manifest.version
        return self.policy_version

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Replace some weights; nothing of `tensors` is read once this returns."""
        for name, tensor in tensors.items():
            self._parameters[name].copy_(tensor)
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def status(self) -> EngineStatus:
        """See `Engine.status`."""
        return EngineStatus(
            policy_version=self.policy_version,
            pid=os.getpid(),
            device=self._device.type,
            library=f"transformers {transformers.__version__}",
            num_parameters=sum(parameter.numel() for parameter in self._model.parameters()),
            num_decisions=self.num_decisions,
            busy_seconds=self.busy_seconds,
        )

    def _sample_batch(self, requests: Sequence[SampleRequest]) -> list[SampleReply]:
        inputs = self._processor.raw_inputs(
            [request.image for request in requests], [request.instruction for request in requests]
        )
        moved = {name: tensor.to(self._device) for name, tensor in inputs.items()}
        temperatures = torch.tensor([request.temperature for request in requests], device=self._device)
        seeds = [request.seed for request in requests]
        if self._recorded is None:
            sampled = self._model.sample_action_tokens(**moved, temperatures=temperatures, seeds=seeds)
        else:
            sampled = self._recorded.sample(moved, temperatures, seeds)
        values: list[float | None] = [None] * len(requests)
        if self._with_values:
            if sampled.values is None:
                raise EngineError(NO_VALUES)
            values = sampled.values.tolist()
        return [
            checked_reply(token_row, log_prob_row, self._facts.actions, self.policy_version, value)
            for token_row, log_prob_row, value in zip(
                sampled.tokens.tolist(), sampled.log_probs.tolist(), values, strict=True
            )
        ]


class TorchStepper:
    """The same as a `Stepper`: a step is one batch of what waits."""

    def __init__(self, spec: EngineSpec) -> None:
        self._engine = TorchEngine(spec)
        self._waiting: dict[str, SampleRequest] = {}
        status = self._engine.status()
        self.device, self.library = status.device, status.library

    def add(self, request_id: str, request: SampleRequest) -> None:
        """Queue one checked request."""
        self._waiting[request_id] = request

    def step(self) -> list[Sampled]:
        """Sample as many as fit into a batch."""
        chosen = list(self._waiting)[: self._engine.max_batch]
        replies = self._engine.sample([self._waiting.pop(request_id) for request_id in chosen])
        return [
            Sampled(request_id, reply.tokens.tolist(), reply.log_probs.tolist(), reply.value)
            for request_id, reply in zip(chosen, replies, strict=True)
        ]

    def begin_load(self) -> None:
        """See `Stepper.begin_load`."""

    def load(self, tensors: dict[str, Tensor]) -> None:
        """See `Stepper.load`."""
        self._engine.load(tensors)

    def end_load(self) -> None:
        """See `Stepper.end_load`."""
