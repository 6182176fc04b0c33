"""`vlarl doctor --cluster` on two nodes that share nothing but one directory; see `raylets.py`."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from raylets import Raylets

pytestmark = pytest.mark.slow

CONFIG = """
env: {name: synthetic, num_envs: 2, num_processes: 1}
rollout: {num_runners: 2}
placement: {runners: {resources: {farm: 1}}, learners: {labels: {place: head}}}
"""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Raylets]:
    with Raylets(num_cpus=4, labels={"place": "head"}) as cluster:
        cluster.add("farm", num_cpus=2, labels={"place": "farm"}, farm=2)
        (cluster.shared / "config.yaml").write_text(CONFIG)
        yield cluster


def doctor(nodes: Raylets, *arguments: str) -> Any:
    return nodes.vlarl("doctor", "--cluster", *arguments, COLUMNS="200")


def cells(table: str) -> str:
    return " ".join(re.sub(r"[│┃━┏┓┗┛┡┩┳┻╇└┘┴─┐┌┴]", " ", table).split())


def test_nodes_and_places_of_a_cluster_that_is_fit(nodes: Raylets) -> None:
    run = nodes.shared / "runs" / "first"
    done = doctor(nodes, f"{nodes.shared}/config.yaml", "--run-dir", str(run))
    assert done.returncode == 0, done.stdout + done.stderr
    said = cells(done.stdout)
    assert "head (10.77.0.1) 4 of 4 0 of 0" in said and "farm 2, place=farm" in said
    assert "2 x runner 1 CPU, farm 1 2 on farm (10.77.0.2) 2 on farm (10.77.0.2)" in said
    assert "1 x learner 1 CPU, place=head 4 on head (10.77.0.1) 1 on head (10.77.0.1)" in said
    assert said.endswith("2 node(s), and nothing wrong with them for this run")
    assert not run.exists() and not [*nodes.shared.glob(".nodes-*")], "it leaves nothing behind"


def test_what_is_wrong_is_a_line_each(nodes: Raylets) -> None:
    config = f"{nodes.shared}/config.yaml"
    done = doctor(nodes, config, "--run-dir", "runs/mine", "--set", "placement.runners.resources.farm=3")
    assert done.returncode == 1, done.stdout + done.stderr
    assert all(line.startswith("waiting for ") for line in done.stderr.splitlines()), "on a machine that is busy"
    lines = done.stdout.splitlines()
    assert any(line.startswith("placement: no node of the cluster can hold runner (1 CPU, farm 3)") for line in lines)
    seen = "is not seen on node farm (10.77.0.2); give a directory on storage that all nodes share"
    assert any(line.startswith("--run-dir: ") and seen in line for line in lines)
