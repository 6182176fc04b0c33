"""What follows from the settings by arithmetic, and which of them cannot go together. Pure, but for the number of cores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlarl_rllib import registry

if TYPE_CHECKING:
    from vlarl_rllib.settings import EnvSettings, RewardSettings, Settings

LIBERO_TASKS = {"libero_spatial": 10, "libero_object": 10, "libero_goal": 10, "libero_10": 10, "libero_90": 90}
"""Tasks of each standard suite (LIBERO, arXiv 2306.03310, section 4)."""
SUITELESS_TASKS = {"tabletop": 18, "synthetic": 4}
"""Tasks of the package's environments that have no suites: known here without loading a simulator."""
SMALLEST_SHARE = 0.001
"""Of a CPU or GPU that a process may reserve."""
HELD_OUT_STARTS = {"libero": 10, "tabletop": 200, "synthetic": 10}
"""Initial states of each task that only evaluation uses: a fifth (`registry.HELD_OUT_FRACTION`)."""


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
    num_processes: int
    """Environment subprocesses of each runner."""
    mesh: tuple[int, int]
    """[replicas, shards] with -1 resolved."""
    slot_tasks: tuple[tuple[int, ...], ...]
    """For each runner, the task of each of its slots."""
    bundles: tuple[dict[str, float], ...]
    """Resources of: the Algorithm, each runner, each learner, the reward worker where there is one, each engine; the order of the placement
    group."""
    total_cpus: float
    total_gpus: float
    evaluation_episodes: int
    """Episodes of one evaluation: at most one for each held-out (task, start)."""
    demonstrated_tasks: tuple[int, ...]
    """The tasks that `vlarl collect` shows, in turn."""


def calculate_runtime_args(settings: Settings, *, cores: int | None = None) -> RuntimeArgs:
    """Derive sizes and resources. Pure but for the default of `cores`, this machine's."""
    env, rollout, learners, engines, rewards = settings.env, settings.rollout, settings.learners, settings.engines, settings.rewards
    steps = None if rollout.episodes_per_iteration else rollout.num_runners * env.num_envs * rollout.steps_per_iteration
    minibatches = math.ceil(steps / settings.training.minibatch_size) if steps else None
    ranks = max(1, learners.num)
    bundles = [{"CPU": 1.0 if learners.num else max(1.0, learners.cpus), "GPU": 0.0 if learners.num else learners.gpus}]
    bundles += [{"CPU": rollout.cpus_per_runner}] * rollout.num_runners
    bundles += [{"CPU": learners.cpus, "GPU": learners.gpus}] * learners.num
    bundles += [{"CPU": rewards.judge_cpus, "GPU": rewards.judge_gpus}] * bool(rewards.process)
    bundles += [{"CPU": engines.cpus, "GPU": engines.gpus}] * engines.num
    return RuntimeArgs(
        num_slots=rollout.num_runners * env.num_envs,
        steps_per_iteration=steps,
        num_minibatches=minibatches,
        optimizer_steps=minibatches * settings.training.num_epochs if minibatches else None,
        micro_batches=math.ceil(settings.training.minibatch_size / ranks / learners.micro_batch_size),
        num_processes=_num_processes(env, cores),
        mesh=_resolve_mesh(learners.fsdp.mesh, ranks),
        slot_tasks=_slot_tasks(settings, cores),
        bundles=tuple({kind: amount for kind, amount in bundle.items() if amount} for bundle in bundles),
        total_cpus=sum(bundle.get("CPU", 0.0) for bundle in bundles),
        total_gpus=sum(bundle.get("GPU", 0.0) for bundle in bundles),
        evaluation_episodes=min(settings.evaluation.episodes, _num_held_out_starts(env, settings.task_ids)),
        demonstrated_tasks=tuple(_demonstrated_tasks(settings)),
    )


