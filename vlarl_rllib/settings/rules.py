"""Settings that cannot go together, each as one line: key, value, rule, remedy."""

from __future__ import annotations

from collections.abc import Iterator

from vlarl_rllib.envs import registry
from vlarl_rllib.settings.plan import Role, demonstrated_tasks, num_environment_processes, placements, resolve_mesh
from vlarl_rllib.settings.schema import FSDPSettings, RewardSettings, Sections
from vlarl_rllib.settings.transports import CUDA_IPC, NIXL

SMALLEST_SHARE = 0.001
"""Of a CPU or GPU that a process may reserve."""


def impossible_combinations(s: Sections) -> Iterator[str]:
    """Combinations that cannot work: key, value, rule, remedy."""
    if (suites := registry.suites(s.env.name)) and s.env.suite not in suites:
        yield f"env.suite: {s.env.suite!r} is no suite of {s.env.name}; choose one of {', '.join(suites)}"
        return
    yield from _too_many_tasks(s)
    yield from _impossible_tasks(s)
    yield from _impossible_slots(s)
    yield from _impossible_resources(s)
    yield from _impossible_places(s)
    yield from _impossible_groups(s)
    yield from _impossible_values(s)
    yield from _impossible_ahead(s)
    yield from _impossible_learners(s)
    yield from _impossible_engines(s)
    yield from _impossible_models(s)
    yield from _impossible_transports(s)
    yield from _impossible_rewards(s.rewards)
    yield from _impossible_lengths(s)


def _impossible_slots(s: Sections) -> Iterator[str]:
    if s.env.num_processes and s.env.num_processes > s.env.num_envs:
        yield (
            f"env.num_processes: {s.env.num_processes} is more than env.num_envs = {s.env.num_envs}; use at most one "
            "process per slot"
        )
    processes = num_environment_processes(s.env, None)
    capacity = s.rollout.num_runners * min(s.env.num_envs, processes * s.env.models_per_process)
    if len(s.task_ids) > capacity:
        yield (
            f"env.tasks: {len(s.task_ids)} tasks need as many MuJoCo models, but {s.rollout.num_runners} runner(s) x "
            f"{processes} process(es) x "
            f"models_per_process {s.env.models_per_process} with {s.env.num_envs} slots hold {capacity}; "
            "raise env.models_per_process or env.num_envs, or list fewer"
        )
    steps = s.rollout.num_runners * s.env.num_envs * s.rollout.steps_per_iteration
    if s.training.minibatch_size > steps and not s.rollout.episodes_per_iteration:
        yield (
            f"training.minibatch_size: {s.training.minibatch_size} is more than the {steps} steps of an iteration; "
            "lower it or raise rollout.steps_per_iteration"
        )


def _impossible_learners(s: Sections) -> Iterator[str]:
    ranks = max(1, s.learners.num)
    slots = s.rollout.num_runners * s.env.num_envs
    if ranks > slots:
        yield (
            f"learners.num: {ranks} is more than the {slots} slots, whose steps go to one learner each; raise "
            "env.num_envs or lower learners.num"
        )
    replicas, shards = resolve_mesh(s.learners.fsdp.mesh, ranks)
    if replicas < 1 or shards < 1 or replicas * shards != ranks:
        yield f"learners.fsdp.mesh: {list(s.learners.fsdp.mesh)} does not multiply to {ranks} learner(s); use [1, -1]"
    if s.learners.fsdp.cpu_offload and not s.learners.gpus:
        yield "learners.fsdp.cpu_offload: true needs learners on a GPU; set learners.gpus or leave it false"
    learners = s.learners
    if learners.activation_memory_budget < 1 and not s.compiles:
        yield (
            f"learners.activation_memory_budget: {learners.activation_memory_budget:g} is for compiled blocks; set "
            "learners.compile: true, or leave it 1"
        )
    if learners.cuda_graphs and (not learners.gpus or learners.num > 1 or learners.fsdp != FSDPSettings()):
        yield (
            "learners.cuda_graphs: true needs one learner on a GPU, with learners.fsdp left as it is; set "
            "learners.gpus and learners.num: 1, or leave it null"
        )


