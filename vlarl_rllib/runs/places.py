"""Whether the nodes of a cluster have places for a plan: node by node, as Ray lays bundles, and not in sum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vlarl_rllib.ray_compat import ClusterNode, cluster_nodes, unplaced_bundles
from vlarl_rllib.settings import Role, RuntimeArgs, SettingsError
from vlarl_rllib.settings.placement import MEMORY
from vlarl_rllib.settings.plan import Bundle
from vlarl_rllib.settings.rules import SECTIONS

ROUNDING = 1e-4
"""Ray counts in ten-thousandths."""
LOWER = {
    Role.ALGORITHM: "lower learners.cpus or learners.gpus",
    Role.RUNNER: "lower rollout.cpus_per_runner",
    Role.LEARNER: "lower learners.cpus or learners.gpus",
    Role.REWARD_WORKER: "lower rewards.judge_cpus or rewards.judge_gpus",
    Role.ENGINE: "lower engines.cpus or engines.gpus",
}
FEWER = {
    Role.RUNNER: "rollout.num_runners",
    Role.LEARNER: "learners.num",
    Role.ENGINE: "engines.num",
}
HOW_TO_SEE = "`vlarl doctor --cluster CONFIG` prints what fits where"


# Words


def in_words(bundle: Bundle) -> str:
    """`engine (1 CPU, 1 GPU, farm 0.5, zone=a)`."""
    return f"{bundle.role.value} ({_amounts(bundle)})"


def named(bundles: Iterable[Bundle]) -> str:
    """`2 x runner (1 CPU), engine (1 CPU, 1 GPU)`."""
    counted = Counter(map(in_words, bundles))
    return ", ".join(f"{count} x {words}" if count > 1 else words for words, count in counted.items())


def resources_in_words(resources: Mapping[str, float]) -> str:
    """`4 CPU, 1 GPU, farm 2`, without what every node has of Ray's own."""
    shown = {kind: amount for kind, amount in resources.items() if not _is_rays_own(kind)}
    shown = {kind: resources.get(kind, 0.0) for kind in ("CPU", "GPU")} | shown
    return ", ".join(
        f"{amount:g} {kind}" if kind in ("CPU", "GPU") else f"{kind} {amount:g}"
        for kind, amount in shown.items()
        if amount or kind == "CPU"
    )


def _is_rays_own(kind: str) -> bool:
    return kind in (MEMORY, "object_store_memory") or kind.startswith(("node:", "accelerator_type:", "bundle_group"))


def _amounts(bundle: Bundle) -> str:
    parts = [f"{amount:.4g} {kind}" for kind, amount in bundle.resources.items() if kind in ("CPU", "GPU")]
    parts += [
        f"{amount / 1e9:.4g} GB of memory" if kind == MEMORY else f"{kind} {amount:.4g}"
        for kind, amount in bundle.resources.items()
        if kind not in ("CPU", "GPU")
    ]
    return ", ".join([*parts, *(f"{key}={value}" for key, value in bundle.labels.items())])


# One bundle on one node


def selects(selector: str, value: str | None) -> bool:
    """Whether one of Ray's label selectors (`a`, `!a`, `in(a, b)`, `!in(a, b)`) takes a node's value; None = it has no
    such label."""
    wanted, negated = selector.removeprefix("!"), selector.startswith("!")
    if wanted.startswith("in(") and wanted.endswith(")"):
        choices = [choice.strip() for choice in wanted[3:-1].split(",")]
    else:
        choices = [wanted]
    return (value in choices) != negated


def has_labels(node: ClusterNode, bundle: Bundle) -> bool:
    return all(selects(selector, node.labels.get(key)) for key, selector in bundle.labels.items())


def holds(node: ClusterNode, bundle: Bundle, resources: Mapping[str, float]) -> bool:
    """Whether the node has the bundle's labels, and so much of `resources`, its own or those that are left."""
    enough = all(resources.get(kind, 0.0) >= amount - ROUNDING for kind, amount in bundle.resources.items())
    return enough and has_labels(node, bundle)


