"""What lies beneath the public surface of Ray about the nodes of a cluster, in one place: what to look at when Ray
changes (2.60)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


def nodes_of_bundles() -> dict[int, str]:
    """Node of each bundle of the current placement group; "" for one whose node has died, until Ray finds another node
    for it. Empty outside of a group."""
    from ray.util.placement_group import get_current_placement_group, placement_group_table

    group = get_current_placement_group()
    return {} if group is None else placement_group_table(group)["bundles_to_node_id"]


def lost_bundles() -> set[int]:
    """Bundles of the current placement group that are on no node now."""
    return {index for index, node in nodes_of_bundles().items() if not node}


def nodes_of_actors(run: str) -> dict[str, str]:
    """Host name and address of the node of each living actor that this job has named `run/ROLE`, by role."""
    import ray

    nodes = {node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for node in ray.nodes()}
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    actors = ray._private.state.actors(job_id=job, actor_state_name="ALIVE").values()
    found = ((actor["Name"].rpartition("/"), actor["Address"]["NodeID"]) for actor in actors)
    return {role: nodes[node] for (owner, _, role), node in sorted(found) if owner == run and node in nodes}
