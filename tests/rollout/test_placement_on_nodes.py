"""Where Ray lays the bundles of a plan, on a cluster of three nodes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

pytestmark = pytest.mark.slow

CREW: dict[str, Any] = {
    "env": {"name": "synthetic"},
    "rollout": {"num_runners": 2},
    "learners": {"num": 2},
    "engines": {"num": 1},
}
BY_ROLE = CREW | {
    "engines": {"num": 1, "gpus": 1},
    "learners": {"num": 2, "gpus": 0.5},
    "placement": {
        "algorithm": {"labels": {"place": "!farm"}},
        "runners": {"resources": {"farm": 1}},
        "learners": {"labels": {"place": "in(gpu, tpu)"}},
    },
}
PACKED = CREW | {"rollout": {"num_runners": 1}, "learners": {"num": 1}, "placement": {"strategy": "STRICT_PACK"}}
SPREAD = CREW | {"rollout": {"num_runners": 1}, "learners": {"num": 0}, "placement": {"strategy": "STRICT_SPREAD"}}
SPREAD_TOO_FAR = CREW | {"placement": {"strategy": "STRICT_SPREAD"}}  # six actors, three nodes

LABELLED = PACKED | {"placement": {"strategy": "STRICT_PACK", "algorithm": {"labels": {"place": "farm"}}}}
COLOCATED = CREW | {
    "rollout": {"num_runners": 1},
    "engines": {"num": 1, "gpus": 0.5},
    "learners": {"num": 1, "gpus": 0.5},
}
WIDE = CREW | {"rollout": {"num_runners": 2}, "learners": {"num": 1}, "placement": {"strategy": "SPREAD"}}


def nodes_of(laid: dict[str, list[str]] | None) -> list[str] | None:
    """Of all actors: which of several that ask for the same goes where, Ray leaves to its sort."""
    return laid and sorted(node for role in laid.values() for node in role)


def test_resources_labels_and_strategy_choose_the_nodes() -> None:
    """Nothing runs on the nodes, so what they say they have need not be there."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "labels": {"place": "head"}})
    try:
        cluster.add_node(num_cpus=5, num_gpus=2, labels={"place": "gpu"})
        cluster.add_node(num_cpus=4, resources={"farm": 2}, labels={"place": "farm"})
        asked = subprocess.run(
            [sys.executable, str(Path(__file__).parent / "lay_bundles.py")],
            input=json.dumps([BY_ROLE, PACKED, SPREAD, SPREAD_TOO_FAR, LABELLED, COLOCATED, WIDE]),
            env=os.environ | {"RAY_ADDRESS": cluster.address},
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        cluster.shutdown()
    assert asked.returncode == 0, asked.stderr
    for foreseen, found in json.loads(asked.stdout):
        assert nodes_of(foreseen) == nodes_of(found)
    by_role, packed, spread, too_far, labelled, colocated, wide = (found for _, found in json.loads(asked.stdout))
    assert by_role["runner"] == ["farm", "farm"]
    assert by_role["learner"] == ["gpu", "gpu"] and by_role["engine"] == ["gpu"]
    assert by_role["algorithm"] != ["farm"]
    assert len(set(nodes_of(packed) or ())) == 1
    assert nodes_of(spread) == ["farm", "gpu", "head"]
    assert too_far is None
    assert set(nodes_of(labelled) or ()) == {"farm"}
    assert colocated["engine"] == colocated["learner"] == colocated["runner"] == ["gpu"]
    assert set(nodes_of(wide) or ()) == {"farm", "gpu", "head"}