def num_places(node: ClusterNode, bundle: Bundle) -> int:
    """How many such bundles the whole node holds."""
    if not holds(node, bundle, node.total):
        return 0
    return min(
        int(node.total[kind]) * int((1 + ROUNDING) / amount)
        if kind == "GPU" and amount < 1  # a share lies on one GPU
        else int((node.total[kind] + ROUNDING) / amount)
        for kind, amount in bundle.resources.items()
    )


def on_cards(bundles: Sequence[Bundle], cards: Iterable[float]) -> tuple[list[list[int]], list[int]]:
    """Put bundles on GPUs as Ray does: each where it leaves the least, a share on one GPU.

    Args:
        cards: what is free of each GPU.

    Returns:
        (for each GPU the bundles on it, those that find no room), by number.
    """
    free = list(cards)
    on: list[list[int]] = [[] for _ in free]
    left = []
    for place, bundle in enumerate(bundles):
        share = bundle.resources.get("GPU", 0.0)
        if not share:
            continue
        count, part = (int(share), 1.0) if share >= 1 else (1, share)
        room = sorted((card for card in range(len(free)) if free[card] >= part - ROUNDING), key=free.__getitem__)[
            :count
        ]
        if len(room) < count or share > count:
            left.append(place)
            continue
        for card in room:
            free[card] -= part
            on[card].append(place)
    return on, left


# All of them


def lay(plan: RuntimeArgs, nodes: Sequence[ClusterNode], *, free: bool = True) -> list[int | None]:
    """A node, by number, for each bundle of the plan; None where there is none left.

    As Ray 2.60 does (`src/ray/raylet/scheduling/policy/bundle_scheduling_policy.cc`), but that it gives up with the
    first bundle that finds none; ties are broken by the nodes' order here. It counts a node's GPUs in sum, and when the
    node then has no single GPU for a share, it chooses the same node again, without end: two nodes of two GPUs never
    get four actors of 0.6 under PACK.

    Args:
        free: on what is not reserved; else on the whole nodes.
    """
    left = [dict(node.free if free else node.total) for node in nodes]
    where: list[int | None] = [None] * len(plan.bundles)
    waiting = sorted(range(len(plan.bundles)), key=lambda place: _scarcity(plan.bundles[place]), reverse=True)
    unused = list(range(len(nodes)))

    def best(place: int, among: Iterable[int]) -> int | None:
        fit = [number for number in among if holds(nodes[number], plan.bundles[place], left[number])]
        return max(fit, key=lambda number: _share_left(plan.bundles[place], left[number]), default=None)

    def put(place: int, number: int) -> None:
        where[place] = number
        for kind, amount in plan.bundles[place].resources.items():
            left[number][kind] -= amount

    if plan.strategy == "STRICT_PACK":
        where = [_best_for_all(plan, nodes, left)] * len(plan.bundles)
        waiting = []
    for place in waiting:
        if where[place] is not None:
            continue
        used = [number for number in range(len(nodes)) if number not in unused]
        number = best(place, unused)
        if number is None and plan.strategy == "SPREAD":
            number = best(place, used)
        if number is None:
            continue
        put(place, number)
        if number in unused:
            unused.remove(number)
        for other in waiting if plan.strategy in ("PACK", None) else ():
            if where[other] is None and holds(nodes[number], plan.bundles[other], left[number]):
                put(other, number)
    return where


def _best_for_all(plan: RuntimeArgs, nodes: Sequence[ClusterNode], left: Sequence[Mapping[str, float]]) -> int | None:
    """The node that holds the whole plan and has most left."""
    everything = Bundle(Role.ALGORITHM, _sum_of(bundle.resources for bundle in plan.bundles), {})
    fit = [
        number
        for number, node in enumerate(nodes)
        if holds(node, everything, left[number]) and all(has_labels(node, bundle) for bundle in plan.bundles)
    ]
    return max(fit, key=lambda number: _share_left(everything, left[number]), default=None)