def _impossible_engines(s: Sections) -> Iterator[str]:
    if s.engines.num == 0 and s.engines.gpus:
        yield (
            f"engines.gpus: {s.engines.gpus:g} has no engine to go to; set engines.num to at least 1, or "
            "engines.gpus to 0"
        )
    if s.engines.quantization and not s.engines.gpus:
        yield f"engines.quantization: {s.engines.quantization} needs engines on a GPU; set engines.gpus, or null"
    if s.engines.quantization and s.training.old_log_probs != "recompute":
        yield (
            f"engines.quantization: {s.engines.quantization} makes the sampler's log-probs differ from the learner's; "
            "set training.old_log_probs to recompute, or quantization to null"
        )
    if s.engines.dtype != s.model.dtype and s.training.old_log_probs != "recompute":
        yield (
            f"engines.dtype: {s.engines.dtype} differs from model.dtype {s.model.dtype}, so the sampler's "
            "log-probs are not the learner's; "
            "set training.old_log_probs to recompute, or use one dtype"
        )


def _impossible_models(s: Sections) -> Iterator[str]:
    if s.model.quantization and s.model.lora is None:
        yield (
            f"model.quantization: {s.model.quantization} freezes the weights, so there is nothing to train; set "
            "model.lora, or quantization to null"
        )
    if s.model.quantization and s.learners.num > 1:
        yield (
            f"model.quantization: {s.model.quantization} weights cannot be sharded; set learners.num to 1, or "
            "quantization to null"
        )
    if s.model.quantization and s.learners.fsdp.cpu_offload:
        yield (
            f"model.quantization: {s.model.quantization} weights cannot be offloaded; set learners.fsdp.cpu_offload "
            "to false"
        )
    if s.model.critic_path and s.model.critic != "separate":
        yield (
            f"model.critic_path: {s.model.critic_path!r} has no effect with critic {s.model.critic}; set "
            "model.critic to separate, or remove it"
        )


def _impossible_transports(s: Sections) -> Iterator[str]:
    transport = s.weights.transport
    if transport not in (CUDA_IPC, NIXL):
        return
    if not s.engines.num:
        yield f"weights.transport: {transport} needs engines, and engines.num is 0; set it to 1 or more, or use auto"
    if not s.learners.num:
        yield f"weights.transport: {transport} needs learners in actors; set learners.num to 1 or more, or use auto"
    if transport == CUDA_IPC and not (s.engines.gpus and s.learners.gpus):
        yield (
            "weights.transport: cuda_ipc moves weights within a GPU; set engines.gpus and learners.gpus to shares of "
            "one, or use auto"
        )


def _impossible_lengths(s: Sections) -> Iterator[str]:
    if s.evaluation.every and not s.evaluation.episodes:
        yield (
            f"evaluation.every: {s.evaluation.every} evaluates nothing with evaluation.episodes 0; raise episodes or "
            "set every to 0"
        )
    if s.sft.warmup_steps >= s.sft.steps:
        yield (
            f"sft.warmup_steps: {s.sft.warmup_steps} leaves no step at the whole learning rate; use less than "
            f"sft.steps = {s.sft.steps}"
        )
    if s.training.critic_warmup_iterations >= s.run.iterations and s.training.critic_warmup_iterations:
        yield (
            f"training.critic_warmup_iterations: {s.training.critic_warmup_iterations} leaves no iteration for "
            "the policy; "
            f"use less than run.iterations = {s.run.iterations}"
        )


def _too_many_tasks(s: Sections) -> Iterator[str]:
    """Numbers of first tasks, before anybody lists them."""
    available = registry.num_tasks(s.env.suite, name=s.env.name)
    where = registry.label(s.env.name, s.env.suite)
    for key, tasks in (("env.tasks", s.env.tasks), ("collect.tasks", s.collect.tasks)):
        if isinstance(tasks, int) and tasks > available:
            yield f"{key}: {tasks} is more than the {available} tasks of {where}; give fewer, or null for all"


