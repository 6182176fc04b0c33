"""`vlarl dashboard` as a user runs it."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

FILES = {
    "prometheus.yml",
    "grafana/grafana.ini",
    "grafana/provisioning/datasources/vlarl.yml",
    "grafana/provisioning/dashboards/vlarl.yml",
    "grafana/dashboards/vlarl.json",
}
TOKEN = "token-of-the-cluster"


class Head(BaseHTTPRequestHandler):
    """Ray's dashboard, as far as Prometheus asks it."""

    def do_GET(self) -> None:
        allowed = self.headers["Authorization"] == f"Bearer {TOKEN}"
        self.send_response(200 if allowed and self.path == "/api/prometheus/sd" else 401)
        self.end_headers()
        self.wfile.write(json.dumps([{"targets": ["10.0.0.1:8080", "10.0.0.2:8080"], "labels": {}}]).encode())

    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def place() -> Iterator[Path]:
    """Short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        yield Path(directory)


@pytest.fixture
def head() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Head)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def vlarl_dashboard(cwd: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RAY_TMPDIR": str(cwd), "HOME": str(cwd), "COLUMNS": "200", **variables}
    return subprocess.run(
        [sys.executable, "-m", "vlarl_rllib", "dashboard", *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True,
    )  # fmt: skip


def check_with_promtool(configuration: Path) -> None:
    if shutil.which("promtool"):
        done = subprocess.run(["promtool", "check", "config", configuration], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_on_one_machine_prometheus_follows_every_ray_of_this_user(place: Path) -> None:
    done = vlarl_dashboard(place, "--out", "here")
    assert done.returncode == 0, done.stderr
    out = place / "here"
    assert {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()} == FILES
    (job,) = yaml.safe_load((out / "prometheus.yml").read_text())["scrape_configs"]
    (found,) = job["file_sd_configs"]
    assert found["refresh_interval"] == "10s", "what is not there yet is looked for every five minutes otherwise"
    assert found["files"] == [
        f"{place}/vlarl-{os.getuid()}/prometheus/*.json",
        f"{place}/ray/prom_metrics_service_discovery.json",
    ]
    check_with_promtool(out / "prometheus.yml")
    folder = yaml.safe_load((out / "grafana/provisioning/dashboards/vlarl.yml").read_text())["providers"][0]
    assert (Path(folder["options"]["path"]) / "vlarl.json").is_file()
    assert str(out / "grafana/provisioning") in (out / "grafana/grafana.ini").read_text()
    for said in ("prometheus --config.file=", "grafana server", "RAY_PROMETHEUS_HOST=", "RAY_GRAFANA_HOST="):
        assert said in done.stdout


def test_of_a_cluster_prometheus_asks_the_head_with_the_token_file(place: Path, head: str) -> None:
    token = place / "token"
    token.write_text(TOKEN)
    done = vlarl_dashboard(place, "--address", f"{head}/", RAY_AUTH_TOKEN_PATH=str(token))
    assert done.returncode == 0, done.stderr
    assert f"{head} has 2 targets: 10.0.0.1:8080, 10.0.0.2:8080" in done.stdout
    out = place / "vlarl-dashboard"
    (job,) = yaml.safe_load((out / "prometheus.yml").read_text())["scrape_configs"]
    (found,) = job["http_sd_configs"]
    assert found["url"] == f"{head}/api/prometheus/sd"
    assert found["authorization"] == {"type": "Bearer", "credentials_file": str(token)}
    check_with_promtool(out / "prometheus.yml")
    assert not [file for file in out.rglob("*") if file.is_file() and TOKEN in file.read_text()], "a token in a file"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RAY_AUTH_TOKEN": "wrong"}, "does not take this token (HTTP 401)"),
        ({"RAY_AUTH_TOKEN": TOKEN}, "put it into ~/.ray/auth_token"),
    ],
)
def test_a_token_that_prometheus_cannot_use_is_told(
    place: Path, head: str, variables: dict[str, str], said: str
) -> None:
    done = vlarl_dashboard(place, "--address", head, **variables)
    assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr


def test_mistakes_are_refused_and_an_address_that_is_silent_is_told(place: Path) -> None:
    done = vlarl_dashboard(place, "--address", "head:8265")
    assert done.returncode == 2 and "head:8265" in done.stderr and "http://head:8265" in done.stderr
    (place / "file").touch()
    done = vlarl_dashboard(place, "--out", "file")
    assert done.returncode == 2 and "is a file" in done.stderr
    done = vlarl_dashboard(place, "--address", "http://127.0.0.1:9")
    assert done.returncode == 0 and "does not answer" in done.stdout
