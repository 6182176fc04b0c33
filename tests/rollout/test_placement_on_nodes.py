"""Where Ray lays the bundles of a plan, on a cluster of three nodes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

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


def test_resources_labels_and_strategy_choose_the_nodes() -> None:
    """Nothing runs on the nodes, so what they say they have need not be there."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "labels": {"place": "head"}})
    try:
        cluster.add_node(num_cpus=4, num_gpus=2, labels={"place": "gpu"})
        cluster.add_node(num_cpus=4, resources={"farm": 2}, labels={"place": "farm"})
        asked = subprocess.run(
            [sys.executable, str(Path(__file__).parent / "lay_bundles.py")],
            input=json.dumps([BY_ROLE, PACKED, SPREAD, SPREAD_TOO_FAR]),
            env=os.environ | {"RAY_ADDRESS": cluster.address},
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        cluster.shutdown()
    assert asked.returncode == 0, asked.stderr
    by_role, packed, spread, too_far = json.loads(asked.stdout)
    assert by_role["runner"] == ["farm", "farm"]
    assert by_role["learner"] == ["gpu", "gpu"] and by_role["engine"] == ["gpu"]
    assert by_role["algorithm"] != ["farm"]
    assert len({node for role in packed.values() for node in role}) == 1
    assert sorted(node for role in spread.values() for node in role) == ["farm", "gpu", "head"]
    assert too_far is None
