"""`vlarl dashboard`: what Prometheus and Grafana need to show runs, as files."""

from __future__ import annotations

import json
import os
import shlex
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from vlarl_rllib.observability.grafana import dashboard
from vlarl_rllib.process.console import make_console, pasted
from vlarl_rllib.process.own_files import replace_file
from vlarl_rllib.process.surroundings import ray_token, ray_token_file, user_directory
from vlarl_rllib.runs.scrape_targets import living_targets, targets_directory
from vlarl_rllib.settings import SettingsError

SCRAPE_SECONDS = 10
"""Ray's actors report as often."""
ANSWER_SECONDS = 5.0
PROMETHEUS, GRAFANA = "http://localhost:9090", "http://localhost:3000"
"""Where Ray's dashboard looks for them by itself."""
DISCOVERY = "/api/prometheus/sd"
"""Ray's list of the nodes to scrape."""
BOARD = "vlarl.json"
SECTIONS = """[server]
http_addr = 127.0.0.1

[security]
allow_embedding = true

[auth.anonymous]
enabled = true
org_role = Viewer

[paths]
provisioning = {provisioning}
data = {data}
"""


def write_dashboard(out: Path, address: str | None) -> None:
    """Write the configuration of Prometheus and Grafana into `out`, and say how to start them.

    Args:
        address: of a cluster's dashboard, http://host:8265; None = every Ray that runs on this machine.

    Raises:
        SettingsError: `address` is no such URL, or `out` no directory.
    """
    if address is not None:
        address = _checked(address)
    out = out.absolute()
    if out.exists() and not out.is_dir():
        raise SettingsError(f"--out: {out} is a file; name a directory, which may be a new one")
    console = make_console()
    files = _files(out, address)
    for file, content in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, content)
    console.print(f"{len(files)} files in {os.path.relpath(out)}")
    if address is not None:
        console.print(_answer_of(address))
    for folder in _provisioned_folders():
        replace_file(folder / BOARD, files[_board_of(out)])
        console.print(f"the dashboard is in {folder} too, where Ray's own configuration of Grafana looks")
    _say_how(console, out)


def _board_of(out: Path) -> Path:
    return out / "grafana" / "dashboards" / BOARD


def _files(out: Path, address: str | None) -> dict[Path, str]:
    grafana = out / "grafana"
    provisioning = grafana / "provisioning"
    source = {"name": "Prometheus", "type": "prometheus", "url": PROMETHEUS, "access": "proxy", "isDefault": True}
    source["jsonData"] = {"timeInterval": f"{SCRAPE_SECONDS}s"}
    folder = {"name": "vlarl", "folder": "vlarl", "type": "file", "options": {"path": str(_board_of(out).parent)}}
    return {
        out / "prometheus.yml": _yaml(scrape_configuration(address)),
        grafana / "grafana.ini": SECTIONS.format(provisioning=provisioning, data=grafana / "data"),
        provisioning / "datasources" / "vlarl.yml": _yaml({"apiVersion": 1, "datasources": [source]}),
        provisioning / "dashboards" / "vlarl.yml": _yaml({"apiVersion": 1, "providers": [folder]}),
        _board_of(out): json.dumps(dashboard(), indent=2) + "\n",
    }


def scrape_configuration(address: str | None) -> dict[str, Any]:
    """Prometheus's. On one machine the targets come from files, of a cluster from its head."""
    if address is None:
        ray_files = _directory_of_ray() / "prom_metrics_service_discovery.json"
        files = [f"{targets_directory()}/*.json", str(ray_files)]
        found: dict[str, Any] = {"file_sd_configs": [{"files": files, "refresh_interval": f"{SCRAPE_SECONDS}s"}]}
    else:
        discovery: dict[str, Any] = {"url": address + DISCOVERY, "refresh_interval": f"{SCRAPE_SECONDS}s"}
        if (token_file := ray_token_file()) is not None:
            discovery["authorization"] = {"type": "Bearer", "credentials_file": str(token_file)}
        found = {"http_sd_configs": [discovery]}
    interval = f"{SCRAPE_SECONDS}s"
    return {
        "global": {"scrape_interval": interval, "evaluation_interval": interval},
        "scrape_configs": [{"job_name": "ray", **found}],
    }


def _yaml(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False)


def _checked(address: str) -> str:
    if not address.startswith(("http://", "https://")):
        raise SettingsError(
            f"--address: {address!r} is no URL; give that of the cluster's dashboard, such as http://head:8265"
        )
    return address.rstrip("/")


def _answer_of(address: str) -> str:
    """What the head says to those who ask for its nodes, in a line."""
    request = urllib.request.Request(address + DISCOVERY)
    if token := ray_token():
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            targets = [target for group in json.load(answer) for target in group["targets"]]
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return (
                f"{address} does not take this token (HTTP {error.code}); put the cluster's into a file and name it in "
                "RAY_AUTH_TOKEN_PATH, here and where Prometheus runs"
            )
        return f"{address}{DISCOVERY} answers HTTP {error.code}; is it the URL of Ray's dashboard?"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{address} does not answer ({error}); the files are right once it does"
    if token and ray_token_file() is None:
        return (
            f"{address} has {len(targets)} targets, and wants a token, which is in RAY_AUTH_TOKEN alone: put it into "
            "~/.ray/auth_token for Prometheus, and write these files again"
        )
    return f"{address} has {len(targets)} targets: {', '.join(targets)}"


def _provisioned_folders() -> list[Path]:
    """Of this user's Rays that run on this machine: where a Grafana that was started with Ray's configuration looks for
    dashboards."""
    started = _directory_of_ray()
    places = [user_directory() / "ray"] if living_targets() else []
    places += [started] if (started / "ray_current_cluster").exists() else []
    folders = [place / "session_latest" / "metrics" / "grafana" / "dashboards" for place in places]
    return [folder.resolve() for folder in folders if folder.is_dir() and folder.stat().st_uid == os.getuid()]


def _directory_of_ray() -> Path:
    """Where a Ray lies that `ray start` has started."""
    return Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"


def _say_how(console: Console, out: Path) -> None:
    here = pasted(out)
    boards = shlex.quote(str(_board_of(out).parent))
    lines = (
        f"Prometheus, then at {PROMETHEUS}:",
        f"  prometheus --config.file={here}/prometheus.yml --storage.tsdb.path={here}/data "
        "--web.listen-address=127.0.0.1:9090",
        f"Grafana, then at {GRAFANA}, dashboard “vlarl runs” (--homepath is where it is installed):",
        f"  grafana server --homepath=/usr/share/grafana --config={here}/grafana/grafana.ini",
        "Ray's dashboard shows Grafana's panels of Ray itself where it was started with:",
        f"  export RAY_PROMETHEUS_HOST={PROMETHEUS} RAY_GRAFANA_HOST={GRAFANA}",
        f"  export RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR={boards}",
    )
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