def _num_processes(env: EnvSettings, cores: int | None) -> int:
    import psutil

    return min(env.num_envs, env.num_processes or cores or psutil.cpu_count() or 1)


def _slot_tasks(settings: Settings, cores: int | None) -> tuple[tuple[int, ...], ...]:
    """Spread the tasks over runners, then over slots, so that no runner needs more models than its processes may hold."""
    tasks, runners = settings.task_ids, settings.rollout.num_runners
    models = min(settings.env.num_envs, _num_processes(settings.env, cores) * settings.env.models_per_process)
    share = min(models, math.ceil(len(tasks) / runners))
    return tuple(tuple(tasks[(runner * share + slot % share) % len(tasks)] for slot in range(settings.env.num_envs)) for runner in range(runners))


def _resolve_mesh(mesh: tuple[int, int], ranks: int) -> tuple[int, int]:
    replicas, shards = mesh
    if replicas == -1:
        replicas = ranks // shards if shards else 0
    if shards == -1:
        shards = ranks // replicas if replicas else 0
    return replicas, shards


def impossible_combinations(s: Settings) -> Iterator[str]:
    """Combinations that cannot work: key, value, rule, remedy."""
    yield from _too_many_tasks(s)
    tasks = s.task_ids
    yield from _impossible_tasks(s)
    if s.env.num_processes and s.env.num_processes > s.env.num_envs:
        yield f"env.num_processes: {s.env.num_processes} is more than env.num_envs = {s.env.num_envs}; use at most one process per slot"
    processes = _num_processes(s.env, None)
    capacity = s.rollout.num_runners * min(s.env.num_envs, processes * s.env.models_per_process)
    if len(tasks) > capacity:
        yield (
            f"env.tasks: {len(tasks)} tasks need as many MuJoCo models, but {s.rollout.num_runners} runner(s) x {processes} process(es) x "
            f"models_per_process {s.env.models_per_process} with {s.env.num_envs} slots hold {capacity}; "
            "raise env.models_per_process or env.num_envs, or list fewer"
        )
    steps = s.rollout.num_runners * s.env.num_envs * s.rollout.steps_per_iteration
    if s.training.minibatch_size > steps and not s.rollout.episodes_per_iteration:
        yield (
            f"training.minibatch_size: {s.training.minibatch_size} is more than the {steps} steps of an iteration; "
            "lower it or raise rollout.steps_per_iteration"
        )
    yield from _impossible_resources(s)
    yield from _impossible_groups(s)
    ranks = max(1, s.learners.num)
    slots = s.rollout.num_runners * s.env.num_envs
    if ranks > slots:
        yield f"learners.num: {ranks} is more than the {slots} slots, whose steps go to one learner each; raise env.num_envs or lower learners.num"
    replicas, shards = _resolve_mesh(s.learners.fsdp.mesh, ranks)
    if replicas < 1 or shards < 1 or replicas * shards != ranks:
        yield f"learners.fsdp.mesh: {list(s.learners.fsdp.mesh)} does not multiply to {ranks} learner(s); use [1, -1]"
    if s.engines.num == 0 and s.engines.gpus:
        yield f"engines.gpus: {s.engines.gpus:g} has no engine to go to; set engines.num to at least 1, or engines.gpus to 0"
    if s.engines.dtype != s.model.dtype and s.training.old_log_probs != "recompute":
        yield (
            f"engines.dtype: {s.engines.dtype} differs from model.dtype {s.model.dtype}, so the sampler's log-probs are not the learner's; "
            "set training.old_log_probs to recompute, or use one dtype"
        )
    if s.model.quantization and s.model.lora is None:
        yield f"model.quantization: {s.model.quantization} freezes the weights, so there is nothing to train; set model.lora, or quantization to null"
    if s.model.quantization and s.learners.num > 1:
        yield f"model.quantization: {s.model.quantization} weights cannot be sharded; set learners.num to 1, or quantization to null"
    if s.model.quantization and s.learners.fsdp.cpu_offload:
        yield f"model.quantization: {s.model.quantization} weights cannot be offloaded; set learners.fsdp.cpu_offload to false"
    if s.model.critic_path and s.model.critic != "separate":
        yield f"model.critic_path: {s.model.critic_path!r} has no effect with critic {s.model.critic}; set model.critic to separate, or remove it"
    if s.learners.fsdp.cpu_offload and not s.learners.gpus:
        yield "learners.fsdp.cpu_offload: true needs learners on a GPU; set learners.gpus or leave it false"
    yield from _impossible_rewards(s.rewards)
    if s.evaluation.every and not s.evaluation.episodes:
        yield f"evaluation.every: {s.evaluation.every} evaluates nothing with evaluation.episodes 0; raise episodes or set every to 0"
    if s.sft.warmup_steps >= s.sft.steps:
        yield f"sft.warmup_steps: {s.sft.warmup_steps} leaves no step at the whole learning rate; use less than sft.steps = {s.sft.steps}"
    if s.training.critic_warmup_iterations >= s.run.iterations and s.training.critic_warmup_iterations:
        yield (
            f"training.critic_warmup_iterations: {s.training.critic_warmup_iterations} leaves no iteration for the policy; "
            f"use less than run.iterations = {s.run.iterations}"
        )


