"""Whether machines that are described in numbers have room for a plan: bundles on GPUs, and an estimate of memory.

The estimate is arithmetic with a few numbers that were measured with 7B weights (docs/doctor.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vlarl_rllib.envs import registry
from vlarl_rllib.models.family import PolicyFamily, family_of, load_family
from vlarl_rllib.models.files import weight_facts
from vlarl_rllib.models.presets import presets
from vlarl_rllib.ray_compat import ClusterNode
from vlarl_rllib.runs.places import impossible_places, lay, on_cards
from vlarl_rllib.settings import RuntimeArgs, Settings, SettingsError
from vlarl_rllib.settings.placement import MEMORY
from vlarl_rllib.settings.plan import Bundle, Role
from vlarl_rllib.settings.published import published_model

BYTES = {"float32": 4, "bfloat16": 2}
TRAINED_BYTES = 16
"""Of a trained parameter: float32 master, gradient, and AdamW's two moments."""
ADAPTER_SHARE = 0.0147
"""Adapter parameters of rank 32 to the model's: 110,828,288 / 7,541,237,184."""
QUANTIZED_BYTES = {"8bit": 1.15, "4bit": 0.77, "fp8": 1.14}
"""Of a parameter, all of the model together, some of which stay in bfloat16."""
DEQUANTIZED_BYTES = 0.1
"""Of a quantised layer's weight as it is multiplied with, per parameter of the model: there is one at a time."""
ROW_BYTES = 0.28
"""Activations of one decision of a micro-batch, per parameter of the model, where they are all kept."""
COMPILED_ROW_BYTES = 0.222
"""The same of compiled blocks."""
FROZEN_TOWERS_SHARE = 0.72
"""Of a row's, where adapters are in the language model alone: 0.159 / 0.222."""
CHECKPOINTED_ROW_BYTES = 0.084
"""The same where those of the language model are computed again."""
CONTEXT_BYTES = 0.8e9
"""CUDA and libraries of one process."""
SLACK = 0.05
"""What a learner's allocator holds and does not use, as a share of the activations."""
SCRATCH_BYTES = 0.0055
"""Of an engine, for each sequence of a batch and parameter of the model: activations of a prompt, graphs of frames."""
RENDERER_GB = 0.59
"""On its GPU, of an environment process that draws there: 2,249 MiB of four."""
PROCESS_GB, FURTHER_MODEL_GB = 1.03, 0.68
"""Host memory of an environment process of LIBERO with one model, and of each further one (README, Measured)."""
BUCKETS = 2
"""Of weights that are in Ray's object store during a sync: one is loaded while the next is gathered."""


BOUNDLESS = 10**9
SAVED_BYTES = 12
"""In a checkpoint, of a trained parameter: float32 master and AdamW's two moments (`learner/checkpoint.py`)."""


@dataclass(frozen=True)
class Machine:
    """Resources as somebody states them; GB are 1e9 bytes."""

    cpus: float
    gpus: int
    memory_gb: float
    gpu_memory_gb: float
    resources: Mapping[str, float] = field(default_factory=dict)
    """Custom ones, of a node of a cluster."""
    labels: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parsed(cls, text: str, gpu_memory_gb: float) -> Machine:
        """From `cpus=64,gpus=8,memory=512,gpu-memory=80,farm=4,zone=a`: a number of another name is a custom resource,
        a word is a label. Raises `SettingsError`."""
        amounts, words = {"gpus": 0.0, "gpu-memory": gpu_memory_gb}, {}
        for part in text.split(","):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if not (name and equals and value):
                raise SettingsError(f"--node {text}: {part.strip()!r} is no name=value; write cpus=64,memory=256")
            try:
                amounts[name] = float(value)
            except ValueError:
                words[name] = value
        for name in ("cpus", "memory"):
            if not 0 < amounts.get(name, 0.0) < BOUNDLESS:
                raise SettingsError(f"--node {text}: {name} is missing, or no amount; write cpus=64,memory=256 (GB)")
        if not amounts["gpus"].is_integer() or not 0 <= amounts["gpus"] < BOUNDLESS:
            raise SettingsError(f"--node {text}: gpus={amounts['gpus']:g} is no number of GPUs; write gpus=8")
        cpus, gpus, memory, gpu_memory = (amounts.pop(name) for name in ("cpus", "gpus", "memory", "gpu-memory"))
        return cls(cpus, int(gpus), memory, gpu_memory, amounts, words)

    def node(self, number: int) -> ClusterNode:
        """As Ray would see it, with nothing on it."""
        total = {"CPU": self.cpus, "GPU": float(self.gpus), MEMORY: self.memory_gb * 1e9, **self.resources}
        return ClusterNode(str(number), f"node {number}", total, dict(total), dict(self.labels))


def place(plan: RuntimeArgs, gpus: int) -> tuple[list[list[Role]], list[Bundle]]:
    """Who is on each GPU, and what found no place."""
    cards, left = on_cards(plan.bundles, [1.0] * gpus)
    return [[plan.bundles[place].role for place in card] for card in cards], [plan.bundles[place] for place in left]


