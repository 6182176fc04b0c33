"""The whole loop inside one Ray: real vLLM, FSDP learner, environment subprocesses; and what happens when one of them is killed."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from vlarl_rllib import VLAPPO, VLAPPOConfig
from vlarl_rllib.settings import Settings

STEPS = 4 * 40
"""Steps of one iteration below: 4 slots of 40."""


@pytest.fixture(scope="module")
def algorithm(ray_session: None) -> Iterator[VLAPPO]:
    settings = Settings.from_dict(
        {
            "env": {"name": "synthetic", "tasks": [0, 1], "num_envs": 4, "num_processes": 2, "max_steps": 10},
            "rollout": {"steps_per_iteration": 40},
            "learners": {"num": 1, "micro_batch_size": 32},
            "training": {"minibatch_size": 80, "lr": 1e-4},
            "evaluation": {"episodes": 6},
            "run": {"iterations": 100, "seed": 1},
        }
    )
    algorithm = VLAPPOConfig.from_settings(settings).build_algo()
    yield algorithm
    algorithm.stop()


def train(algorithm: VLAPPO) -> dict[str, Any]:
    return algorithm.train()["vlarl"]


def kill_later(pid: int, seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, os.kill, (pid, signal.SIGKILL))
    timer.start()
    return timer


def environment_pids(algorithm: VLAPPO) -> list[int]:
    return algorithm.env_runner_group.foreach_env_runner(lambda runner: runner.env.processes.pids(), local_env_runner=False)[0]


def engine_pid(algorithm: VLAPPO) -> int:
    return algorithm.engine_pool.statuses()[0].pid


def test_sampled_log_probs_are_the_learners_and_versions_rise(algorithm: VLAPPO) -> None:
    first, second = train(algorithm), train(algorithm)
    assert first["initial_evaluation"]["episodes"] == 6 and set(first["initial_evaluation"]["success_rate_by_task"]) == {"0", "1"}
    assert first["evaluation"] is second["initial_evaluation"] is second["evaluation"] is None
    assert (first["env_steps"], second["env_steps"]) == (STEPS, 2 * STEPS)
    assert second["policy_version"] == first["policy_version"] + 1 == algorithm.engine_pool.statuses()[0].policy_version
    for row in (first, second):
        assert row["first_clip_fraction"] == 0.0
        assert row["first_ratio_deviation"] < 1e-4
        assert row["logprob_gap_max"] < 1e-4, "the engine sampled with other weights than the learner's"
        assert row["approx_kl"] > 0.0 and row["grad_norm"] > 0.0, "nothing was learned, so the equality above would mean nothing"
        assert row["episodes"] > 0 and row["sync_bytes"] > 1e6


def test_a_killed_environment_process_costs_its_running_episodes_only(algorithm: VLAPPO) -> None:
    before = train(algorithm)
    pids = environment_pids(algorithm)
    kill_later(pids[0], 0.5)
    row = train(algorithm)
    assert row["env_deaths"] >= 1, "the kill came too late to test anything"
    assert row["env_steps"] == before["env_steps"] + STEPS
    after = environment_pids(algorithm)
    assert after[0] != pids[0] and after[1] == pids[1]
    assert train(algorithm)["env_deaths"] == 0


def test_a_killed_engine_is_replaced_and_serves_the_current_weights(algorithm: VLAPPO) -> None:
    before = train(algorithm)
    pid = engine_pid(algorithm)
    kill_later(pid, 0.5)
    row = train(algorithm)
    assert row["engine_failures"] >= 1 and row["faults"]["engine_restarts"] == before["faults"]["engine_restarts"] + 1
    assert row["env_steps"] == before["env_steps"] + STEPS
    assert row["logprob_gap_max"] < 1e-4
    assert engine_pid(algorithm) != pid


def test_a_killed_runner_comes_back(algorithm: VLAPPO) -> None:
    before = train(algorithm)
    (pid,) = algorithm.env_runner_group.foreach_env_runner(lambda runner: os.getpid(), local_env_runner=False)
    children = environment_pids(algorithm)
    kill_later(pid, 0.5)
    row = train(algorithm)
    assert row["env_steps"] >= before["env_steps"] + STEPS
    assert row["logprob_gap_max"] < 1e-4
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{child}/environ") and _alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_alive(child) for child in children), "the dead runner's environments live on"


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_checkpoint_ends_the_running_episodes(algorithm: VLAPPO, tmp_path: Any) -> None:
    algorithm.save_checkpoint(str(tmp_path))
    assert (tmp_path / "facts.json").is_file() and (tmp_path / "learners" / "shards" / ".metadata").is_file()
    playing = algorithm.env_runner_group.foreach_env_runner(lambda runner: [p.playing for p in runner._players.values()], local_env_runner=False)
    assert playing == [[False] * 4]
    version = algorithm.weight_sync.version
    algorithm.load_checkpoint(str(tmp_path))
    assert algorithm.weight_sync.version == version + 1
    assert train(algorithm)["logprob_gap_max"] < 1e-4
