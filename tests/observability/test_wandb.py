"""Weights & Biases, without a run: what it is told, and what becomes of its trouble. A run's is in tests/e2e."""

import itertools
import os
import pickle
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vlarl_rllib.observability.wandb_logger import run_id
from vlarl_rllib.observability.wandb_run import WandbRun, numbers_of
from vlarl_rllib.process import surroundings
from vlarl_rllib.settings import Settings

ROW = {
    "iteration": 3, "env_steps": 96, "success_rate": None, "success_rate_by_task": {"4": 0.5},
    "git_revision": "0123456789ab", "seconds": {"sample": 1.5}, "applied": {"lr": 1e-5},
    "initial_evaluation": None, "evaluation": None,
}  # fmt: skip


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def wandb_run(directory: Path) -> WandbRun:
    directory.mkdir(exist_ok=True)
    options = {"project": "test", "name": "run", "id": run_id(directory), "group": "sweep"}
    return WandbRun(str(directory), Settings().to_dict(), options, {})


def test_a_rows_numbers() -> None:
    odd = {"self_test": {"passed": True, "reason": "none", "bounds": {"gap": 0.5, "ratio": None}}}
    assert dict(numbers_of(ROW | odd)) == {
        "self_test/passed": True, "self_test/bounds/gap": 0.5,
        "env_steps": 96, "seconds/sample": 1.5, "applied/lr": 1e-5, "success_rate_by_task/4": 0.5,
    }  # fmt: skip


def test_a_directory_is_one_run_and_another_of_its_name_is_another(tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "my run/läuft: #1", tmp_path / "b" / "my run/läuft: #1"
    ids = [run_id(first), run_id(first), run_id(second)]
    assert ids[0] == ids[1] != ids[2]
    assert all(re.fullmatch(r"l-uft-1-[0-9a-f]{8}", one) for one in ids)
    assert len(run_id(tmp_path / ("x" * 200))) <= 128


@pytest.mark.parametrize("content", ["", "a/b", "id\n\nmore", "x" * 200])
def test_an_id_that_is_none_is_not_taken(content: str, tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "id.txt").write_text(content)
    assert run_id(tmp_path).startswith(tmp_path.name) and run_id(tmp_path) == run_id(tmp_path)


def test_an_id_behind_a_link_out_of_the_run_is_not_taken(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "wandb").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (run / "wandb" / "id.txt").symlink_to(tmp_path / "secret")
    assert run_id(run).startswith("run-") and (tmp_path / "secret").read_text() == "secret"


def test_where_wandb_does_not_answer_the_run_is_kept_to_be_sent_and_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr("vlarl_rllib.observability.wandb_run.INIT_SECONDS", 1.0)
    run = wandb_run(tmp_path / "run")
    trouble = run.log(ROW)
    assert trouble is not None and "\n" not in trouble and "connection refused" in trouble
    assert f"send it later with: wandb sync {tmp_path}/run/wandb/offline-run-" in trouble
    assert run.log(ROW | {"iteration": 4}) is None and run.finish() is None
    [file] = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    assert b"seconds" in file.read_bytes()
    links = [link for link in (tmp_path / "run").rglob("*") if link.is_symlink()]
    assert links == [], "a link to W&B's log in the home directory would keep the run from being resumed"


def test_wandb_that_fails_altogether_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def init(**options: Any) -> Any:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(wandb, "init", init)
    run = wandb_run(tmp_path / "run")
    assert run.log(ROW) == run.log(ROW | {"iteration": 4})
    assert "an iteration is not on W&B (OSError: [Errno 28] No space left on device)" in str(run.log(ROW))
    assert run.finish() is None


@dataclass(eq=False)
class FakeTrial:
    config: dict[str, Any]


@pytest.mark.timeout(120)
def test_a_process_that_dies_is_replaced_and_told_and_ends_nothing(
    ray_session: None, offline: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    from vlarl_rllib.observability.wandb_logger import wandb_logger

    tmp_path.joinpath("run").mkdir()
    sampled = {"training.lr": 3e-5}
    trial = FakeTrial({"run_dir": str(tmp_path / "run"), "vla": Settings().to_dict(), "sampled": sampled})
    callback = wandb_logger("test", "sweep")
    callback.on_trial_start(0, [], trial)

    def log(iteration: int) -> int:
        """Returns how many parts of the run there are."""
        row = ROW | {"iteration": iteration}
        callback.on_trial_result(iteration, [], trial, {"vlarl": row, "vlarl_details": {}, "config": {}})
        callback._tell(60.0)
        return len(list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb")))

    assert log(1) == 1
    time.sleep(1.0)  # W&B names a part by its second
    ray.kill(callback._actors[trial], no_restart=False)
    iterations = itertools.count(2)
    while log(next(iterations)) == 1:  # until the old process is gone; the test's own limit ends it
        time.sleep(0.2)
    ray.kill(callback._actors[trial], no_restart=True)
    while not caplog.records:
        log(next(iterations))
    assert log(next(iterations)) == 2
    told = [record.getMessage() for record in caplog.records if "W&B" in record.getMessage()]
    assert sum("has died" in line for line in told) == 1 and all(line.endswith("; the run goes on") for line in told)
    callback.on_trial_complete(5, [], trial)
    callback.on_experiment_end([])
    assert pickle.loads(pickle.dumps(callback))._group == "sweep"


def test_a_host_that_does_not_answer_is_told_before(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert surroundings.wandb_is_not_reached() == "Connection refused"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert surroundings.wandb_is_not_reached() is None
