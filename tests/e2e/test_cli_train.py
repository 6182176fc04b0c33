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

CONFIG = """
env: {name: synthetic, tasks: [0, 1], num_envs: 2, num_processes: 1, models_per_process: 2, max_steps: 8}
rollout: {steps_per_iteration: 16}
engines: {num: 0}
learners: {num: 0, micro_batch_size: 16}
training: {minibatch_size: 16, entropy_coeff: 0.01}
evaluation: {episodes: 0}
run: {iterations: 40, checkpoint_every: 100, dashboard: false}
"""


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


@pytest.mark.timeout(600)
def test_ctrl_c_and_sigterm_leave_a_checkpoint_and_nothing_else_and_resume_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(CONFIG)
    monkeypatch.setenv("VLARL_TEST_SESSION", str(os.getpid()))
    process = start(str(config), "--run-dir", str(run))
    deadline = time.monotonic() + 240
    while len(rows(run)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    output, _ = process.communicate(timeout=120)
    monkeypatch.delenv("VLARL_TEST_SESSION")
    assert process.returncode == 130, output
    done = rows(run)
    assert 2 <= len(done) < 40, output
    assert f"--resume --run-dir {os.path.relpath(run)}" in output
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"iteration_{len(done):06d}"]
    assert json.loads((run / "summary.json").read_text())["iterations"] == len(done)
    time.sleep(1.0)
    assert session_processes(str(os.getpid())) == []
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("vlarl-run")]

    resumed = start("--resume", "--run-dir", str(run))
    while len(rows(run)) < len(done) + 1 and resumed.poll() is None and time.monotonic() < deadline + 240:
        time.sleep(0.1)
    resumed.terminate()  # what a cluster's scheduler sends
    output, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, output
    assert len(rows(run)) < 40, "the signal came too late to test anything"

    last = start("--resume", "--run-dir", str(run))
    output, _ = last.communicate(timeout=300)
    assert last.returncode == 0, output
    after = rows(run)
    assert after[: len(done)] == done
    assert [row["iteration"] for row in after] == list(range(1, 41))
    assert [row["env_steps"] for row in after] == [32 * i for i in range(1, 41)]
    versions = [row["policy_version"] for row in after]
    assert all(a < b for a, b in itertools.pairwise(versions)), versions
    summary = json.loads((run / "summary.json").read_text())
    assert summary["iterations"] == 40 and summary["engine"] == "huggingface" and summary["logprob_gap"]["max"] < 1e-4


@pytest.mark.timeout(600)
def test_the_smoke_config_on_real_libero_with_real_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("VLARL_TEST_SESSION", f"{os.getpid()}-libero")
    overrides = ("run.iterations=2", "rollout.steps_per_iteration=8", "training.minibatch_size=16", "env.max_steps=6", "run.dashboard=false")
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
    assert summary["success_rate_initial"] is not None and summary["success_rate_final"] is not None
    assert session_processes(f"{os.getpid()}-libero") == []
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("vlarl-run")]