def _scarcity(bundle: Bundle) -> tuple[Any, ...]:
    """Those that need most of what is scarce come first."""
    resources = bundle.resources
    custom = sorted((kind, amount) for kind, amount in resources.items() if kind not in ("CPU", "GPU", MEMORY))
    return resources.get("GPU", 0.0), custom, resources.get(MEMORY, 0.0), resources.get("CPU", 0.0)


def _share_left(bundle: Bundle, left: Mapping[str, float]) -> float:
    """How much of what it asks for a node would have left: Ray takes the node with most."""
    return sum((left[kind] - amount) / left[kind] for kind, amount in bundle.resources.items())


def without_a_place(plan: RuntimeArgs, nodes: Sequence[ClusterNode], *, free: bool = True) -> list[Bundle]:
    """The bundles for which `lay` finds none."""
    return [bundle for bundle, node in zip(plan.bundles, lay(plan, nodes, free=free), strict=True) if node is None]


def waits_for_places(plan: RuntimeArgs) -> str | None:
    """What a trial's placement group has no node for, while it waits for one: at its start, or since a node was
    lost."""
    unplaced = unplaced_bundles([bundle.resources for bundle in plan.bundles])
    if not unplaced:
        return None
    lost = replace(plan, bundles=tuple(plan.bundles[place] for place in unplaced))
    nodes = cluster_nodes()
    lacking = without_a_place(lost, nodes) or lost.bundles
    free = "; ".join(f"{node.address}: {resources_in_words(node.free)}" for node in nodes)
    return f"a place for: {named(lacking)} (free: {free})"


# What can never be


def check_places(plan: RuntimeArgs, nodes: Sequence[ClusterNode]) -> None:
    """Raise `SettingsError` where these nodes can never hold the plan, whoever else uses them: a bundle is too large
    for each of them, or there are more of a role than all have places for."""
    for problem in impossible_places(plan, nodes):
        raise SettingsError(problem)


def impossible_places(plan: RuntimeArgs, nodes: Sequence[ClusterNode]) -> Iterator[str]:
    """Why, a line each, the plainest first."""
    found = [*_too_large(plan, nodes), *too_small(plan, _sum(nodes)), *_too_strict(plan, nodes)]
    yield from found
    if not found and plan.strategy and (lacking := without_a_place(plan, nodes, free=False)):
        yield (
            "placement: Ray, which fills the node with most room first and counts its GPUs in sum, finds no place for "
            f"{named(lacking)}, also when nobody else uses the nodes; set placement.strategy to SPREAD, reserve less, "
            f"or say by placement.*.resources or labels what is to lie where ({HOW_TO_SEE})"
        )


def _too_large(plan: RuntimeArgs, nodes: Sequence[ClusterNode]) -> Iterator[str]:
    for bundle in {in_words(bundle): bundle for bundle in plan.bundles}.values():
        if not any(holds(node, bundle, node.total) for node in nodes):
            yield f"placement: no node of the cluster can hold {in_words(bundle)}: {_why_not(bundle, nodes)}"
    for role in Role:
        bundles = [bundle for bundle in plan.bundles if bundle.role is role]
        places = sum(num_places(node, bundles[0]) for node in nodes) if bundles else 0
        if 0 < places < len(bundles):
            yield (
                f"placement: the nodes of the cluster have places for {places} of {named(bundles)}; lower "
                f"{FEWER.get(role, 'what the others reserve')}, or add nodes ({HOW_TO_SEE})"
            )


def too_small(plan: RuntimeArgs, total: Mapping[str, float]) -> Iterator[str]:
    """Why a cluster that has so much in all can never place the plan."""
    needed = _sum_of(bundle.resources for bundle in plan.bundles)
    for kind, amount in needed.items():
        if amount > total.get(kind, 0.0) + ROUNDING:
            yield (
                f"resources: the plan needs {amount:g} {kind} but the Ray cluster has {total.get(kind, 0.0):g}; "
                "lower engines.*, learners.*, rollout.* or placement.*, or add nodes (`vlarl doctor CONFIG` prints "
                "the plan)"
            )


