"""The Ray that a command works in: the cluster that RAY_ADDRESS names, or one of its own."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from vlarl_rllib.process.console import make_console, saying_so
from vlarl_rllib.process.environment import environment_defaults
from vlarl_rllib.process.import_path import is_import_path
from vlarl_rllib.process.own_files import replace_file
from vlarl_rllib.process.signals import END, children_outlive_the_terminal
from vlarl_rllib.process.storage import Place
from vlarl_rllib.process.surroundings import check_ray, cluster_address, has_ray_token, home_is_writable, user_directory
from vlarl_rllib.ray_compat import ClusterNode, cluster_nodes
from vlarl_rllib.rllib_compat import apart_from_our_signals, job_config, ray_version_at
from vlarl_rllib.runs.nodes import NOTHING, Reads, check_nodes
from vlarl_rllib.runs.places import check_places, named, without_a_place
from vlarl_rllib.runs.ray_watch import ray_watched
from vlarl_rllib.runs.scrape_targets import scrape_target
from vlarl_rllib.settings import RuntimeArgs, Settings, SettingsError

PING_SECONDS = 3.0
"""Something that takes connections and has not answered as Ray does by then is no Ray."""
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
"""RFC 9113, section 3.4: what a client begins with, an empty frame of settings behind it."""
SETTINGS_FRAME = 4


@contextmanager
def ray_session(
    plan: RuntimeArgs, settings: Settings, run: Place | None = None, reads: Reads = NOTHING
) -> Iterator[None]:
    """`start_ray`, and the end of what it started; nothing of both where a session is there already. In a cluster the
    nodes are asked for what actors need there (`check_nodes`, of the last two arguments too).

    A signal while Ray starts raises KeyboardInterrupt behind that. Where Ray itself dies, the process ends
    (`END.lost`).
    """
    if ray.is_initialized():
        yield
        return
    try:
        with END.deferred():
            start_ray(plan, settings)
        if cluster_address() is not None:
            check_nodes(plan, settings, run, reads)
        with ray_watched(), scrape_target() if cluster_address() is None else nullcontext():
            yield
    finally:
        with END.polled():
            ray.shutdown()


def start_ray(plan: RuntimeArgs, settings: Settings) -> None:
    """Join the cluster that RAY_ADDRESS names, or start a Ray of our own that is large enough for the plan.

    Raises:
        SettingsError: it cannot be joined or started, or the plan can never be placed.
    """
    cpus = max(os.cpu_count() or 1, int(-(-plan.total_cpus // 1)))
    dashboard = connect({"num_cpus": cpus, "include_dashboard": settings.run.dashboard})
    look_for_places(plan, cluster_nodes(), wait=settings.placement.wait_for_nodes)
    if dashboard:
        make_console().print(f"dashboard: http://{dashboard}{_how_to_get_in()}", style="dim")


def connect(own: Mapping[str, Any]) -> str | None:
    """Join the cluster that RAY_ADDRESS names, or start a Ray of our own with these options; the dashboard's host and
    port.

    Raises:
        SettingsError: it cannot be joined or started.
    """
    check_ray()
    options: dict[str, Any] = {
        "logging_level": logging.ERROR,
        "log_to_driver": False,
        "job_config": job_config(imports_from_here=is_import_path(os.getcwd())),
    }
    address = cluster_address()
    if address is None:
        what = "Ray"
        # Ray opens its directory to everybody, so it is one in a directory that is not open.
        options |= {"address": "local", "_temp_dir": str(user_directory() / "ray"), **own}
        _make_token()
    else:
        what = "the Ray cluster of this machine" if address == "auto" else f"the Ray cluster at {address}"
        if address != "auto":
            _ping(address)
    with (
        saying_so(what),
        children_outlive_the_terminal(),
        apart_from_our_signals(),
        # Ray remembers 100,000 calls for its dashboard, at 3 KB each.
        environment_defaults(RAY_task_events_max_num_task_in_gcs="10000"),
    ):
        try:
            return ray.init(**options).dashboard_url
        except (RayError, ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise SettingsError(
                f"{what} cannot be {'started' if address is None else 'joined'}: {' '.join(str(error).split())}"
            ) from error


def _how_to_get_in() -> str:
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return ""
    if home_is_writable():
        return "; it asks for a token: ray get-auth-token"
    return "; it asks for a token, the one in RAY_AUTH_TOKEN where you have set it"


def look_for_places(plan: RuntimeArgs, nodes: Sequence[ClusterNode], *, wait: bool) -> None:
    """Say what has no place on these nodes yet, since others use them.

    Args:
        wait: say the same of what they can never hold (`placement.wait_for_nodes`).

    Raises:
        SettingsError: they can never hold the plan, and it is not to wait.
    """
    if not wait:
        check_places(plan, nodes)
    if lacking := without_a_place(plan, nodes):
        until = "nodes come that have it" if without_a_place(plan, nodes, free=False) else "others make room"
        make_console().print(f"no place yet for: {named(lacking)}; the run waits until {until}", style="yellow")


def _make_token() -> None:
    """Ray would write the token of a Ray that it starts for everybody to read, and fail without a home directory to
    write it to."""
    if has_ray_token() or os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return
    token = secrets.token_hex(32)
    if not home_is_writable():
        os.environ["RAY_AUTH_TOKEN"] = token
        return
    file = Path.home() / ".ray" / "auth_token"
    file.parent.mkdir(mode=0o700, exist_ok=True)
    replace_file(file, token, mode=0o600)


def _ping(address: str) -> None:
    """Raise `SettingsError` unless a Ray of this version answers, to our token; `ray.init` tries for minutes to find
    out."""
    answer: list[str | BaseException] = []

    def ask() -> None:
        try:
            answer.append(ray_version_at(address, PING_SECONDS))
        except Exception as error:  # whatever it is that answers there
            answer.append(error)

    if not _speaks_http2(address):  # Ray's client would still be at it, and crash, while this process ends
        raise SettingsError(
            f"RAY_ADDRESS: no Ray cluster answers at {address} (no answer in {PING_SECONDS:g} s; is it Ray's port?)"
        )
    thread = threading.Thread(target=ask, daemon=True)
    with _silent_stderr():
        thread.start()
        thread.join(PING_SECONDS)
    found = answer[0] if answer else TimeoutError(f"no answer in {PING_SECONDS:g} s; is it Ray's port?")
    if isinstance(found, ray.exceptions.AuthenticationError):
        mode = os.environ.get("RAY_AUTH_MODE", "not set")
        raise SettingsError(
            f"RAY_ADDRESS: the cluster at {address} does not take this token; set RAY_AUTH_MODE to token (it is "
            f"{mode}) and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH to the cluster's"
        )
    if isinstance(found, BaseException):
        raise SettingsError(f"RAY_ADDRESS: no Ray cluster answers at {address} ({' '.join(str(found).split())})")
    if found != ray.__version__:
        raise SettingsError(
            f"RAY_ADDRESS: the cluster at {address} runs Ray {found}, this is {ray.__version__}; install the "
            "same version on both"
        )


def _speaks_http2(address: str) -> bool:
    """Whether what listens there answers as gRPC's servers do; taken for granted where the line is encrypted."""
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return True
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=PING_SECONDS) as connection:
            connection.sendall(HTTP2_PREFACE)
            frame = connection.recv(9)
    except OSError:
        return False
    return len(frame) == 9 and frame[3] == SETTINGS_FRAME


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Without what Ray's C++ part writes there, which Python cannot filter, before the one line that says it."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
