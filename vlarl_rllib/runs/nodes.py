"""Whether the nodes of a cluster have what a run's actors read and write there, asked before any actor starts.

Asked is every node that is large enough for one of the actors, whether Ray is going to put one there or not.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import ray
from ray.exceptions import NodeDiedError, RayError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vlarl_rllib.errors import one_line
from vlarl_rllib.models.presets import cache_name, presets
from vlarl_rllib.process.console import saying_so
from vlarl_rllib.process.storage import Place
from vlarl_rllib.runs.node_probe import SAME_PACKAGES, Lack, Needs, look
from vlarl_rllib.runs.places import selects
from vlarl_rllib.settings import Role, RuntimeArgs, Settings, SettingsError
from vlarl_rllib.settings.plan import Bundle

ANSWER_SECONDS = 60.0
"""For a node to start a process and import this package: 4 s, 12 s on a loaded one."""
PROBE = ".nodes-"
MODEL_READERS = {Role.ALGORITHM, Role.RUNNER, Role.ENGINE, Role.LEARNER}
Reads = Mapping[str, Place | str | None]
NOTHING: Reads = MappingProxyType({})
LEARNERS = {Role.ALGORITHM, Role.LEARNER}


def check_nodes(plan: RuntimeArgs, settings: Settings, run: Place | None = None, reads: Reads = NOTHING) -> None:
    """Raise `SettingsError` for the first of `node_problems`."""
    for problem in node_problems(plan, settings, run, reads):
        raise SettingsError(problem)


def node_problems(
    plan: RuntimeArgs, settings: Settings, run: Place | None = None, reads: Reads = NOTHING
) -> Iterator[str]:
    """Ask every node that may get one of the plan's actors, all at once; a line for each thing that is not there, or a
    node that does not answer within `ANSWER_SECONDS`.

    Args:
        run: place that the actors write into; None = they write nothing.
        reads: what learners read beside the models, by the setting or option that names it.
    """
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"] and _roles(node, plan.bundles)}
    probe = _write_probe(run) if run else None
    try:
        needs = {key: _needs(_roles(node, plan.bundles), settings, probe, reads) for key, node in nodes.items()}
        with saying_so(f"{len(nodes)} node(s) to say whether they see what the run reads and writes"):
            found = _ask(needs)
    finally:
        if probe is not None:
            probe.unlink(missing_ok=True)
    for lack in dict.fromkeys(lack for lacks in found.values() for lack in lacks):
        where = sorted(_name(nodes[key]) for key, lacks in found.items() if lack in lacks)
        yield f"{lack.subject}: {lack.fault} on {', '.join(where)}; {lack.remedy}"


def runner_cores(plan: RuntimeArgs) -> int | None:
    """Cores that the runners' environments may count on: those of the smallest node that may get a runner. None in a
    Ray of this machine alone, or in none."""
    if not ray.is_initialized() or len(nodes := [node for node in ray.nodes() if node["Alive"]]) < 2:
        return None
    able = [node["Resources"].get("CPU", 0.0) for node in nodes if Role.RUNNER in _roles(node, plan.bundles)]
    return max(1, int(min(able))) if able else None


def _roles(node: Mapping[str, Any], bundles: Sequence[Bundle]) -> set[Role]:
    """Of the actors that a node is large enough for."""
    return {
        bundle.role
        for bundle in bundles
        if all(node["Resources"].get(kind, 0.0) >= amount for kind, amount in bundle.resources.items())
        and all(selects(selector, node["Labels"].get(key)) for key, selector in bundle.labels.items())
    }


def _name(node: Mapping[str, Any]) -> str:
    return f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def _write_probe(run: Place) -> Place:
    probe = run / f"{PROBE}{uuid.uuid4().hex}"
    try:
        run.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
    except OSError as error:
        raise SettingsError(f"--run-dir: {run} cannot be written to ({' '.join(str(error).split())})") from None
    return probe


def _needs(roles: set[Role], settings: Settings, probe: Place | None, reads: Reads) -> Needs:
    model, rewards = settings.model, settings.rewards
    models = {"model.path": model.path} if roles & MODEL_READERS else {}
    learned: dict[str, Place | str | None] = {}
    if roles & LEARNERS:
        learned = {
            "model.critic_path": model.critic_path,
            "model.lora.adapter": model.lora.adapter if model.lora else None,
            **reads,
        }
    judged = {"rewards.judge": rewards.judge} if roles & {Role.ALGORITHM, Role.RUNNER, Role.REWARD_WORKER} else {}
    named = {name: str(path) for name, path in (models | learned | judged).items() if path}
    code = {
        model.family or "": "model.family",
        settings.env.name: "env.name",
        settings.weights.transport: "weights.transport",
        **dict.fromkeys(rewards.others, "rewards.others"),
    }
    return Needs(
        paths={name: path for name, path in named.items() if os.path.isabs(path)},
        modules={what.partition(":")[0]: name for what, name in code.items() if ":" in what},
        presets={path: cache_name(path) for path in named.values() if path in presets()},
        environment=settings.env.name if Role.RUNNER in roles else None,
        probe=str(probe) if probe else None,
    )


def _ask(needs: Mapping[str, Needs]) -> dict[str, list[Lack]]:
    """What each node lacks, by its id."""
    here = ray.get_runtime_context().get_node_id()
    found = {here: look(needs[here])} if here in needs else {}
    task = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(look)  # no actor gets the process, which may have drawn
    asked = {}
    for key in needs.keys() - found.keys():
        there = NodeAffinitySchedulingStrategy(key, soft=False)
        asked[key] = task.options(scheduling_strategy=there).remote(needs[key])
    _, late = ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_SECONDS)
    return found | {key: list(_late() if ref in late else _answer(ref)) for key, ref in asked.items()}


def _late() -> Iterator[Lack]:
    yield Lack("cluster", f"no answer within {ANSWER_SECONDS:g} s", "see what keeps it busy, or take it out")


def _answer(ref: Any) -> Iterator[Lack]:
    try:
        yield from ray.get(ref)
    except (NodeDiedError, TaskUnschedulableError):  # gone since: no actor comes there
        return
    except RayError as error:
        yield Lack("cluster", f"vlarl_rllib does not start ({one_line(error)})", SAME_PACKAGES)
