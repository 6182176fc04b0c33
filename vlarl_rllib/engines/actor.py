"""A sampler made to be wrapped by `ray.remote`: all callers' requests share its batches. It samples with vLLM, or with
the model itself where the family has none for vLLM.

    options = {"runtime_env": {"env_vars": engine_env_vars(spec)}}
    actor = ray.remote(EngineActor).options(**options).remote(spec, "my_run/engine-0")
    replies = ray.get(actor.sample.remote(requests))

Importing this imports neither vLLM nor torch. The process that runs it must not also train: vLLM for CPUs replaces
parts of torch when it starts.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from vlarl_rllib.engines.protocol import MAX_PROMPT_TOKENS, EngineSpec, EngineStatus, check_requests
from vlarl_rllib.engines.step_loop import StepLoop, Stepper
from vlarl_rllib.engines.telemetry import watch_loop
from vlarl_rllib.engines.weight_update import WeightUpdate
from vlarl_rllib.models.family import load_family
from vlarl_rllib.process.malloc import KEEP_FREED_MEMORY
from vlarl_rllib.telemetry.recorder import Telemetry
from vlarl_rllib.types import SampleReply, SampleRequest, WeightBucket, WeightManifest

if TYPE_CHECKING:
    from vlarl_rllib.weights.protocol import Shapes


def engine_env_vars(spec: EngineSpec) -> dict[str, str]:
    """Environment of an engine's process; it must be set before the process imports torch."""
    variables = {
        # Two threads on two busy cores were ten times slower than one; a GPU engine needs none.
        "OMP_NUM_THREADS": "1",
        # vLLM in the actor's own process: half the memory, no second start-up, and nothing that outlives the actor.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if spec.dtype == "float32":
        # Triton's matrix products round float32 to TF32 by default: log-probs would be 1e-3 off the learner's.
        variables["TRITON_F32_DEFAULT"] = "ieee"
    if spec.values:
        # `PromptValues` reads the batch of the first model runner; the second one keeps none.
        variables["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    if spec.gpus == 0:
        # Without a compiler pass the first request saves seconds of g++; on a GPU, CUDA graphs need dynamo.
        variables |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"} | KEEP_FREED_MEMORY
    return variables


class EngineActor:
    """One engine. Its methods are coroutines; `EngineError` from any of them means that it is beyond use.

    Args:
        spec: model, device and sizes.
        name: how logs and Ray's dashboard call it.

    Raises:
        EngineError: the sampler did not start.
    """

    def __init__(self, spec: EngineSpec, name: str = "vlarl/engine-0") -> None:
        from vlarl_rllib.weights.ray_transports import tensor_transport_options
        from vlarl_rllib.weights.source import expected_tensors

        self._name, spec = name, spec.here()
        family = load_family(spec.family)
        facts = family.read_facts(spec.model_path)
        self._image_size = facts.image_size
        self._processor = family.processor(spec.model_path)
        model: Any = family.without_memory(spec.model_path)
        if spec.values:
            model.add_value_head(spec.seed)
        self._expected: Shapes = expected_tensors(model, value_head=spec.values)
        self._loop = StepLoop(
            partial(make_stepper, spec), facts.actions, name, mix_calls=spec.mix_calls, enough=-(-spec.max_batch // 2)
        )
        self._update = WeightUpdate.closed()
        self._takes_part = bool(tensor_transport_options(spec.gpus, spec.transport))
        self._telemetry = Telemetry(spec.run, spec.suite, name.rpartition("/")[2])
        watch_loop(self._telemetry, self._loop, facts.actions)

    def __repr__(self) -> str:
        return self._name

    async def sample(self, requests: Sequence[SampleRequest]) -> list[SampleReply]:
        """See `Engine.sample`. Malformed requests never reach the model, where an exception is the engine's end."""
        check_requests(requests, self._image_size)
        for request in requests:
            length = len(self._processor.prompt_ids(request.instruction))
            if length > MAX_PROMPT_TOKENS:
                raise ValueError(
                    f"the prompt has {length} tokens, at most {MAX_PROMPT_TOKENS} fit: {request.instruction[:80]!r}..."
                )
        return await asyncio.wrap_future(self._loop.sample(requests))

    async def begin_update(self, manifest: WeightManifest) -> None:
        """A version is to come; what is under way is finished on the old one, and newer requests wait.

        Raises ValueError where names or shapes are not exactly the model's own: the model was not touched.
        """
        from vlarl_rllib.weights.receiver import Receiver

        receiver = Receiver(manifest, self._expected, self._loop.device)
        self._update = self._loop.update(manifest.version, receiver.fetch)

    async def feed(self, bucket: WeightBucket) -> None:
        """Load a bucket; answers once nothing of it is read any more.

        Raises:
            TransferError: it is gone or damaged; the engine samples from nothing until it has a whole version.
            EngineError: the model could not load it, and the engine is beyond use.
        """
        await asyncio.wrap_future(self._update.feed(bucket))

    async def end_update(self) -> int:
        """That was the last bucket; the version now in use. Raises as `feed`."""
        return await asyncio.wrap_future(self._update.end())

    async def abort_update(self, why: str) -> None:
        """Nothing more comes of the version that has begun."""
        self._update.abort(why)

    async def follow_run(self, run: str, suite: str) -> None:
        """Tell metrics as this run's from now on."""
        self._telemetry.follow(run, suite)

    async def ping(self) -> EngineStatus:
        """`status`, once the model's own thread has answered between two steps: a hung or dead engine does not."""
        await asyncio.wrap_future(self._loop.probe())
        return await self.status()

    async def status(self) -> EngineStatus:
        """See `Engine.status`; answers also while the model hangs."""
        from vlarl_rllib.weights.placement import own_place

        return EngineStatus(
            policy_version=self._loop.policy_version,
            pid=os.getpid(),
            device=self._loop.device,
            library=self._loop.library,
            num_parameters=sum(math.prod(shape) for shape in self._expected.values()),
            num_decisions=self._loop.num_decisions,
            busy_seconds=self._loop.busy_seconds,
            place=own_place(self._loop.device, takes_part=self._takes_part),
        )


def make_stepper(spec: EngineSpec) -> Stepper:
    """The model that an engine's thread drives."""
    if load_family(spec.family).vllm_model is None:
        from vlarl_rllib.engines.torch_engine import TorchStepper

        return TorchStepper(spec)
    from vlarl_rllib.engines.vllm.stepper import VLLMStepper

    return VLLMStepper(spec)
