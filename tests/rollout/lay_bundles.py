"""Run as a program: asks the Ray of RAY_ADDRESS for the places of several plans (settings, a JSON list on stdin), and
prints for each the `place` label of every actor's node by role, or null where there is no place for all of them."""

import json
import sys
from typing import Any

import ray
from ray.util import placement_group_table, remove_placement_group

from vlarl_rllib.rollout.placement import places
from vlarl_rllib.settings import Role, Settings, calculate_runtime_args


def laid(nodes: dict[str, str], sections: dict[str, Any]) -> dict[str, list[str]] | None:
    plan = calculate_runtime_args(Settings.from_dict(sections), cores=1)
    group = places(plan).to_placement_group()
    try:
        if not group.wait(2):
            return None
        where = placement_group_table(group)["bundles_to_node_id"]
        return {
            role.value: [nodes[where[place]] for place, bundle in enumerate(plan.bundles) if bundle.role is role]
            for role in Role
        }
    finally:
        remove_placement_group(group)


if __name__ == "__main__":
    ray.init(log_to_driver=False, logging_level="ERROR")
    labels = {node["NodeID"]: node["Labels"]["place"] for node in ray.nodes()}
    print(json.dumps([laid(labels, sections) for sections in json.load(sys.stdin)]))