@dataclass(frozen=True)
class Estimate:
    """Of the memory of one actor on its GPU, in GB by part; None where the size of the model is not known."""

    engine_parts: Mapping[str, float] | None
    learner_parts: Mapping[str, float] | None
    checkpoint: float | None
    """GB on a disk."""

    @property
    def engine(self) -> float | None:
        return None if self.engine_parts is None else sum(self.engine_parts.values())

    @property
    def learner(self) -> float | None:
        return None if self.learner_parts is None else sum(self.learner_parts.values())

    def of(self, roles: Iterable[Role]) -> float | None:
        """All that is on a GPU."""
        known = {Role.ENGINE: self.engine, Role.LEARNER: self.learner, Role.ALGORITHM: self.learner}
        amounts = [known.get(role, 0.0) for role in roles]
        return None if None in amounts else sum(amount or 0.0 for amount in amounts)


def estimate(settings: Settings, plan: RuntimeArgs) -> Estimate:
    """GPU memory of an engine and of a learner, and what a checkpoint takes."""
    size = num_parameters(settings)
    if size is None:
        return Estimate(None, None, None)
    policies = 2 if settings.model.critic == "separate" else 1
    trained = _trained(settings, size)
    return Estimate(
        _in_gb(_engine_parts(settings, plan, size)),
        _in_gb(_learner_parts(settings, plan, size)),
        policies * trained * SAVED_BYTES / 1e9,
    )


def _trained(settings: Settings, size: int) -> float:
    lora = settings.model.lora
    return size * ADAPTER_SHARE * lora.rank / 32 if lora else float(size)


def _engine_parts(settings: Settings, plan: RuntimeArgs, size: int) -> dict[str, float]:
    engines, path = settings.engines, settings.model.path
    cache = _family(settings).cache_bytes(None if published_model(path) else path, engines.dtype)
    element = QUANTIZED_BYTES[engines.quantization] if engines.quantization else BYTES[engines.dtype]
    return {
        "weights": size * element,
        "cache": plan.engine_batch * cache,
        "scratch": plan.engine_batch * SCRATCH_BYTES * size * BYTES[engines.dtype] / 2,
        "CUDA": CONTEXT_BYTES,
    }


def _learner_parts(settings: Settings, plan: RuntimeArgs, size: int) -> dict[str, float]:
    learners, model = settings.learners, settings.model
    policies = 2 if model.critic == "separate" else 1
    held = 0.0 if learners.fsdp.cpu_offload else policies / (plan.mesh[1] or 1)
    frozen = QUANTIZED_BYTES[model.quantization] if model.quantization else BYTES[model.dtype]
    parts = {
        "frozen weights": held * size * frozen if model.lora else 0.0,
        "a layer's weights": size * DEQUANTIZED_BYTES if model.quantization else 0.0,
        "weights merged ahead": policies * size * BYTES[model.dtype] if settings.merge_ahead else 0.0,
        "masters, gradients, AdamW": held * _trained(settings, size) * TRAINED_BYTES,
        "activations": learners.micro_batch_size * size * _row_bytes(settings),
        "CUDA": CONTEXT_BYTES,
    }
    return parts | {"allocator": SLACK * parts["activations"]}


def _row_bytes(settings: Settings) -> float:
    """Of the activations of one decision of a micro-batch, per parameter of the model."""
    learners, model = settings.learners, settings.model
    row = ROW_BYTES
    if learners.fsdp.checkpoint_activations:
        row = CHECKPOINTED_ROW_BYTES
    elif settings.compiles:
        row = COMPILED_ROW_BYTES * _kept(learners.activation_memory_budget)
    if model.lora and model.lora.targets == "language_model":
        row *= FROZEN_TOWERS_SHARE
    return row * BYTES[model.dtype] / 2  # the measured ones are bfloat16's


def _kept(budget: float) -> float:
    """Share of a compiled block's activations that are kept under `learners.activation_memory_budget`. A third of them
    costs so little to compute again that a budget just below 1 spares it."""
    return budget if budget in (0, 1) else min(budget, 0.25 + budget / 2)


def _in_gb(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: amount / 1e9 for name, amount in parts.items() if amount}