def _too_strict(plan: RuntimeArgs, nodes: Sequence[ClusterNode]) -> Iterator[str]:
    if plan.strategy == "STRICT_PACK" and _best_for_all(plan, nodes, [node.total for node in nodes]) is None:
        needed = _sum_of(bundle.resources for bundle in plan.bundles)
        labels = {f"{key}={value}": "" for bundle in plan.bundles for key, value in bundle.labels.items()}
        yield (
            f"placement.strategy: STRICT_PACK needs one node with {', '.join([resources_in_words(needed), *labels])}; "
            f"{_has(_nearest(nodes, needed), needed)}; use PACK, or reserve less"
        )
    elif plan.strategy == "STRICT_SPREAD" and (found := _matched(plan, nodes)) < len(plan.bundles):
        yield (
            f"placement.strategy: STRICT_SPREAD needs a node for each of {len(plan.bundles)} actors, and the "
            f"{len(nodes)} node(s) of the cluster can hold {found}; use SPREAD, or fewer actors"
        )


def _matched(plan: RuntimeArgs, nodes: Sequence[ClusterNode]) -> int:
    """How many bundles can have a whole node to themselves, by augmenting paths."""
    owner: dict[int, int] = {}

    def give(place: int, seen: set[int]) -> bool:
        for number, node in enumerate(nodes):
            if number in seen or not holds(node, plan.bundles[place], node.total):
                continue
            seen.add(number)
            if number not in owner or give(owner[number], seen):
                owner[number] = place
                return True
        return False

    return sum(give(place, set()) for place in range(len(plan.bundles)))


def _why_not(bundle: Bundle, nodes: Sequence[ClusterNode]) -> str:
    labelled = [node for node in nodes if has_labels(node, bundle)]
    for key, selector in bundle.labels.items():
        if not any(selects(selector, node.labels.get(key)) for node in nodes):
            there = sorted({node.labels[key] for node in nodes if key in node.labels})
            found = f"its values are {', '.join(there)}" if there else "no node has that label"
            return f"none has {key}={selector} ({found}); start one with ray start --labels={key}=..., or change it"
    for kind in bundle.resources:
        if kind not in ("CPU", "GPU") and not any(kind in node.total for node in nodes):
            return f"none has the resource {kind}; start one with ray start --resources='{{\"{kind}\": N}}'"
    if not labelled:
        return "no node has all its labels; change them, or start one with ray start --labels"
    nearest = _nearest(labelled, bundle.resources)
    short = [kind for kind, amount in bundle.resources.items() if nearest.total.get(kind, 0.0) < amount - ROUNDING]
    custom = any(kind not in ("CPU", "GPU") for kind in short)
    lower = f"lower placement.{SECTIONS[bundle.role]}.resources" if custom else LOWER[bundle.role]
    return f"{_has(nearest, bundle.resources, bool(bundle.labels))}; {lower}, or add a node ({HOW_TO_SEE})"


def _nearest(nodes: Sequence[ClusterNode], wanted: Mapping[str, float]) -> ClusterNode:
    """The node that has most of what is wanted."""
    return max(nodes, key=lambda n: sum(min(1.0, n.total.get(kind, 0.0) / amount) for kind, amount in wanted.items()))


def _has(node: ClusterNode, wanted: Mapping[str, float], labelled: bool = False) -> str:
    shown = resources_in_words({kind: node.total.get(kind, 0.0) for kind in wanted})
    if MEMORY in wanted:
        shown += f", {node.total.get(MEMORY, 0.0) / 1e9:.4g} GB of memory"
    return f"the largest one{' with its labels' if labelled else ''}, {node.address}, has {shown}"


def _sum(nodes: Sequence[ClusterNode]) -> dict[str, float]:
    return _sum_of(node.total for node in nodes)


def _sum_of(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for kind, amount in part.items():
            total[kind] = total.get(kind, 0.0) + amount
    return total
