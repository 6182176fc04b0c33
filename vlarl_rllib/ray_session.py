"""The Ray that a command works in: the cluster that RAY_ADDRESS names, or one of its own."""

from __future__ import annotations

import json
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("RAY_task_events_max_num_task_in_gcs", "10000")  # Ray remembers 100,000 calls for its dashboard, at 3 KB each
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # runners reserve no GPU but render on one

import ray
from ray.exceptions import RayError
from ray.job_config import JobConfig
from ray.tune.execution import class_cache

from vlarl_rllib.console import make_console
from vlarl_rllib.import_path import is_import_path
from vlarl_rllib.own_files import replace_file
from vlarl_rllib.ray_watch import ray_watched
from vlarl_rllib.settings import RuntimeArgs, Settings, SettingsError
from vlarl_rllib.signals import END, children_outlive_the_terminal
from vlarl_rllib.surroundings import check_ray, cluster_address, has_ray_token, home_is_writable, user_directory
from vlarl_rllib.weights.shared_memory import reap_stale

PING_SECONDS = 3.0
"""Something that takes connections and has not answered as Ray does by then is no Ray."""
PATIENCE_SECONDS = 10.0
"""Between two lines that say that Ray is still being started."""


@contextmanager
def ray_session(plan: RuntimeArgs, settings: Settings) -> Iterator[None]:
    """`start_ray`, and the end of what it started; nothing of both where a session is there already.

    A signal while Ray starts raises KeyboardInterrupt behind that. Where Ray itself dies, the process ends (`END.lost`).
    """
    if ray.is_initialized():
        yield
        return
    END.sweep = reap_stale
    try:
        with END.deferred():
            start_ray(plan, settings)
        with ray_watched():
            yield
    finally:
        with END.polled():
            ray.shutdown()
            reap_stale()


def start_ray(plan: RuntimeArgs, settings: Settings) -> None:
    """Join the cluster that RAY_ADDRESS names, or start a Ray of our own that is large enough for the plan.

    Raises:
        SettingsError: it cannot be joined or started, or the plan can never be placed.
    """
    check_ray()
    _keep_secrets_out_of_runtime_environments()
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "job_config": _job_config()}
    address = cluster_address()
    if address is None:
        what = "Ray"
        cpus = max(os.cpu_count() or 1, int(-(-plan.total_cpus // 1)))
        # Ray opens its directory to everybody, so it is one in a directory that is not open.
        directory = str(user_directory() / "ray")
        options |= {"address": "local", "num_cpus": cpus, "include_dashboard": settings.run.dashboard, "_temp_dir": directory}
        _make_token()
    else:
        what = "the Ray cluster of this machine" if address == "auto" else f"the Ray cluster at {address}"
        if address != "auto":
            _ping(address)
    # ray.init() sets a SIGTERM handler of its own, which would end this process with code 15.
    its_handler = patch.object(ray._private.utils, "set_sigterm_handler", lambda handler: None)
    with _saying_so(f"waiting for {what}"), children_outlive_the_terminal(), its_handler:
        try:
            ray.init(**options)
        except (RayError, ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise SettingsError(f"{what} cannot be {'started' if address is None else 'joined'}: {' '.join(str(error).split())}") from error
    available = ray.cluster_resources()
    for kind, needed in (("CPU", plan.total_cpus), ("GPU", plan.total_gpus)):
        if needed > available.get(kind, 0.0):
            raise SettingsError(
                f"resources: the plan needs {needed:g} {kind} but the Ray cluster has {available.get(kind, 0.0):g}; "
                "lower engines.*, learners.* or rollout.*, or add nodes (`vlarl doctor CONFIG` prints the plan)"
            )


def _make_token() -> None:
    """Ray would write the token of a Ray that it starts for everybody to read, and fail without a home directory to write it to."""
    if has_ray_token() or os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return
    token = secrets.token_hex(32)
    if not home_is_writable():
        os.environ["RAY_AUTH_TOKEN"] = token
        return
    file = Path.home() / ".ray" / "auth_token"
    file.parent.mkdir(mode=0o700, exist_ok=True)
    replace_file(file, token, mode=0o600)


def _keep_secrets_out_of_runtime_environments() -> None:
    """Tune hands AWS keys to a trial as its runtime environment, which Ray writes into logs and sends to its dashboard.

    A trial of ours reads and writes directories only, and on this machine it has the driver's environment variables anyway.
    """
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in class_cache.ENV_VARS_TO_PROPAGATE if not name.startswith("AWS_")}


def _job_config() -> JobConfig:
    """Workers look for modules where this process does: Ray would add the working directory for them, unless told that it is a client's."""
    return JobConfig(_client_job=not is_import_path(os.getcwd()))


def _ping(address: str) -> None:
    """Raise `SettingsError` unless a Ray of this version answers, to our token; `ray.init` tries for minutes to find out."""
    answer: list[str | BaseException] = []

    def ask() -> None:
        try:
            metadata = ray._raylet.GcsClient(address=address).internal_kv_get(b"CLUSTER_METADATA", b"cluster", timeout=PING_SECONDS)
            answer.append(json.loads(metadata)["ray_version"])
        except Exception as error:  # whatever it is that answers there
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    with _silent_stderr():
        thread.start()
        thread.join(PING_SECONDS)
    found = answer[0] if answer else TimeoutError(f"no answer in {PING_SECONDS:g} s; is it Ray's port?")
    if isinstance(found, ray.exceptions.AuthenticationError):
        mode = os.environ.get("RAY_AUTH_MODE", "not set")
        raise SettingsError(
            f"RAY_ADDRESS: the cluster at {address} does not take this token; set RAY_AUTH_MODE to token (it is {mode}) and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH to the cluster's"
        )
    if isinstance(found, BaseException):
        raise SettingsError(f"RAY_ADDRESS: no Ray cluster answers at {address} ({' '.join(str(found).split())})")
    if found != ray.__version__:
        raise SettingsError(f"RAY_ADDRESS: the cluster at {address} runs Ray {found}, this is {ray.__version__}; install the same version on both")


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


@contextmanager
def _saying_so(what: str) -> Iterator[None]:
    """A line on stderr every `PATIENCE_SECONDS`."""
    over, began = threading.Event(), time.monotonic()

    def speak() -> None:
        while not over.wait(PATIENCE_SECONDS):
            make_console(stderr=True).print(f"{what} ... {time.monotonic() - began:.0f} s")

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