def _too_many_tasks(s: Settings) -> Iterator[str]:
    """Numbers of first tasks, before anybody lists them."""
    available = num_tasks(s.env)
    where = s.env.suite if s.env.name == "libero" else s.env.name
    for key, tasks in (("env.tasks", s.env.tasks), ("collect.tasks", s.collect.tasks)):
        if isinstance(tasks, int) and tasks > available:
            yield f"{key}: {tasks} is more than the {available} tasks of {where}; give fewer, or null for all"


def _impossible_resources(s: Settings) -> Iterator[str]:
    """Ray counts CPUs and GPUs in ten-thousandths, divides no more than one GPU, and places nothing that reserves nothing."""
    requests = [("rollout.cpus_per_runner", s.rollout.cpus_per_runner, "", 0.0)]
    requests += [("learners.cpus", s.learners.cpus if s.learners.num else max(1.0, s.learners.cpus), "learners.gpus", s.learners.gpus)]
    requests += [("engines.cpus", s.engines.cpus, "engines.gpus", s.engines.gpus)] * bool(s.engines.num)
    requests += [("rewards.judge_cpus", s.rewards.judge_cpus, "rewards.judge_gpus", s.rewards.judge_gpus)] * bool(s.rewards.process)
    for cpu_key, cpus, gpu_key, gpus in requests:
        for key, amount in ((cpu_key, cpus), (gpu_key, gpus)):
            if 0 < amount < SMALLEST_SHARE:
                yield f"{key}: {amount:g} is less than Ray can reserve; use at least {SMALLEST_SHARE}"
        if not cpus and not gpus:
            yield f"{cpu_key}: 0 reserves nothing, and Ray places no process that reserves nothing; use at least {SMALLEST_SHARE}"
        if gpus > 1 and gpus != int(gpus):
            yield f"{gpu_key}: {gpus:g} is more than one GPU and not whole; use a fraction of one, or a whole number"


def _impossible_tasks(s: Settings) -> Iterator[str]:
    tasks, available = s.task_ids, num_tasks(s.env)
    where = s.env.suite if s.env.name == "libero" else s.env.name
    for key, listed in (("env.tasks", tasks), ("collect.tasks", _demonstrated_tasks(s))):
        for task in listed:
            if task >= available:
                yield f"{key}: {task} is not a task of {where}, whose tasks are 0 to {available - 1}"
        if len(set(listed)) != len(listed):
            yield f"{key}: {listed} names a task twice; list each once (they are played in turn)"
    if s.env.name not in HELD_OUT_STARTS and min((registry.num_initial_states(s.env.suite, task, name=s.env.name) for task in tasks), default=2) < 2:
        yield f"env.name: {s.env.name} has a task with one start, and evaluation needs some that training does not see; add starts, or leave it out"


