"""What follows from the settings by arithmetic. Pure, but for the number of cores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, NamedTuple

from vlarl_rllib.envs import registry
from vlarl_rllib.settings.placement import MEMORY, RolePlacement, Strategy
from vlarl_rllib.settings.schema import EnvSettings, Sections, chosen_tasks
from vlarl_rllib.types import EnvSpec


class Role(Enum):
    """Whose a bundle is."""

    ALGORITHM = "algorithm"
    RUNNER = "runner"
    LEARNER = "learner"
    REWARD_WORKER = "reward worker"
    ENGINE = "engine"


class Bundle(NamedTuple):
    """What Ray reserves for one actor, and where."""

    role: Role
    resources: dict[str, float]
    """CPU and GPU, and what `placement` adds; without zeros."""
    labels: dict[str, str]
    """Selectors of the node's labels."""

    @property
    def options(self) -> dict[str, Any]:
        """Ray's options, beside those of CPU and GPU, for an actor that gets such a place without a placement group."""
        custom = {kind: amount for kind, amount in self.resources.items() if kind not in ("CPU", "GPU", MEMORY)}
        memory = {MEMORY: self.resources[MEMORY]} if MEMORY in self.resources else {}
        return memory | {"resources": custom, "label_selector": self.labels}


@dataclass(frozen=True, slots=True)
class RuntimeArgs:
    """What follows from the settings by arithmetic; see `calculate_runtime_args`."""

    num_slots: int
    """Slots of all runners."""
    steps_per_iteration: int | None
    """Steps of all slots in one iteration; None where whole episodes are counted."""
    num_minibatches: int | None
    """Minibatches in one epoch; the last one may be smaller. None as above."""
    optimizer_steps: int | None
    """Optimiser steps of one iteration. None as above."""
    micro_batches: int
    """Forward and backward passes of each learner for one full minibatch."""
    engine_batch: int
    """Sequences that an engine makes room for: its share of the slots, within `engines.max_batch`."""
    num_processes: int
    """Environment subprocesses of each runner."""
    mesh: tuple[int, int]
    """[replicas, shards] with -1 resolved."""
    slot_tasks: tuple[tuple[int, ...], ...]
    """For each runner, the task of each of its slots."""
    bundles: tuple[Bundle, ...]
    """One for each actor, in the order of the placement group: RLlib looks for its runners behind the Algorithm."""
    strategy: Strategy | None
    """How Ray lays the bundles onto nodes; None where they are no one placement group."""
    evaluation_episodes: int
    """Episodes of one evaluation: at most one for each held-out (task, start)."""
    demonstrated_tasks: tuple[int, ...]
    """The tasks that `vlarl collect` shows, in turn."""

    @property
    def total_cpus(self) -> float:
        return sum(bundle.resources.get("CPU", 0.0) for bundle in self.bundles)

    @property
    def total_gpus(self) -> float:
        return sum(bundle.resources.get("GPU", 0.0) for bundle in self.bundles)

    def bundle_of(self, role: Role, index: int = 0) -> int:
        """Place in the placement group of this role's bundle `index`, from 0. Raises IndexError where it has fewer."""
        return [place for place, bundle in enumerate(self.bundles) if bundle.role is role][index]

    def only(self, *roles: Role) -> RuntimeArgs:
        """The plan without the bundles of all others, for what runs without an Algorithm: Ray then places each actor by
        itself, and knows of no strategy."""
        return replace(self, bundles=tuple(bundle for bundle in self.bundles if bundle.role in roles), strategy=None)


