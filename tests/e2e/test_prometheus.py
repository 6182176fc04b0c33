"""A real Prometheus scrapes a real run, with what `vlarl dashboard` writes: every query of the Grafana dashboard brings
a number."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_helpers import CONFIG, Command

from vlarl_rllib.observability.grafana import WINDOW, dashboard
from vlarl_rllib.telemetry.table import METRICS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]
ABSENT = {metric.exported for metric in METRICS.values() if metric.needs in ("a GPU", "rewards.process")}
"""What the run below does not have."""
RUN = "scraped"
PATIENCE_SECONDS = 400.0
"""From the start of everything."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    while True:
        try:
            with urllib.request.urlopen(f"{url}/-/ready"):
                return
        except urllib.error.URLError:
            assert process.poll() is None, "Prometheus does not start"
            time.sleep(0.2)


@contextmanager
def prometheus(directory: Path, environment: dict[str, str]) -> Iterator[str]:
    """Prometheus with the configuration that the command writes, but scraping every second; its URL."""
    write = [sys.executable, "-m", "vlarl_rllib", "dashboard", "--out", str(directory)]
    subprocess.run(write, env=environment, check=True, capture_output=True)
    file = directory / "prometheus.yml"
    configuration = yaml.safe_load(file.read_text())
    configuration["global"] = {"scrape_interval": "1s"}
    file.write_text(yaml.safe_dump(configuration))
    address = f"127.0.0.1:{free_port()}"
    options = [f"--config.file={file}", f"--storage.tsdb.path={directory}/data", f"--web.listen-address={address}"]
    with (directory / "log.txt").open("w") as log:
        process = subprocess.Popen(["prometheus", *options], stdout=log, stderr=log)
        try:
            wait_until_ready(f"http://{address}", process)
            yield f"http://{address}"
        finally:
            process.terminate()
            process.wait(30)


@contextmanager
def train(root: Path, arguments: list[str], variables: dict[str, str]) -> Iterator[Command]:
    """A run that is gone afterwards, however the test ends."""
    run = Command(root, "train", *arguments, name=RUN, cwd=root, variables=variables)
    try:
        yield run
    finally:
        run.process.kill()


def series(url: str, query: str) -> list[dict[str, Any]]:
    """What Prometheus answers: of each series its labels and its number."""
    asked = query.replace(WINDOW, "20s").replace("$run", RUN)
    with urllib.request.urlopen(f"{url}/api/v1/query?{urllib.parse.urlencode({'query': asked})}") as answer:
        return [{**found["metric"], "value": float(found["value"][1])} for found in json.load(answer)["data"]["result"]]


def unanswered(url: str, queries: list[str]) -> list[str]:
    """Those that bring no series, or no number in any."""
    return [query for query in queries if not any(math.isfinite(found["value"]) for found in series(url, query))]


@pytest.mark.timeout(900)
def test_every_panel_of_the_dashboard_has_something_to_show(tmp_path: Path) -> None:
    panels = [panel for panel in dashboard()["panels"] if panel["type"] != "row"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    expected = [query for query in queries if not any(name in query for name in ABSENT)]
    assert len(queries) > len(expected) > 35

    settings = yaml.safe_load(CONFIG)
    settings |= {"engines": {"num": 1}, "learners": {"num": 1, "micro_batch_size": 16}}
    settings["evaluation"] = {"episodes": 2, "every": 1}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(settings))
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as scratch:
        variables = {"RAY_TMPDIR": scratch, "RAY_metrics_report_interval_ms": "1000"}
        arguments = ["t.yaml", "--run-dir", str(tmp_path / RUN)]
        with (
            prometheus(tmp_path / "dashboard", {**os.environ, **variables}) as url,
            train(tmp_path, arguments, variables) as run,
        ):
            deadline = time.monotonic() + PATIENCE_SECONDS
            while missing := unanswered(url, expected):
                assert run.process.poll() is None and time.monotonic() < deadline, (missing, run.output)
                time.sleep(1.0)
            (engine,) = series(url, "ray_vlarl_engine_policy_version")
            assert (engine["run"], engine["actor"], engine["suite"]) == (RUN, "engine-0", "synthetic")
            absent = [query for query in queries if query not in expected]
            assert unanswered(url, absent) == absent, "the table says that these need what the run does not have"
            faults = {found["kind"]: found["value"] for found in series(url, "ray_vlarl_faults")}
            assert faults["lost_output"] == 0, "a metric could not be told"
            run.process.send_signal(signal.SIGINT)
            assert run.end() == 130
        assert not list(Path(scratch).rglob("prometheus/*.json")), "the Ray has ended, and Prometheus would look for it"
