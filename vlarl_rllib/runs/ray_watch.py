"""Notices that Ray itself has died. Calls to it then wait for minutes, or for ever, and so would the command."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as CallTimeout
from contextlib import contextmanager

import psutil
import ray

from vlarl_rllib.process.signals import END
from vlarl_rllib.rllib_compat import draining_nodes, nodes_in_use

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
GRACE_SECONDS = 3.0
"""For the main thread to end by itself."""
CLUSTER_SECONDS = 20.0
"""A cluster whose GCS does not answer for so long, twice, is gone."""
PROCESSES = ("raylet", "gcs_server")


@contextmanager
def ray_watched() -> Iterator[None]:
    """End this process, by `END.lost`, when a process of its own Ray dies, or the cluster that it joined does not know
    this node any more; by `END.warn` when a node that it works on is drained."""
    stop = threading.Event()
    own = [child for child in psutil.Process().children() if child.name() in PROCESSES]
    threading.Thread(
        target=_watch_own if own else _watch_cluster, args=(own, stop), name="vlarl-ray-watch", daemon=True
    ).start()
    try:
        yield
    finally:
        stop.set()


def _watch_own(processes: list[psutil.Process], stop: threading.Event) -> None:
    names = {process.pid: process.name() for process in processes}
    while not stop.wait(LOOK_SECONDS):
        for process in processes:
            if not _is_alive(process):
                _end(f"Ray has ended: its {names[process.pid]} (process {process.pid}) died", stop)
                return


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _watch_cluster(processes: list[psutil.Process], stop: threading.Event) -> None:
    node, failures, is_warned = ray.get_runtime_context().get_node_id(), 0, False
    pool = ThreadPoolExecutor(1)
    while not stop.wait(LOOK_SECONDS * 5):
        try:
            alive = any(
                known["NodeID"] == node and known["Alive"] for known in pool.submit(ray.nodes).result(CLUSTER_SECONDS)
            )
            if not is_warned and (notice := pool.submit(_drain_notice).result(CLUSTER_SECONDS)):
                is_warned = True
                END.warn(notice)
            failures = 0
        except (CallTimeout, ray.exceptions.RayError) as error:
            logger.debug("the cluster does not answer: %s", error)
            alive, failures = True, failures + 1
        if not alive or failures > 1:
            _end(
                "Ray has ended: " + ("the cluster does not answer" if alive else "the cluster has lost this node"), stop
            )
            return


def _drain_notice() -> str | None:
    """What is told where a node that this run works on is about to be taken away."""
    draining = draining_nodes()
    for node in nodes_in_use() & draining.keys() if draining else ():
        at = draining[node]
        when = f" in {max(0.0, at - time.time()):.0f} s" if at is not None else ""
        address = next((known["NodeManagerAddress"] for known in ray.nodes() if known["NodeID"] == node), node)
        return f"the node at {address} is going to be taken away{when}"
    return None


def _end(cause: str, stop: threading.Event) -> None:
    if not stop.wait(GRACE_SECONDS):
        END.lost(cause)
