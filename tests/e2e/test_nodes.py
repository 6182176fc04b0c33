"""A run whose parts lie on nodes that share nothing but one directory; see `raylets.py`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from raylets import Raylets

from vlarl_rllib.models.presets import write_checkpoint
from vlarl_rllib.runs.checkpoints import CheckpointStore
from vlarl_rllib.runs.sealing import verify

CONFIG = """
env: {name: synthetic, tasks: [0, 1], num_envs: 2, num_processes: 1, models_per_process: 2, max_steps: 8}
rollout: {steps_per_iteration: 16}
engines: {num: 1}
learners: {num: 2, micro_batch_size: 16}
training: {minibatch_size: 16}
weights: {transport: object_store}
placement:
  algorithm: {labels: {place: head}}
  runners: {labels: {place: head}}
  engines: {labels: {place: engines}}
  learners: {resources: {learner: 1}}
evaluation: {episodes: 0}
run: {iterations: 2, checkpoint_every: 1, dashboard: false}
"""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Raylets]:
    with Raylets(num_cpus=2, labels={"place": "head"}) as cluster:
        cluster.add("engines", num_cpus=5, labels={"place": "engines"}, learner=1)
        cluster.add("learners", num_cpus=1, learner=1)
        (cluster.shared / "config.yaml").write_text(CONFIG)
        yield cluster


def train(nodes: Raylets, run: Path, *overrides: str) -> Any:
    return nodes.vlarl("train", f"{nodes.shared}/config.yaml", "--run-dir", str(run), *overrides)


def test_what_nodes_do_not_see_is_told_before_any_actor_starts(nodes: Raylets) -> None:
    private = train(nodes, nodes.private / "run")
    assert private.returncode == 2
    assert private.stderr.splitlines()[-1] == (
        f"vlarl: --run-dir: what is written to {nodes.private}/run is not seen on node engines (10.77.0.2), node "
        "learners (10.77.0.3); give a directory on storage that all nodes share, such as NFS, or a URI such as "
        "s3://bucket/runs/mine"
    )
    write_checkpoint("tiny", nodes.shared / "model")
    nodes.run("cp", "-r", f"{nodes.shared}/model", ".")
    lacking = train(nodes, nodes.shared / "lacking", "--set", "model.path=model")
    assert lacking.returncode == 2
    assert f"model.path: {nodes.private}/here/model is missing on node engines (10.77.0.2)" in lacking.stderr
    assert not list((nodes.shared / "lacking").glob("trial_*")), "a trial was started"


def test_three_nodes_train_as_one(nodes: Raylets) -> None:
    run = nodes.shared / "three"
    done = train(nodes, run)
    assert done.returncode == 0, done.stdout + done.stderr
    where = json.loads((run / "processes.json").read_text())["nodes"]
    assert where["algorithm"] == where["runner-1"] == "head (10.77.0.1)" and where["engine-0"] == "engines (10.77.0.2)"
    assert {where["learner-0"], where["learner-1"]} == {"engines (10.77.0.2)", "learners (10.77.0.3)"}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["policy_version"] for row in rows] == [2, 3]
    assert all(row["logprob_gap_max"] < 1e-4 for row in rows), "the engine has other weights than the learners"
    newest = CheckpointStore(run / "checkpoints", 1).newest()
    assert newest is not None and newest.name == "iteration_000002"
    verify(newest)

    alone = nodes.shared / "alone"
    done = train(nodes, alone, "--set", "placement={strategy: STRICT_PACK}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(json.loads((alone / "processes.json").read_text())["nodes"].values()) == {"engines (10.77.0.2)"}
    expected = [json.loads(line)["token_checksum"] for line in (alone / "metrics.jsonl").read_text().splitlines()]
    assert [row["token_checksum"] for row in rows] == expected
