"""Whether a machine that is described in numbers has room for a plan: bundles on its GPUs, and an estimate of memory.

The estimate is arithmetic with a few numbers that were measured with 7B weights (docs/adapters_and_export.md); it came
out 4 % above the card's 74.9 GB there. It says what is hopeless and what is near the edge, no more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vlarl_rllib.envs import registry
from vlarl_rllib.models.family import PolicyFamily, family_of, load_family
from vlarl_rllib.models.files import weight_facts
from vlarl_rllib.models.presets import presets
from vlarl_rllib.settings import RuntimeArgs, Settings
from vlarl_rllib.settings.plan import Bundle, Role
from vlarl_rllib.settings.published import published_model

BYTES = {"float32": 4, "bfloat16": 2}
TRAINED_BYTES = 16
"""Of a trained parameter: float32 master, gradient, and AdamW's two moments."""
ADAPTER_SHARE = 0.0147
"""Adapter parameters of rank 32 to the model's: 110,828,288 / 7,541,237,184."""
QUANTIZED_BYTES = {"8bit": 1.13, "4bit": 0.74}
"""Of a parameter, all of the model together, some of which stay in bfloat16: from the peaks of 49.9, 43.3, 40.4 GB."""
ROW_BYTES = 0.28
"""Activations of one decision of a micro-batch, per parameter of the model: (49.9 - 15.1 - 1.8) GB / 16 / 7.54e9."""
CHECKPOINTED_ROW_BYTES = 0.08
"""The same where activations are computed again; derived, not measured: layer inputs, one layer, the vision towers."""
CONTEXT_BYTES = 1e9
"""CUDA and libraries of one process."""
WORKSPACE_BYTES = 0.8
"""CUDA graphs and scratch space of an engine, per parameter: what was left of 74.9 GB."""
PROCESS_GB, FURTHER_MODEL_GB = 1.03, 0.68
"""Host memory of an environment process of LIBERO with one model, and of each further one (README, Measured)."""
BUCKETS = 2
"""Of weights that are in Ray's object store during a sync: one is loaded while the next is gathered."""


@dataclass(frozen=True)
class Machine:
    """Resources as somebody states them; GB are 1e9 bytes."""

    cpus: float
    gpus: int
    memory_gb: float
    gpu_memory_gb: float


@dataclass
class Card:
    """One GPU and who is on it."""

    roles: list[Role] = field(default_factory=list)
    free: float = 1.0


def place(plan: RuntimeArgs, gpus: int) -> tuple[list[Card], list[Bundle]]:
    """Put the bundles on GPUs as Ray does, each where it leaves the least free; the cards, and what found no place."""
    cards, left = [Card() for _ in range(gpus)], []
    for bundle in plan.bundles:
        share = bundle.resources.get("GPU", 0.0)
        if not share:
            continue
        count, part = (int(share), 1.0) if share >= 1 else (1, share)
        room = sorted((card for card in cards if card.free >= part - 1e-4), key=lambda card: card.free)[:count]
        if len(room) < count or share > count:
            left.append(bundle)
            continue
        for card in room:
            card.free -= part
            card.roles.append(bundle.role)
    return cards, left


@dataclass(frozen=True)
class Estimate:
    """Of the memory of one actor on its GPU, in GB; None where the size of the model is not known."""

    engine: float | None
    learner: float | None

    def of(self, card: Card) -> float | None:
        """All that is on a card."""
        known = {Role.ENGINE: self.engine, Role.LEARNER: self.learner, Role.ALGORITHM: self.learner}
        amounts = [known.get(role, 0.0) for role in card.roles]
        return None if None in amounts else sum(amount or 0.0 for amount in amounts)


def estimate(settings: Settings, plan: RuntimeArgs) -> Estimate:
    """GPU memory of an engine and of a learner."""
    size = num_parameters(settings)
    if size is None:
        return Estimate(None, None)
    engines, learners, model = settings.engines, settings.learners, settings.model
    published = published_model(model.path)
    cache = _family(settings).cache_bytes(None if published else model.path, engines.dtype)
    engine = size * (BYTES[engines.dtype] + WORKSPACE_BYTES) + engines.max_batch * cache + CONTEXT_BYTES
    trained = size * ADAPTER_SHARE * model.lora.rank / 32 if model.lora else float(size)
    frozen = size * (QUANTIZED_BYTES[model.quantization] if model.quantization else BYTES[model.dtype])
    kept = trained * TRAINED_BYTES + (frozen if model.lora else 0.0)
    kept *= 2 if model.critic == "separate" else 1
    shards = plan.mesh[1] or 1
    row = CHECKPOINTED_ROW_BYTES if learners.fsdp.checkpoint_activations else ROW_BYTES
    of_type = BYTES[model.dtype] / 2  # the measured ones are bfloat16's
    activations = learners.micro_batch_size * row * of_type * size
    learner = (0.0 if learners.fsdp.cpu_offload else kept / shards) + activations + CONTEXT_BYTES
    return Estimate(engine / 1e9, learner / 1e9)


def host_gb(settings: Settings, plan: RuntimeArgs) -> float:
    """Memory that the environments and the weights in transit take at least, in GB."""
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
    return settings.rollout.num_runners * plan.num_processes * each + travelling


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
    found = []
    cards, left = place(plan, machine.gpus)
    if left:
        names = ", ".join(f"{bundle.role.value} ({bundle.resources['GPU']:g} GPU)" for bundle in left)
        found.append(f"resources: no place on {machine.gpus} GPU(s) for {names}; lower engines.* or learners.*")
    each = estimate(settings, plan)
    for number, card in enumerate(cards):
        if (needed := each.of(card)) is not None and needed > machine.gpu_memory_gb:
            found.append(
                f"memory: about {needed:.0f} GB on GPU {number} of {machine.gpu_memory_gb:g}; lower "
                "learners.micro_batch_size or engines.max_batch, or set learners.fsdp.checkpoint_activations"
            )
    if (host := host_gb(settings, plan)) > machine.memory_gb:
        found.append(
            f"memory: environments and weights in transit take {host:.0f} GB or more of {machine.memory_gb:g}; lower "
            "env.num_processes"
        )
    return found


def num_parameters(settings: Settings) -> int | None:
    """Of the model; None for one that is not there yet."""
    path = settings.model.path
    if published := published_model(path):
        return published.num_parameters
    return weight_facts(Path(path)).num_parameters if Path(path).is_dir() and path not in presets() else None


def _family(settings: Settings) -> PolicyFamily:
    published = published_model(settings.model.path)
    return load_family(published.family) if published else family_of(settings.model.path, settings.model.family)