def _impossible_resources(s: Sections) -> Iterator[str]:
    """Ray counts CPUs and GPUs in ten-thousandths, divides no more than one GPU, and places nothing that reserves
    nothing."""
    requests = [("rollout.cpus_per_runner", s.rollout.cpus_per_runner, "", 0.0)]
    requests += [
        (
            "learners.cpus",
            s.learners.cpus if s.learners.num else max(1.0, s.learners.cpus),
            "learners.gpus",
            s.learners.gpus,
        )
    ]
    requests += [("engines.cpus", s.engines.cpus, "engines.gpus", s.engines.gpus)] * bool(s.engines.num)
    requests += [("rewards.judge_cpus", s.rewards.judge_cpus, "rewards.judge_gpus", s.rewards.judge_gpus)] * bool(
        s.rewards.process
    )
    for cpu_key, cpus, gpu_key, gpus in requests:
        for key, amount in ((cpu_key, cpus), (gpu_key, gpus)):
            if 0 < amount < SMALLEST_SHARE:
                yield f"{key}: {amount:g} is less than Ray can reserve; use at least {SMALLEST_SHARE}"
        if not cpus and not gpus:
            yield (
                f"{cpu_key}: 0 reserves nothing, and Ray places no process that reserves nothing; use at least "
                f"{SMALLEST_SHARE}"
            )
        if gpus > 1 and gpus != int(gpus):
            yield f"{gpu_key}: {gpus:g} is more than one GPU and not whole; use a fraction of one, or a whole number"


RESERVED_BY = {
    Role.ALGORITHM: "learners.cpus and learners.gpus, where learners.num is 0,",
    Role.RUNNER: "rollout.cpus_per_runner",
    Role.LEARNER: "learners.cpus and learners.gpus",
    Role.REWARD_WORKER: "rewards.judge_cpus and rewards.judge_gpus",
    Role.ENGINE: "engines.cpus and engines.gpus",
}
"""Which keys say how many CPUs and GPUs an actor gets."""
SECTIONS = {
    Role.ALGORITHM: "algorithm",
    Role.RUNNER: "runners",
    Role.LEARNER: "learners",
    Role.REWARD_WORKER: "reward_worker",
    Role.ENGINE: "engines",
}
"""What a role is called in `placement`."""


def _impossible_places(s: Sections) -> Iterator[str]:
    wanted: dict[str, tuple[str, str]] = {}
    for role, place in placements(s).items():
        key = f"placement.{SECTIONS[role]}"
        for kind in place.resources:
            if kind.upper() in ("CPU", "GPU"):
                yield f"{key}.resources: {kind} is what {RESERVED_BY[role]} reserve(s); set that, and leave {kind} out"
            if kind == "object_store_memory":
                yield f"{key}.resources: {kind} is nobody's to reserve; leave it out"
        for label, value in place.labels.items():
            other, before = wanted.setdefault(label, (key, value))
            if s.placement.strategy == "STRICT_PACK" and value != before and _is_plain(value) and _is_plain(before):
                yield (
                    f"placement.strategy: STRICT_PACK is one node, but {other}.labels want {label}: {before} and "
                    f"{key}.labels want {label}: {value}; use PACK, or one value"
                )


def _is_plain(selector: str) -> bool:
    """A label's value itself, not `!value` or `in(...)`."""
    return bool(selector) and selector[0] != "!" and not selector.endswith(")")


def _impossible_tasks(s: Sections) -> Iterator[str]:
    tasks, available = s.task_ids, registry.num_tasks(s.env.suite, name=s.env.name)
    where = registry.label(s.env.name, s.env.suite)
    for key, listed in (("env.tasks", tasks), ("collect.tasks", demonstrated_tasks(s))):
        for task in listed:
            if task >= available:
                yield f"{key}: {task} is not a task of {where}, whose tasks are 0 to {available - 1}"
        if len(set(listed)) != len(listed):
            yield f"{key}: {listed} names a task twice; list each once (they are played in turn)"
    starts = [
        registry.num_initial_states(s.env.suite, task, name=s.env.name)
        for task in tasks
        if s.env.name not in registry.ENVIRONMENTS
    ]
    if starts and min(starts) < 2:
        yield (
            f"env.name: {s.env.name} has a task with one start, and evaluation needs some that training does not "
            "see; add starts, or leave it out"
        )


