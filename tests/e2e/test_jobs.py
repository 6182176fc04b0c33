"""`vlarl submit` and `vlarl jobs` against a real head with a token."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_helpers import CONFIG
from head_helpers import TOKEN, Head, free_ports

from vlarl_rllib.commands.jobs import Cluster
from vlarl_rllib.commands.submit import Submission, submit
from vlarl_rllib.models.fingerprint import model_fingerprints
from vlarl_rllib.process.surroundings import ray_token
from vlarl_rllib.runs.checkpoints import CheckpointStore
from vlarl_rllib.runs.directory import RunDirectory
from vlarl_rllib.settings import Settings, SettingsError

ROOT = Path(__file__).parents[2]
PYTHON = ("--python", sys.executable)
PATIENCE_SECONDS = 180.0
SECRET = "b" * 20 + "7" * 20


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    head = Head(4, tmp_path_factory.mktemp("head"))
    yield head
    head.stop()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """As somebody has it who works on the package."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tmp_path / "clone")], check=True)
    for changed in subprocess.run(
        ["git", "diff", "--name-only", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split():
        if (ROOT / changed).is_file():
            shutil.copy(ROOT / changed, tmp_path / "clone" / changed)
    return tmp_path / "clone"


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


def test_what_cannot_be_submitted_is_one_line_within_ten_seconds(
    head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # which Ray's client would take before what it is given
    small, large = (
        Settings.from_dict({"env": {"name": "synthetic"}, "engines": {"num": 0}, "rollout": {"num_runners": runners}})
        for runners in (1, 64)
    )
    to = Submission(tmp_path / "run", "vlarl submit")

    def refused(action: Callable[[], Any]) -> str:
        began = time.monotonic()
        with pytest.raises(SettingsError) as caught:
            action()
        assert time.monotonic() - began < 10
        line = str(caught.value)
        assert "\n" not in line and "Traceback" not in line and TOKEN not in line
        return line

    assert "wants a token, and there is none; set RAY_AUTH_TOKEN" in refused(lambda: Cluster(head.address))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 32)
    assert "does not take this token" in refused(lambda: Cluster(head.address))
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "RAY_AUTH_MODE is disabled; unset that" in refused(lambda: Cluster(head.address))
    monkeypatch.delenv("RAY_AUTH_MODE")
    (closed,) = free_ports(1)
    assert "nothing answers at" in refused(lambda: Cluster(f"http://127.0.0.1:{closed}"))
    assert "no Ray dashboard at" in refused(lambda: Cluster(f"127.0.0.1:{head.gcs_port}"))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "no Ray dashboard at" in refused(lambda: Cluster(f"127.0.0.1:{silent.getsockname()[1]}"))
    too_large = refused(lambda: submit(large, to, head.address))
    assert "the plan needs 66 CPU but the Ray cluster has 4" in too_large
    assert "JOB: 'absent' is not known" in refused(lambda: Cluster(head.address).stop("absent"))
    assert "JOB: 'absent' is not known" in refused(lambda: Cluster(head.address).follow("absent"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlarl_rllib.commands.submit.MAX_UPLOAD_BYTES", 1000)
        assert "a Ray cluster takes 0 MB at most" in refused(lambda: submit(small, to, head.address))
        # what the head itself refuses: the client does not know its limit
        patch.setattr("vlarl_rllib.commands.submit.MAX_UPLOAD_BYTES", 2**30)
        (tmp_path / "package").mkdir()
        (tmp_path / "package" / "large").write_bytes(os.urandom(101 * 2**20))
        patch.setattr("vlarl_rllib.commands.submit.PACKAGE", tmp_path / "package")
        assert "takes no upload of this size" in refused(
            lambda: submit(small, Submission(tmp_path / "run", "", code=True), head.address)
        )
    assert Cluster(head.address).jobs() == []


def test_a_job_runs_the_edited_code_in_the_run_directory_and_knows_no_secret(
    head: Head, clone: Path, tmp_path: Path
) -> None:
    """A run that is complete is the shortest that there is."""
    (tmp_path / "t.yaml").write_text(CONFIG)
    settings = Settings.from_yaml(tmp_path / "t.yaml", ["run.iterations=5"])
    run = RunDirectory(tmp_path / "runs" / "done already")
    with run.claimed(settings), CheckpointStore(run.path / "checkpoints", keep=1).writing(5) as directory:
        (directory / "learners").mkdir()
        (directory / "learners" / "rank_0").write_text("weights")
        facts = {"settings": settings.to_dict(), "models": model_fingerprints(settings), "algorithm": {}}
        CheckpointStore.write_facts(directory, iteration=5, policy_version=6, **facts)
    edit(clone / "vlarl_rllib/cli/training.py", "iterations: nothing is left to do", "iterations, says the edited code")
    arguments = [str(tmp_path / "t.yaml"), "--set", "run.iterations=5", "--run-dir", str(run.path), *PYTHON]

    done = head.vlarl("submit", *arguments, "--code", "--follow", package=clone, WANDB_API_KEY=SECRET)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "has all its 5 iterations, says the edited code" in done.stdout and done.stderr == ""
    assert "MB: the config and" in done.stdout and "succeeded" in done.stdout.splitlines()[-1]

    (job,) = jobs_of(head)
    assert job["submission_id"].startswith("done-already-20") and job["metadata"]["run_dir"] == str(run.path)
    assert job["metadata"]["git"].endswith("-dirty") and "--set run.iterations=5" in job["metadata"]["command"]
    assert job["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "50"}
    assert SECRET not in json.dumps(job) and TOKEN not in json.dumps(job)
    listed = head.vlarl("jobs", "list").stdout.splitlines()
    assert listed[1].startswith(job["submission_id"]) and listed[1].endswith(str(run.path))
    assert "says the edited code" in head.vlarl("jobs", "logs", job["submission_id"]).stdout


def jobs_of(head: Head) -> list[dict[str, Any]]:
    """As the dashboard tells them."""
    from urllib.request import Request, urlopen

    request = Request(f"{head.address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
    with urlopen(request, timeout=10) as answer:
        return [job for job in json.load(answer) if job["submission_id"]]


def wait_until(condition: Callable[[], Any], output: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, output()
        time.sleep(0.2)


@pytest.mark.slow
def test_a_run_is_submitted_followed_stopped_edited_submitted_again_and_resumed(
    head: Head, clone: Path, tmp_path: Path
) -> None:
    (tmp_path / "t.yaml").write_text(CONFIG)
    run = RunDirectory(tmp_path / "run")
    arguments = ["submit", str(tmp_path / "t.yaml"), "--run-dir", str(run.path), *PYTHON, "--code", "--follow"]

    def started(name: str, *more: str) -> tuple["subprocess.Popen[str]", Callable[[], str]]:
        file = tmp_path / f"{name}.txt"
        command = [sys.executable, "-m", "vlarl_rllib", *arguments, *more, "--address", head.address]
        process = subprocess.Popen(
            command, env=head.client(clone), cwd=tmp_path, stdout=file.open("w"), stderr=subprocess.STDOUT
        )
        return process, file.read_text

    first, output = started("first")
    wait_until(lambda: len(run.read_rows()) >= 2, output)
    job = next(job["submission_id"] for job in jobs_of(head) if job["status"] == "RUNNING")
    again = head.vlarl(*arguments[:-1])
    assert again.returncode == 2 and f"job {job} is at {run.path}; stop it with: vlarl jobs stop {job}" in again.stderr
    first.send_signal(signal.SIGINT)
    assert first.wait(30) == 130 and f"{job} runs on; follow it with: vlarl jobs logs {job} --follow" in output()
    before = len(run.read_rows())
    wait_until(lambda: len(run.read_rows()) > before, output)

    stopped = head.vlarl("jobs", "stop", job)
    kept = len(run.read_rows())
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert f"stopped with a checkpoint of iteration {kept}" in stopped.stdout
    assert "go on with the same command: vlarl submit " in stopped.stdout
    newest = run.newest_checkpoint()
    assert newest is not None and CheckpointStore.read_facts(newest)["iteration"] == kept

    edit(clone / "vlarl_rllib/commands/train.py", 'f"run directory {shown', 'f"edited: run directory {shown')
    second, output = started("second", "--set", f"run.iterations={kept + 2}")
    assert second.wait(PATIENCE_SECONDS) == 0, output()
    assert f"edited: run directory {run.path}" in output() and "Traceback" not in output()
    assert [row["iteration"] for row in run.read_rows()] == list(range(1, kept + 3))


@pytest.mark.slow
def test_a_drained_node_ends_the_run_with_a_checkpoint_and_the_code_that_asks_for_more(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (tmp_path / "t.yaml").write_text(CONFIG)
    run = RunDirectory(tmp_path / "run")
    head = Head(4, tmp_path_factory.mktemp("drained"))
    try:
        command = [sys.executable, "-m", "vlarl_rllib", "submit", str(tmp_path / "t.yaml"), "--run-dir", str(run.path)]
        file = tmp_path / "output.txt"
        following = subprocess.Popen(
            [*command, *PYTHON, "--follow", "--address", head.address],
            env=head.client(), stdout=file.open("w"), stderr=subprocess.STDOUT,
        )  # fmt: skip
        wait_until(lambda: len(run.read_rows()) >= 2, file.read_text)
        node = run_on(head, "import ray; ray.init(); print(ray.nodes()[0]['NodeID'])").split()[-1]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--node-id", node]
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        reason += ["--deadline-remaining-seconds", "60", "--address", f"127.0.0.1:{head.gcs_port}"]
        environment = head.client(RAY_AUTH_MODE="token")
        subprocess.run([*ray, *reason], env=environment, check=True, capture_output=True)
        assert following.wait(60) == 75, file.read_text()
        assert "is going to be taken away in" in file.read_text() and "failed with exit code 75" in file.read_text()
        newest = run.newest_checkpoint()
        assert newest is not None and CheckpointStore.read_facts(newest)["iteration"] == len(run.read_rows())
    finally:
        head.stop()


def run_on(head: Head, code: str) -> str:
    environment = head.client(RAY_AUTH_MODE="token", RAY_ADDRESS=f"127.0.0.1:{head.gcs_port}")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_the_token_is_found_where_ray_looks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ray_token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(f"{TOKEN}\n")
    assert ray_token() == TOKEN
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    assert ray_token() is None
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    assert ray_token() == "given"
