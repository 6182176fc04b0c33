"""What every engine offers, whichever library samples. No vLLM, no Ray, no torch here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from vlarl_rllib.models.family import ActionFormat
from vlarl_rllib.models.presets import resolve_model
from vlarl_rllib.types import SampleReply, SampleRequest, Site

MAX_PROMPT_TOKENS = 128
"""Text tokens of the longest prompt an engine makes room for; LIBERO's longest has 38 with Llama's tokenizer."""
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0
"""vLLM raises smaller temperatures to 0.01 without saying so in the reply, and refuses larger ones."""
MAX_SEED = 2**63 - 1
"""Seeds travel as signed 64-bit integers."""
LOG_PROB_TOLERANCE = 1e-4
"""How far above 0 rounding may lift the log-probability of a near-certain token."""


NOT_FINITE = "the weights may not be finite"
"""In the text of an `EngineError` that another engine would raise too."""


class EngineError(RuntimeError):
    """The engine cannot answer any more: it is to be killed, replaced and given the current weights."""


def as_engine_error(error: BaseException) -> EngineError:
    """One line that survives pickling, whatever a model raised."""
    if isinstance(error, EngineError):
        return error
    lines = str(error).strip().splitlines()
    return EngineError(f"{type(error).__name__}: {lines[0] if lines else 'no message'}")


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """All that an engine needs to start; picklable."""

    model_path: str
    """Checkpoint directory, preset or hub id; see `here`."""
    family: str
    """Of the policy; see `models.family.load_family`."""
    dtype: str
    """"float32" or "bfloat16"."""
    gpus: float
    """GPUs of this engine; 0 = CPU. A fraction shares the device."""
    max_batch: int
    """Sequences in flight at once; more wait in the engine's queue."""
    enforce_eager: bool
    """No CUDA graphs. The CPU is always eager."""
    mix_calls: bool
    """Whether requests of several calls share a batch.

    False = each call is a batch of its own, so that its rounding does not depend on timing.
    """
    seed: int
    values: bool = False
    """Whether replies carry values: the policy has its value head, which weights then travel with."""
    quantization: str | None = None
    """`engines.quantization`."""
    run: str = "vlarl"
    """What the run is called, on Ray's dashboard and in metrics."""
    suite: str = ""
    """What its environments are called in metrics."""
    transport: str = "auto"
    """`weights.transport`."""

    def here(self) -> EngineSpec:
        """The same with the directory that the model has on this node."""
        return replace(self, model_path=resolve_model(self.model_path))


@dataclass(frozen=True, slots=True)
class EngineStatus:
    policy_version: int
    """Version of the weights in use; `INITIAL_VERSION` = as loaded from the checkpoint, `HALF_LOADED` = none."""
    pid: int
    device: str
    library: str
    """For example "vllm 0.32.0"."""
    num_parameters: int
    num_decisions: int
    """Decisions sampled since the engine started."""
    busy_seconds: float
    """Time in which at least one request was in the model, since the engine started."""
    place: Site = field(default_factory=Site)


class Engine(Protocol):
    """One sampler."""

    def sample(self, requests: Sequence[SampleRequest]) -> list[SampleReply]:
        """One reply per request, in order.

        Raises `EngineError` when the engine is beyond use or has no whole version of the weights, `ValueError` for a
        malformed request.
        """
        ...

    def status(self) -> EngineStatus: ...


def check_requests(requests: Sequence[SampleRequest], image_size: int) -> None:
    """Raise ValueError for the first request that no engine may see.

    Args:
        image_size: side of the policy's square input, in pixels.
    """
    for request in requests:
        image = request.image
        if image.dtype != np.uint8 or image.shape != (image_size, image_size, 3):
            raise ValueError(
                f"image is {image.dtype} {list(image.shape)}; the policy takes uint8 [{image_size}, {image_size}, 3]"
            )
        if not isinstance(request.instruction, str) or not request.instruction.strip():
            raise ValueError(f"instruction={request.instruction!r} must be a text")
        if request.temperature != 0 and not MIN_TEMPERATURE <= request.temperature <= MAX_TEMPERATURE:
            raise ValueError(
                f"temperature={request.temperature} must be 0 (greedy) or in [{MIN_TEMPERATURE}, {MAX_TEMPERATURE}]"
            )
        if not 0 <= request.seed <= MAX_SEED:
            raise ValueError(f"seed={request.seed} must be in [0, {MAX_SEED}]")


def checked_reply(
    token_ids: Sequence[int],
    log_probs: Sequence[float],
    actions: ActionFormat,
    policy_version: int,
    value: float | None = None,
) -> SampleReply:
    """Build a reply from what the sampler returned.

    Raises EngineError unless these are a decision's action tokens with log-probabilities, and a value that is a number
    where there is one: anything else would be decoded as full-speed actions or poison the update.
    """
    if len(token_ids) != actions.num_tokens or len(log_probs) != actions.num_tokens:
        raise EngineError(f"the engine sampled {len(token_ids)} tokens, a decision has {actions.num_tokens}")
    for token_id, log_prob in zip(token_ids, log_probs, strict=True):
        if token_id not in actions.token_ids:
            raise EngineError(f"the engine sampled id {token_id}, which is not an action token {actions.token_ids}")
        if not (math.isfinite(log_prob) and log_prob <= LOG_PROB_TOLERANCE):
            raise EngineError(f"the engine reported log-probability {log_prob}; {NOT_FINITE}")
    if value is not None and not math.isfinite(value):
        raise EngineError(f"the engine reported value {value}; {NOT_FINITE}")
    return SampleReply(
        tokens=np.asarray(token_ids, dtype=np.int64),
        log_probs=np.asarray(log_probs, dtype=np.float32),
        policy_version=policy_version,
        value=value,
    )