def _impossible_groups(s: Sections) -> Iterator[str]:
    episodes, size, kind = s.rollout.episodes_per_iteration or 0, s.rollout.group_size, s.training.advantages
    if size > 1 and (not episodes or episodes % size):
        yield (
            f"rollout.group_size: {size} episodes make a group; set rollout.episodes_per_iteration to a multiple of "
            f"{size}, or group_size to 1"
        )
    if s.rollout.filter_groups and size == 1:
        yield (
            "rollout.filter_groups: true needs groups; set rollout.group_size to at least 2, or filter_groups to false"
        )
    if kind == "gae":
        return
    if size == 1:
        yield (
            f"training.advantages: {kind} compares the episodes of a group; set rollout.group_size to at least 2, or "
            "advantages to gae"
        )
    if s.model.critic == "separate":
        yield (
            f"model.critic: separate would not be used, since training.advantages is {kind}; set it to shared_head, "
            "or advantages to gae"
        )
    if s.training.critic_warmup_iterations:
        yield (
            f"training.critic_warmup_iterations: {s.training.critic_warmup_iterations} would train nothing, "
            f"since training.advantages is {kind}; "
            "set it to 0, or advantages to gae"
        )
    if s.rewards.value_shaping:
        yield (
            f"rewards.value_shaping: {s.rewards.value_shaping:g} needs a trained critic, which "
            f"training.advantages {kind} has not; "
            "set it to 0, or advantages to gae"
        )


def _impossible_values(s: Sections) -> Iterator[str]:
    if s.training.values == "learner":
        return
    if s.model.critic != "shared_head":
        yield (
            f"training.values: engine is of the policy's own value head, and model.critic is {s.model.critic}; set "
            "that to shared_head, or values to learner"
        )
    if s.training.advantages != "gae":
        yield (
            f"training.values: engine would not be used, since training.advantages is {s.training.advantages}; set "
            "values to learner, or advantages to gae"
        )
    if s.training.old_log_probs != "behaviour":
        yield (
            f"training.values: engine saves nothing, since training.old_log_probs {s.training.old_log_probs} scores "
            "all decisions anyway; set that to behaviour, or values to learner"
        )


def _impossible_ahead(s: Sections) -> Iterator[str]:
    if not s.rollout.async_mode:
        return
    if s.training.old_log_probs != "recompute":
        yield (
            f"rollout.async_mode: true samples with older policies than the one that learns, which "
            f"training.old_log_probs {s.training.old_log_probs} takes for one; set that to recompute, or async_mode to "
            "false"
        )
    if not s.learners.num:
        yield (
            "rollout.async_mode: true needs learners beside the Algorithm's process, and learners.num is 0; set it to "
            "at least 1, or async_mode to false"
        )


def _impossible_rewards(rewards: RewardSettings) -> Iterator[str]:
    if rewards.process and not rewards.judge:
        yield (
            f"rewards.process: {rewards.process:g} needs a judge; set rewards.judge to a directory that vlarl "
            "reward-model wrote, or process to 0"
        )
    if rewards.judge and not rewards.process:
        yield f"rewards.judge: {rewards.judge!r} has no effect with rewards.process 0; set a weight, or judge to null"
    if rewards.judge_cpu_copy is not None and not rewards.process:
        yield (
            f"rewards.judge_cpu_copy: {rewards.judge_cpu_copy} has no effect with rewards.process 0; set a weight "
            "and a judge, or leave it out"
        )
    if rewards.judge_gpus and not rewards.process:
        yield (
            f"rewards.judge_gpus: {rewards.judge_gpus:g} has no judge to go to; set rewards.process and "
            "rewards.judge, or judge_gpus to 0"
        )