def _impossible_groups(s: Settings) -> Iterator[str]:
    episodes, size, kind = s.rollout.episodes_per_iteration or 0, s.rollout.group_size, s.training.advantages
    if size > 1 and (not episodes or episodes % size):
        yield f"rollout.group_size: {size} episodes make a group; set rollout.episodes_per_iteration to a multiple of {size}, or group_size to 1"
    if s.rollout.filter_groups and size == 1:
        yield "rollout.filter_groups: true needs groups; set rollout.group_size to at least 2, or filter_groups to false"
    if kind == "gae":
        return
    if size == 1:
        yield f"training.advantages: {kind} compares the episodes of a group; set rollout.group_size to at least 2, or advantages to gae"
    if s.model.critic == "separate":
        yield f"model.critic: separate would not be used, since training.advantages is {kind}; set it to shared_head, or advantages to gae"
    if s.training.critic_warmup_iterations:
        yield (
            f"training.critic_warmup_iterations: {s.training.critic_warmup_iterations} would train nothing, since training.advantages is {kind}; "
            "set it to 0, or advantages to gae"
        )
    if s.rewards.value_shaping:
        yield (
            f"rewards.value_shaping: {s.rewards.value_shaping:g} needs a trained critic, which training.advantages {kind} has not; "
            "set it to 0, or advantages to gae"
        )


def _impossible_rewards(rewards: RewardSettings) -> Iterator[str]:
    if rewards.process and not rewards.judge:
        yield f"rewards.process: {rewards.process:g} needs a judge; set rewards.judge to a directory that vlarl reward-model wrote, or process to 0"
    if rewards.judge and not rewards.process:
        yield f"rewards.judge: {rewards.judge!r} has no effect with rewards.process 0; set a weight, or judge to null"
    if rewards.judge_cpu_copy is not None and not rewards.process:
        yield f"rewards.judge_cpu_copy: {rewards.judge_cpu_copy} has no effect with rewards.process 0; set a weight and a judge, or leave it out"
    if rewards.judge_gpus and not rewards.process:
        yield f"rewards.judge_gpus: {rewards.judge_gpus:g} has no judge to go to; set rewards.process and rewards.judge, or judge_gpus to 0"


def _demonstrated_tasks(settings: Settings) -> list[int]:
    tasks = settings.collect.tasks
    if tasks is None:
        return settings.task_ids
    return chosen_tasks(None if tasks == "all" else tasks, settings.env)


def chosen_tasks(tasks: Sequence[int] | int | None, env: EnvSettings) -> list[int]:
    """Task ids of a list, of a number of the first ones, or of None = all."""
    tasks = num_tasks(env) if tasks is None else tasks
    return list(range(tasks)) if isinstance(tasks, int) else list(tasks)


def num_tasks(env: EnvSettings) -> int:
    if env.name == "libero":
        return LIBERO_TASKS[env.suite]
    return SUITELESS_TASKS[env.name] if env.name in SUITELESS_TASKS else registry.num_tasks(env.suite, name=env.name)


def num_training_starts(settings: Settings) -> int:
    """(task, start) pairs that a run may train on."""
    spec = registry.EnvSpec(name=settings.env.name, suite=settings.env.suite)
    return sum(len(registry.training_and_held_out_states(spec, task)[0][: settings.curriculum.starts_per_task]) for task in settings.task_ids)


def _num_held_out_starts(env: EnvSettings, tasks: Sequence[int]) -> int:
    if env.name in HELD_OUT_STARTS:
        return HELD_OUT_STARTS[env.name] * len(tasks)
    spec = registry.EnvSpec(name=env.name, suite=env.suite)
    return sum(len(registry.training_and_held_out_states(spec, task)[1]) for task in tasks)
