"""Joining and starting Ray, with a Ray that answers as the real one does; the real one:
tests/e2e/test_untrusted_directory.py."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import AuthenticationError

from vlarl_rllib.ray_compat import ClusterNode
from vlarl_rllib.runs import ray_session
from vlarl_rllib.settings import Settings, SettingsError, calculate_runtime_args

SETTINGS = Settings.from_dict(
    {"env": {"name": "synthetic", "num_envs": 2, "num_processes": 1}, "engines": {"num": 0}, "learners": {"num": 0}}
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What `ray.init` is called with; nothing is started."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(ray_session, "check_ray", lambda: None)
    monkeypatch.setattr(ray_session, "user_directory", lambda: tmp_path)

    def init(**options: Any) -> SimpleNamespace:
        found.append(options | {"environment": dict(os.environ)})
        return SimpleNamespace(dashboard_url="10.0.0.1:8265")

    monkeypatch.setattr(ray, "init", init)
    node = ClusterNode("a", "10.0.0.1", {"CPU": 64.0}, {"CPU": 64.0}, {})
    monkeypatch.setattr(ray_session, "cluster_nodes", lambda: [node])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return found


def start() -> None:
    ray_session.start_ray(calculate_runtime_args(SETTINGS), SETTINGS)


def answering(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    """A cluster at RAY_ADDRESS whose metadata are `answer`, or a function that gives or raises them."""

    class Client:
        def __init__(self, address: str) -> None:
            assert address == "10.0.0.1:6379"

        def internal_kv_get(self, key: bytes, namespace: bytes, timeout: float) -> bytes:
            return answer() if callable(answer) else json.dumps(answer).encode()

    monkeypatch.setattr(ray._raylet, "GcsClient", Client)
    monkeypatch.setattr(ray_session, "_speaks_http2", lambda address: True)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")


def raising(error: Exception) -> Any:
    def answer() -> bytes:
        raise error

    return answer


def test_a_ray_of_our_own_is_private_and_imports_nothing_from_here(
    calls: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    start()
    (options,) = calls
    assert (options["address"], options["_temp_dir"]) == ("local", str(tmp_path / "ray"))
    assert options["job_config"]._client_job  # for which Ray adds no working directory
    assert options["environment"].items() - os.environ.items() == {("RAY_task_events_max_num_task_in_gcs", "10000")}


def test_a_program_that_imports_from_its_directory_goes_on_to(
    calls: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    start()
    assert not calls[0]["job_config"]._client_job


def test_the_token_is_its_users_alone(
    calls: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    start()
    file = tmp_path / ".ray" / "auth_token"
    token = file.read_text()
    assert len(token) == 64 and file.stat().st_mode & 0o777 == 0o600
    start()
    assert file.read_text() == token
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    monkeypatch.setenv("HOME", "/proc/absent")
    start()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_a_cluster_that_can_be_joined_is(calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, {"ray_version": ray.__version__})
    start()
    assert "num_cpus" not in calls[0] and "_temp_dir" not in calls[0]


def test_what_has_no_place_is_refused_told_or_waited_for(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two actors of 1 CPU: on a busy node, on one that is too small, and on one that will have company."""
    answering(monkeypatch, {"ray_version": ray.__version__})
    node = ClusterNode("a", "10.0.0.1", {"CPU": 2.0}, {"CPU": 1.0}, {})
    monkeypatch.setattr(ray_session, "cluster_nodes", lambda: [node])
    start()
    assert "no place yet for: runner (1 CPU); the run waits until others make room" in capsys.readouterr().out
    small = node._replace(total={"CPU": 1.0})
    monkeypatch.setattr(ray_session, "cluster_nodes", lambda: [small])
    with pytest.raises(SettingsError, match="the plan needs 2 CPU but the Ray cluster has 1"):
        start()
    patient = SETTINGS.replaced(placement={"wait_for_nodes": True})
    ray_session.start_ray(calculate_runtime_args(patient), patient)
    assert "no place yet for: runner (1 CPU); the run waits until nodes come that have it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (raising(AuthenticationError("wrong")), "does not take this token; set RAY_AUTH_MODE to token"),
        ({"ray_version": "2.9.0"}, f"runs Ray 2.9.0, this is {ray.__version__}; install the same version on both"),
        (raising(RuntimeError("RPC error:\n404")), r"no Ray cluster answers at 10.0.0.1:6379 \(RPC error: 404\)"),
        (lambda: b"<html>", "no Ray cluster answers at 10.0.0.1:6379"),
        (lambda: time.sleep(5) or b"{}", "no answer in 0.2 s; is it Ray's port?"),
    ],
    ids=["token", "version", "error", "something else", "silence"],
)
def test_a_cluster_that_cannot_be_joined_is_one_line(
    answer: Any, message: str, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_session, "PING_SECONDS", 0.2)
    answering(monkeypatch, answer)
    with pytest.raises(SettingsError, match=message) as caught:
        start()
    assert "\n" not in str(caught.value)
    assert calls == []


@pytest.mark.parametrize("error", [ConnectionError, OSError, RuntimeError, ValueError, AuthenticationError])
def test_what_ray_raises_is_one_line(
    error: type[Exception], calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: Any) -> None:
        raise error("for two\nreasons")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(SettingsError, match=r"^Ray cannot be started: .*for two reasons"):
        start()


@pytest.mark.parametrize(("mode", "more"), [("token", "; it asks for a token: ray get-auth-token"), ("disabled", "")])
def test_where_the_dashboard_is_and_how_to_get_in(
    mode: str,
    more: str,
    calls: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    start()
    assert capsys.readouterr().out == f"dashboard: http://10.0.0.1:8265{more}\n"


def test_what_is_no_ray_is_one_line_in_ten_seconds(tmp_path: Path) -> None:
    """The command as it is: something takes connections and says nothing."""
    (tmp_path / "config.yaml").write_text("env: {name: synthetic}\nengines: {num: 0}\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        command = [sys.executable, "-m", "vlarl_rllib", "train", "config.yaml"]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "RAY_ADDRESS": address},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 2
    *waiting, line = done.stderr.splitlines()
    assert line == f"vlarl: RAY_ADDRESS: no Ray cluster answers at {address} (no answer in 3 s; is it Ray's port?)"
    assert all(text.startswith("waiting for ") for text in waiting), "on a machine that is busy with something else"
