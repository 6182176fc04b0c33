"""Nodes that die under a run and come back: it goes on with what is left, and grows back; see `raylets.py`."""

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psutil
import pytest
from raylets import PATIENCE_SECONDS, Raylets, interrupt

CONFIG = """
env: {name: synthetic, tasks: [0, 1], num_envs: 2, num_processes: 1, models_per_process: 2, max_steps: 8}
rollout: {num_runners: 2, steps_per_iteration: 16}
engines: {num: 1}
learners: {num: 2, micro_batch_size: 16, timeout_seconds: 90}
training: {minibatch_size: 32}
placement:
  algorithm: {labels: {place: head}}
  runners: {resources: {runner: 1}}
  engines: {labels: {place: engines}}
  learners: {resources: {learner: 1}}
evaluation: {episodes: 0}
run: {iterations: 100000, checkpoint_every: 2, dashboard: false}
"""
HALF, WHOLE = 2 * 16, 2 * 2 * 16
"""Steps of an iteration of one runner, and of both."""


class Run:
    """`vlarl train` on the head."""

    def __init__(self, nodes: Raylets) -> None:
        self.nodes, self.path = nodes, nodes.shared / "run"
        (nodes.shared / "config.yaml").write_text(CONFIG)
        command = [sys.executable, "-m", "vlarl_rllib", "train", f"{nodes.shared}/config.yaml"]
        self.process = nodes.popen(*command, "--run-dir", str(self.path))

    def rows(self) -> list[dict[str, Any]]:
        file = self.path / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line) for line in lines if line]

    def wait_for(self, what: str, condition: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
        """Rows, once the condition holds."""
        deadline = time.monotonic() + 2 * PATIENCE_SECONDS
        while not (rows := self.rows()) or not condition(rows):
            assert self.process.poll() is None, f"the run ended: {self.nodes.output()[-3000:]}"
            assert time.monotonic() < deadline, f"{what} did not come: {rows[-1:]} {self.nodes.output()[-3000:]}"
            time.sleep(0.1)
        return rows

    def steps(self) -> int:
        """Environment steps of the newest iteration that followed another one."""
        rows = self.rows()
        return rows[-1]["env_steps"] - rows[-2]["env_steps"]

    def process_of(self, role: str, node: str) -> psutil.Process:
        """The one of this role on the node: Ray lays bundles that ask for the same in any order."""
        for pid in json.loads((self.path / "processes.json").read_text())[f"{role}s"]:
            with suppress(LookupError):
                process = self.nodes.nodes[node].process(pid)
                if role in " ".join(process.cmdline()).lower():  # each node counts its processes for itself
                    return process
        raise LookupError(f"no {role} is on {node}")


@pytest.fixture
def nodes() -> Iterator[Raylets]:
    with Raylets(num_cpus=2, labels={"place": "head"}, runner=1) as cluster:
        cluster.add("engines", num_cpus=2, labels={"place": "engines"}, learner=1)
        cluster.add("spot", num_cpus=2, learner=1, runner=1)
        yield cluster


@pytest.mark.slow
def test_nodes_die_and_come_back_and_the_run_goes_on(nodes: Raylets) -> None:
    run = Run(nodes)
    run.wait_for("a third iteration", lambda rows: len(rows) > 2)
    assert run.steps() == WHOLE

    # A node is lost with a learner and a runner in the middle of sampling: the engine sleeps meanwhile.
    engine = run.process_of("engine", "engines")
    engine.suspend()
    nodes.kill("spot")
    time.sleep(1.0)
    engine.resume()
    rows = run.wait_for("an iteration without the node", lambda rows: rows[-1]["faults"]["node_losses"] == 1)
    before = len(rows)
    rows = run.wait_for("two more", lambda rows: len(rows) > before + 1)
    assert run.steps() == HALF and rows[-1]["faults"]["learner_restarts"] == 1

    nodes.add("new", num_cpus=2, learner=1, runner=1)
    run.wait_for("all runners", lambda rows: len(rows) > 2 and run.steps() == WHOLE)
    rows = run.wait_for("all learners", lambda rows: rows[-1]["seconds"]["recovery"] > 0)
    assert rows[-1]["faults"]["runner_restarts"] == 1 and rows[-1]["faults"]["trial_restarts"] == 0

    # And in the middle of an update, in which the other learner is asleep.
    learner = run.process_of("learner", "engines")
    learner.suspend()
    time.sleep(1.0)
    nodes.kill("new")
    learner.resume()
    run.wait_for("an iteration without the node", lambda rows: rows[-1]["faults"]["node_losses"] == 2)
    before = run.rows()[-1]["iteration"]
    rows = run.wait_for("two more", lambda rows: rows[-1]["iteration"] > before + 1)
    assert rows[-1]["faults"]["learner_restarts"] == 2 and rows[-1]["faults"]["trial_restarts"] == 0
    assert all(row["logprob_gap_max"] < 1e-4 for row in rows), "the engine has other weights than the learners"
    versions = [row["policy_version"] for row in rows]
    assert versions == sorted(set(versions))
    interrupt(run.process, signal.SIGTERM)
    assert run.process.wait(PATIENCE_SECONDS) == 0, nodes.output()[-3000:]
