"""What lies beneath the public surface of Ray about the nodes of a cluster, in one place: what to look at when Ray
changes (2.60)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vlarl_rllib.errors import one_line


def label_mistake(selectors: Sequence[Mapping[str, str]]) -> str | None:
    """What Ray has against these selectors of node labels, one mapping for each bundle."""
    if not any(selectors):
        return None
    from ray.util.placement_group import _validate_bundle_label_selector

    try:
        _validate_bundle_label_selector([dict(selector) for selector in selectors])
    except ValueError as error:
        return one_line(error)
    return None


class ClusterNode(NamedTuple):
    """A node that is alive."""

    node_id: str
    address: str
    """Of the network."""
    total: dict[str, float]
    """Of every resource."""
    free: dict[str, float]
    """The same, less what is reserved; without zeros."""
    labels: dict[str, str]


def node_names(nodes: Sequence[ClusterNode]) -> dict[str, str]:
    """What to call each node, by its id: as Ray's dashboard does, host and address."""
    import ray

    hosts = {node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for node in ray.nodes()}
    return {node.node_id: hosts.get(node.node_id, node.address) for node in nodes}


def cluster_nodes() -> list[ClusterNode]:
    """Those of the cluster that this process has joined, by address."""
    import ray

    free = ray._private.state.state.available_resources_per_node()
    found = [
        ClusterNode(
            node["NodeID"],
            node["NodeManagerAddress"],
            dict(node["Resources"]),
            dict(free.get(node["NodeID"], node["Resources"])),
            dict(node["Labels"]),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(found, key=lambda node: (node.address, node.node_id))


def unplaced_bundles(bundles: Sequence[Mapping[str, float]]) -> list[int] | None:
    """Which bundles of the placement group that asks for these have no node: of one that waits, or of one that has lost
    a node. None where no such group waits."""
    from ray.util import placement_group_table

    for group in placement_group_table().values():
        if group["state"] in ("PENDING", "RESCHEDULING") and list(group["bundles"].values()) == list(bundles):
            return [place for place, node in group["bundles_to_node_id"].items() if not node.strip("f")]
    return None


def nodes_of_actors(run: str) -> dict[str, str]:
    """Host name and address of the node of each living actor that this job has named `run/ROLE`, by role."""
    import ray

    nodes = {node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for node in ray.nodes()}
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    actors = ray._private.state.actors(job_id=job, actor_state_name="ALIVE").values()
    found = ((actor["Name"].rpartition("/"), actor["Address"]["NodeID"]) for actor in actors)
    return {role: nodes[node] for (owner, _, role), node in sorted(found) if owner == run and node in nodes}


def nodes_of_bundles() -> dict[int, str]:
    """Node of each bundle of the current placement group; "" for one whose node has died, until Ray finds another node
    for it. Empty outside of a group."""
    from ray.util.placement_group import get_current_placement_group, placement_group_table

    group = get_current_placement_group()
    return {} if group is None else placement_group_table(group)["bundles_to_node_id"]


def lost_bundles() -> set[int]:
    """Bundles of the current placement group that are on no node now."""
    return {index for index, node in nodes_of_bundles().items() if not node}
