"""The Ray that a command works in: the cluster that RAY_ADDRESS names, or one of its own."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

os.environ.setdefault("RAY_task_events_max_num_task_in_gcs", "10000")  # Ray remembers 100,000 calls for its dashboard, at 3 KB each
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # runners reserve no GPU but render on one

import ray

from vlarl_rllib.ray_watch import ray_watched
from vlarl_rllib.settings import RuntimeArgs, Settings, SettingsError
from vlarl_rllib.signals import END, children_outlive_the_terminal
from vlarl_rllib.weights.shared_memory import reap_stale


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
        SettingsError: where the plan can never be placed.
    """
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if not os.environ.get("RAY_ADDRESS"):
        cpus = max(os.cpu_count() or 1, int(-(-plan.total_cpus // 1)))
        options |= {"address": "local", "num_cpus": cpus, "include_dashboard": settings.run.dashboard}
    # ray.init() sets a SIGTERM handler of its own, which would end this process with code 15.
    with children_outlive_the_terminal(), patch.object(ray._private.utils, "set_sigterm_handler", lambda handler: None):
        ray.init(**options)
    available = ray.cluster_resources()
    for kind, needed in (("CPU", plan.total_cpus), ("GPU", plan.total_gpus)):
        if needed > available.get(kind, 0.0):
            raise SettingsError(
                f"resources: the plan needs {needed:g} {kind} but the Ray cluster has {available.get(kind, 0.0):g}; "
                "lower engines.*, learners.* or rollout.*, or add nodes (`vlarl doctor CONFIG` prints the plan)"
            )
