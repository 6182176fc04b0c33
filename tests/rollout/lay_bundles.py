"""Run as a program: asks the Ray of RAY_ADDRESS for the places of several plans (settings, a JSON list on stdin), and
prints for each the `place` label of every actor's node by role, null where there is no place for all of them; and the
same as `lay` foresees it."""

import json
import sys
from typing import Any

import ray
from ray.util import placement_group_table, remove_placement_group

from vlarl_rllib.ray_compat import cluster_nodes
from vlarl_rllib.rollout.placement import places
from vlarl_rllib.runs.places import lay
from vlarl_rllib.settings import Role, RuntimeArgs, Settings, calculate_runtime_args


def by_role(plan: RuntimeArgs, where: list[str]) -> dict[str, list[str]]:
    return {
        role.value: [at for at, bundle in zip(where, plan.bundles, strict=True) if bundle.role is role] for role in Role
    }


def foreseen(sections: dict[str, Any]) -> dict[str, list[str]] | None:
    plan, nodes = calculate_runtime_args(Settings.from_dict(sections), cores=1), cluster_nodes()
    where = lay(plan, nodes)
    return None if None in where else by_role(plan, [nodes[number or 0].labels["place"] for number in where])


def laid(nodes: dict[str, str], sections: dict[str, Any]) -> dict[str, list[str]] | None:
    plan = calculate_runtime_args(Settings.from_dict(sections), cores=1)
    group = places(plan).to_placement_group()
    try:
        if not group.wait(2):
            return None
        where = placement_group_table(group)["bundles_to_node_id"]
        return by_role(plan, [nodes[where[place]] for place in range(len(plan.bundles))])
    finally:
        remove_placement_group(group)


if __name__ == "__main__":
    ray.init(log_to_driver=False, logging_level="ERROR")
    labels = {node["NodeID"]: node["Labels"]["place"] for node in ray.nodes()}
    plans = json.load(sys.stdin)
    expected = [foreseen(sections) for sections in plans]  # while nothing is reserved
    print(json.dumps([*zip(expected, (laid(labels, sections) for sections in plans), strict=True)]))