def host_gb(settings: Settings, plan: RuntimeArgs) -> float:
    """Memory that the environments and the weights in transit take at least on the machine of these bundles, in GB."""
    env = settings.env
    tasks = max(len(set(tasks)) for tasks in plan.slot_tasks)
    models = min(env.models_per_process, -(-tasks // plan.num_processes))
    facts = registry.ENVIRONMENTS.get(env.name)
    each = PROCESS_GB + (models - 1) * FURTHER_MODEL_GB if facts and facts.crops else 0.0
    version = (num_parameters(settings) or 0) * BYTES[settings.engines.dtype] / 1e9
    buckets = BUCKETS * settings.weights.bucket_mb * 2**20 / 1e9
    # A version that is kept goes when the next one is complete; on GPUs it may lie on the card, which is not known yet.
    keeps = settings.rollout.async_mode or not settings.engines.num
    travelling = 2 * version if keeps else min(buckets, version)
    roles = [bundle.role for bundle in plan.bundles]
    ends = {
        Role.ENGINE if settings.engines.num else Role.RUNNER,
        Role.LEARNER if settings.learners.num else Role.ALGORITHM,
    }
    passing = travelling if ends & set(roles) else 0.0
    return roles.count(Role.RUNNER) * plan.num_processes * each + passing


def too_few_cpus(plan: RuntimeArgs, machine: Machine) -> str | None:
    """What follows where the plan reserves more CPUs than there are; None where it does not."""
    if plan.total_cpus <= machine.cpus:
        return None
    return (
        f"resources: the plan reserves {plan.total_cpus:g} CPUs of {machine.cpus:g}: a Ray that vlarl train starts is "
        "told that there are as many, a cluster refuses; lower rollout.cpus_per_runner, engines.cpus or learners.cpus"
    )


def problems(settings: Settings, plan: RuntimeArgs, machine: Machine) -> list[str]:
    """Why the plan has no room on the machine, a line each."""
    boundless = replace(machine, cpus=BOUNDLESS, gpus=BOUNDLESS).node(1)
    found = [*impossible_places(plan, [boundless])]  # what no Ray of this machine alone has
    cards, left = place(plan, machine.gpus)
    if left:
        names = ", ".join(f"{bundle.role.value} ({bundle.resources['GPU']:g} GPU)" for bundle in left)
        found.append(f"resources: no place on {machine.gpus} GPU(s) for {names}; lower engines.* or learners.*")
    return [*found, *_memory_problems(settings, plan, machine, cards)]


def rendering_gb(settings: Settings, plan: RuntimeArgs, gpus: int) -> float:
    """Memory on each of a machine's GPUs of the environments of these bundles that draw there, in GB."""
    facts = registry.ENVIRONMENTS.get(settings.env.name)
    runners = [bundle.role for bundle in plan.bundles].count(Role.RUNNER)
    return RENDERER_GB * runners * plan.num_processes / gpus if facts and facts.crops and gpus else 0.0


def _memory_problems(
    settings: Settings, plan: RuntimeArgs, machine: Machine, cards: Sequence[Sequence[Role]], of: str = ""
) -> Iterator[str]:
    each, drawn = estimate(settings, plan), rendering_gb(settings, plan, machine.gpus)
    for number, card in enumerate(cards):
        if (needed := each.of(card)) is not None and needed + drawn > machine.gpu_memory_gb:
            yield (
                f"memory: about {needed + drawn:.0f} GB on GPU {number}{of} of {machine.gpu_memory_gb:g}; lower "
                "learners.micro_batch_size, learners.activation_memory_budget or engines.max_batch"
            )
    if (host := host_gb(settings, plan)) > machine.memory_gb:
        yield (
            f"memory: environments and weights in transit take {host:.0f} GB or more of {machine.memory_gb:g}{of}; "
            "lower env.num_processes"
        )


# Several machines


def parts_of(plan: RuntimeArgs, machines: Sequence[Machine]) -> list[RuntimeArgs]:
    """The bundles of the plan that are likely to lie on each machine (`places.lay`)."""
    laid = lay(plan, [machine.node(number) for number, machine in enumerate(machines, 1)], free=False)
    return [
        replace(plan, bundles=tuple(b for b, number in zip(plan.bundles, laid, strict=True) if number == this))
        for this in range(len(machines))
    ]


def cluster_problems(settings: Settings, plan: RuntimeArgs, machines: Sequence[Machine]) -> list[str]:
    """Why the plan has no room on a cluster of these machines, a line each."""
    nodes = [machine.node(number) for number, machine in enumerate(machines, 1)]
    found = [*impossible_places(plan, nodes)]
    for number, (machine, part) in enumerate(zip(machines, parts_of(plan, machines), strict=True), 1):
        cards, _ = place(part, machine.gpus)
        found += _memory_problems(settings, part, machine, cards, of=f" of node {number}")
    return found


def mesh_advice(plan: RuntimeArgs, learners_on: Sequence[int]) -> str | None:
    """What to set `learners.fsdp.mesh` to where shards would lie on several nodes.

    Args:
        learners_on: how many learners each node has.
    """
    counts = [count for count in learners_on if count]
    replicas, shards = plan.mesh
    within = math.gcd(*counts) if counts else 0
    if len(counts) < 2 or not shards or all(count % shards == 0 for count in counts):
        return None
    return (
        f"learners.fsdp.mesh: [{replicas}, {shards}] divides the weights over {len(counts)} nodes, so every layer "
        f"crosses the network in each pass; [{sum(counts) // within}, {within}] keeps shards within a node, and takes "
        f"{shards / within:.3g} times the memory for parameters and moments"
    )


def num_parameters(settings: Settings) -> int | None:
    """Of the model; None for one that is not there yet."""
    path = settings.model.path
    if published := published_model(path):
        return published.num_parameters
    return weight_facts(Path(path)).num_parameters if Path(path).is_dir() and path not in presets() else None


def _family(settings: Settings) -> PolicyFamily:
    model = settings.model
    published = published_model(model.path)
    return load_family(published.family) if published else family_of(model.path, model.family_reference)
