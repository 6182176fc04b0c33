"""Does anything grow? Memory and file descriptors of every process through hundreds of iterations and
thousands of resets."""

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from vlarl_rllib.envs.vector import SlotProcesses
from vlarl_rllib.types import EnvSpec

ITERATIONS = 320
STEPS = 4 * 16
CONFIG = f"""
env: {{name: synthetic, tasks: [0, 1], num_envs: 4, num_processes: 2, max_steps: 8, max_resets_per_process: null}}
rollout: {{steps_per_iteration: 16}}
learners: {{num: 1, micro_batch_size: 32}}
training: {{minibatch_size: 64}}
evaluation: {{episodes: 0}}
run: {{iterations: {ITERATIONS}, checkpoint_every: 20, dashboard: false}}
"""
MAX_GROWTH = 0.02
"""Of resident memory between the first third of a run and its end."""
SLACK_MB = 2.0
"""What an allocator may round to; more than 2 % of Ray's smallest processes."""


class Gauge:
    """Resident memory and file descriptors of named processes over time."""

    def __init__(self) -> None:
        self.rss: dict[str, list[float]] = defaultdict(list)
        self.fds: dict[str, list[int]] = defaultdict(list)

    def read(self, pids: dict[str, int]) -> None:
        for name, pid in pids.items():
            process = psutil.Process(pid)
            self.rss[name].append(process.memory_info().rss / 2**20)
            self.fds[name].append(process.num_fds())

    def report(self) -> list[str]:
        """Prints a table; what grew too much."""
        grown = []
        print(f"\n{'process':16} {'MB at 1/3':>10} {'MB at end':>10} {'growth':>8} {'fds':>10}")
        for name, values in self.rss.items():
            window = max(1, len(values) // 10)
            third = len(values) // 3
            before, after = (float(np.median(part)) for part in (values[third : third + window], values[-window:]))
            fds = self.fds[name]
            print(f"{name:16} {before:10.1f} {after:10.1f} {after / before - 1:8.2%} {fds[third]:4} -> {fds[-1]:3}")
            if after > before * (1 + MAX_GROWTH) + SLACK_MB:
                grown.append(f"{name}: {before:.0f} -> {after:.0f} MB")
            if max(fds[-window:]) > max(fds[third : third + window]) + 2:
                grown.append(f"{name}: {fds[third]} -> {fds[-1]} file descriptors")
        return grown


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nothing_grows_in_hundreds_of_iterations(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    run, gauge = tmp_path / "run", Gauge()
    # Ray's GCS remembers so many calls (3 KB each) for the dashboard: here so few that it has them all by the first
    # third.
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_task_events_max_num_task_in_gcs": "1500"}
    with (tmp_path / "output.txt").open("w") as output:
        command = [sys.executable, "-m", "vlarl_rllib", "train", str(tmp_path / "config.yaml"), "--run-dir", str(run)]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        request.addfinalizer(process.kill)
        while not (run / "processes.json").exists():
            assert process.poll() is None, (tmp_path / "output.txt").read_text()
            time.sleep(0.2)
        pids = name_processes(process.pid, run)
        while iterations(run) < ITERATIONS - 1:
            gauge.read(pids)
            time.sleep(2.0)
        assert process.wait(120) == 0
    summary = json.loads((run / "summary.json").read_text())
    print(
        "\n"
        + ", ".join(
            f"{name} {summary[name]:.0f}"
            for name in ("iterations", "policy_version", "env_steps", "episodes", "wall_seconds")
        )
    )
    assert summary["policy_version"] > 300 and summary["env_steps"] >= 20_000 and summary["episodes"] >= 2_000
    assert gauge.report() == []


def iterations(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def name_processes(driver: int, run: Path) -> dict[str, int]:
    """Ours, and Ray's own, which must not grow for our sake."""
    roles = json.loads((run / "processes.json").read_text())
    runner = roles["runners"]["1"]
    pids = {
        "driver": driver,
        "algorithm": roles["algorithm"],
        "runner": runner["runner"],
        "engine": roles["engines"][0],
    }
    pids |= {
        "learner": roles["learners"][0],
        "environment 0": runner["environments"][0],
        "environment 1": runner["environments"][1],
    }
    return pids | {
        child.name(): child.pid
        for child in psutil.Process(driver).children()
        if child.name() in ("raylet", "gcs_server")
    }


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_libero_does_not_grow_in_two_thousand_resets() -> None:
    spec = EnvSpec(name="libero", suite="libero_spatial", image_size=224, fast_render=True, max_steps=3)
    processes = SlotProcesses(spec, [0], num_processes=1)
    gauge = Gauge()

    def play(command: Callable[..., None], *arguments: object) -> None:
        command(0, *arguments)
        while not (events := processes.poll(1.0)):
            pass
        assert events[0].kind in ("reset", "step"), events[0].error

    try:
        for i in range(2_000):
            play(processes.send_reset, 0, i % 40, i)
            play(processes.send_actions, np.array([[0.1, 0, 0, 0, 0, 0, -1.0]]))
            if i % 20 == 0:
                gauge.read({"LIBERO": processes.pids()[0]})
    finally:
        processes.close()
    assert gauge.report() == []