def calculate_runtime_args(settings: Sections, *, cores: int | None = None) -> RuntimeArgs:
    """Derive sizes and resources. Pure but for the default of `cores`, this machine's."""
    env, rollout, learners = settings.env, settings.rollout, settings.learners
    ranks, num_slots = max(1, learners.num), rollout.num_runners * env.num_envs
    steps = None if rollout.episodes_per_iteration else num_slots * rollout.steps_per_iteration
    minibatches = math.ceil(steps / settings.training.minibatch_size) if steps else None
    return RuntimeArgs(
        num_slots=num_slots,
        steps_per_iteration=steps,
        num_minibatches=minibatches,
        optimizer_steps=minibatches * settings.training.num_epochs if minibatches else None,
        micro_batches=math.ceil(settings.training.minibatch_size / ranks / learners.micro_batch_size),
        engine_batch=min(settings.engines.max_batch, math.ceil(num_slots / max(1, settings.engines.num))),
        num_processes=num_environment_processes(env, cores),
        mesh=resolve_mesh(learners.fsdp.mesh, ranks),
        slot_tasks=_slot_tasks(settings, cores),
        bundles=_bundles(settings),
        strategy=settings.placement.strategy,
        evaluation_episodes=min(settings.evaluation.episodes, _num_held_out_starts(env, settings.task_ids)),
        demonstrated_tasks=tuple(demonstrated_tasks(settings)),
    )


def _bundles(settings: Sections) -> tuple[Bundle, ...]:
    rollout, learners, rewards, engines = settings.rollout, settings.learners, settings.rewards, settings.engines
    alone = not learners.num
    where = placements(settings)
    crews = (
        (Role.ALGORITHM, 1, max(1.0, learners.cpus) if alone else 1.0, learners.gpus if alone else 0.0),
        (Role.RUNNER, rollout.num_runners, rollout.cpus_per_runner, 0.0),
        (Role.LEARNER, learners.num, learners.cpus, learners.gpus),
        (Role.REWARD_WORKER, int(bool(rewards.process)), rewards.judge_cpus, rewards.judge_gpus),
        (Role.ENGINE, engines.num, engines.cpus, engines.gpus),
    )
    return tuple(
        Bundle(
            role,
            {kind: amount for kind, amount in (("CPU", cpus), ("GPU", gpus)) if amount} | where[role].resources,
            dict(where[role].labels),
        )
        for role, num, cpus, gpus in crews
        for _ in range(num)
    )


def placements(settings: Sections) -> dict[Role, RolePlacement]:
    """What `placement` says of each role."""
    placement = settings.placement
    return {
        Role.ALGORITHM: placement.algorithm,
        Role.RUNNER: placement.runners,
        Role.LEARNER: placement.learners,
        Role.REWARD_WORKER: placement.reward_worker,
        Role.ENGINE: placement.engines,
    }


def num_environment_processes(env: EnvSettings, cores: int | None) -> int:
    import psutil

    return min(env.num_envs, env.num_processes or cores or psutil.cpu_count() or 1)


def _slot_tasks(settings: Sections, cores: int | None) -> tuple[tuple[int, ...], ...]:
    """Spread the tasks over runners, then over slots, so that no runner needs more models than its processes may
    hold."""
    tasks, runners = settings.task_ids, settings.rollout.num_runners
    models = min(
        settings.env.num_envs, num_environment_processes(settings.env, cores) * settings.env.models_per_process
    )
    share = min(models, math.ceil(len(tasks) / runners))
    return tuple(
        tuple(tasks[(runner * share + slot % share) % len(tasks)] for slot in range(settings.env.num_envs))
        for runner in range(runners)
    )


def resolve_mesh(mesh: tuple[int, int], ranks: int) -> tuple[int, int]:
    replicas, shards = mesh
    if replicas == -1:
        replicas = ranks // shards if shards else 0
    if shards == -1:
        shards = ranks // replicas if replicas else 0
    return replicas, shards


def demonstrated_tasks(settings: Sections) -> list[int]:
    tasks = settings.collect.tasks
    if tasks is None:
        return settings.task_ids
    return chosen_tasks(None if tasks == "all" else tasks, settings.env)


def num_training_starts(settings: Sections) -> int:
    """(task, start) pairs that a run may train on."""
    spec = EnvSpec(name=settings.env.name, suite=settings.env.suite)
    return sum(
        len(registry.training_and_held_out_states(spec, task)[0][: settings.curriculum.starts_per_task])
        for task in settings.task_ids
    )


def _num_held_out_starts(env: EnvSettings, tasks: Sequence[int]) -> int:
    spec = EnvSpec(name=env.name, suite=env.suite)
    return sum(registry.num_held_out_states(spec, task) for task in tasks)
