"""`vlarl train` as a user runs it: Ctrl-C, resume, what is left behind. Hugging Face sampler, so that it starts fast."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from vlarl_rllib.rewards.classifier import ClassifierConfig, SuccessClassifier

CONFIG = """
env: {name: synthetic, tasks: [0, 1], num_envs: 2, num_processes: 1, models_per_process: 2, max_steps: 8}
rollout: {steps_per_iteration: 16}
engines: {num: 0}
learners: {num: 0, micro_batch_size: 16}
training: {minibatch_size: 16, entropy_coeff: 0.01}
evaluation: {episodes: 0}
run: {iterations: 30, checkpoint_every: 100, dashboard: false}
"""
ITERATIONS = 30


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        [sys.executable, "-m", "vlarl_rllib", "train", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True,
    )  # fmt: skip


def rows(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def session_processes(session: str) -> list[str]:
    """Command lines of live processes that the run started (Ray starts its own sessions, so go by the parent's environment)."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        try:
            if process.info["status"] != psutil.STATUS_ZOMBIE and process.environ().get("VLARL_TEST_SESSION") == session:
                found.append(" ".join(process.info["cmdline"]))
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    return found


def wait_until_gone(session: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while session_processes(session) and time.monotonic() < deadline:
        time.sleep(0.2)


def weights_in_shared_memory() -> set[str]:
    """Directories of publishers, other runs' on this machine included."""
    return {name for name in os.listdir("/dev/shm") if name.startswith("vlarl-run")}


def wait_for_rows(run: Path, number: int, process: subprocess.Popen[str], seconds: float = 240) -> list[dict[str, Any]]:
    deadline = time.monotonic() + seconds
    while len(rows(run)) < number and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert process.poll() is None, process.communicate()[0]
    assert len(rows(run)) >= number, f"{len(rows(run))} iterations within {seconds} s"
    return rows(run)


def algorithm_pid(run: Path) -> int:
    return json.loads((run / "processes.json").read_text())["algorithm"]


@pytest.mark.timeout(900)
def test_a_run_survives_ctrl_c_and_the_death_of_its_processes_and_ends_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(CONFIG)
    monkeypatch.setenv("VLARL_TEST_SESSION", str(os.getpid()))

    others = weights_in_shared_memory()

    process = start(str(config), "--run-dir", str(run))
    wait_for_rows(run, 2, process)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    done = rows(run)
    assert 2 <= len(done) < ITERATIONS, output
    assert "SIGINT: ending within 25 s" in output and f"stopped with a checkpoint of iteration {len(done)}; continue" in output
    assert f"--resume --run-dir {os.path.relpath(run)}" in output
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"iteration_{len(done):06d}"]
    assert json.loads((run / "summary.json").read_text())["iterations"] == len(done)
    wait_until_gone(str(os.getpid()), 15)
    assert session_processes(str(os.getpid())) == []
    assert weights_in_shared_memory() <= others

    killed = start("--resume", "--run-dir", str(run))
    wait_for_rows(run, len(done) + 1, killed)
    killed.kill()
    killed.communicate()
    assert len(rows(run)) < ITERATIONS, "the kill came too late to test anything"
    wait_until_gone(str(os.getpid()), 60)
    assert session_processes(str(os.getpid())) == [], "a killed driver left processes"

    resumed = start("--resume", "--run-dir", str(run))
    stale = algorithm_pid(run)
    deadline = time.monotonic() + 240
    while algorithm_pid(run) == stale and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.0)
    before = rows(run)
    os.kill(algorithm_pid(run), signal.SIGKILL)
    output, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, output
    assert "it starts anew from its newest checkpoint" in output
    summary = json.loads((run / "summary.json").read_text())
    assert summary["faults"]["trial_restarts"] == 1 and summary["wall_seconds"] > 0
    after = rows(run)
    for row in before[len(done) :]:  # what was played again came out the same
        assert after[row["iteration"] - 1]["token_checksum"] == row["token_checksum"]
    assert after[: len(done)] == done
    assert [row["iteration"] for row in after] == list(range(1, ITERATIONS + 1))
    assert [row["env_steps"] for row in after] == [32 * i for i in range(1, ITERATIONS + 1)]
    versions = [row["policy_version"] for row in after]
    assert all(a < b for a, b in itertools.pairwise(versions)), versions


@pytest.mark.timeout(600)
def test_the_smoke_config_on_real_libero_with_real_vllm_and_a_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, judge, others = tmp_path / "run", tmp_path / "judge", weights_in_shared_memory()
    SuccessClassifier(ClassifierConfig(28, ("bowl", "plate"))).save(judge)
    monkeypatch.setenv("VLARL_TEST_SESSION", f"{os.getpid()}-libero")
    overrides = ["run.iterations=2", "rollout.steps_per_iteration=8", "training.minibatch_size=16", "env.max_steps=6", "run.dashboard=false"]
    overrides += ["rewards.process=0.1", f"rewards.judge={judge}"]
    process = start("configs/libero_smoke_cpu.yaml", "--run-dir", str(run), *(part for override in overrides for part in ("--set", override)))
    output, _ = process.communicate(timeout=500)
    monkeypatch.delenv("VLARL_TEST_SESSION")
    assert process.returncode == 0, output
    first, second = rows(run)
    assert first["policy_version"] < second["policy_version"]
    assert first["initial_evaluation"]["episodes"] == second["evaluation"]["episodes"] == 2
    assert first["approx_kl"] > 0.0 and max(row["first_ratio_deviation"] for row in (first, second)) < 1e-4
    summary = json.loads((run / "summary.json").read_text())
    assert summary["env_steps"] == 64 and summary["engine"] == "vllm" and summary["versions"]["mujoco"].startswith("3.3.")
    assert summary["faults"]["reward_zeros"] == summary["faults"]["reward_cpu_retries"] == 0, "the reward worker was there from the start"
    assert summary["success_rate_initial"] is not None and summary["success_rate_final"] is not None
    wait_until_gone(f"{os.getpid()}-libero", 15)
    assert session_processes(f"{os.getpid()}-libero") == []
    assert weights_in_shared_memory() <= others
