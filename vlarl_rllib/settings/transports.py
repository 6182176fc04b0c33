"""Weight transports by name. The contract of their classes is `vlarl_rllib/weights/protocol.py`.

An installed package adds one through an entry point:

    [project.entry-points."vlarl_rllib.transports"]
    fast_network = "my_cluster.weights:FastNetwork"
"""

from __future__ import annotations

import importlib.util
from typing import Any

from vlarl_rllib.errors import SettingsError
from vlarl_rllib.process.plugins import added_by_packages, load_class

AUTO = "auto"
"""Chosen by where learners and engines are, once they are there (`weights/placement.py`)."""
OBJECT_STORE, CUDA_IPC, NIXL = "object_store", "cuda_ipc", "nixl"
TRANSPORTS = {
    OBJECT_STORE: "vlarl_rllib.weights.ray_transports:ObjectStoreTransport",
    CUDA_IPC: "vlarl_rllib.weights.ray_transports:CudaIpcTransport",
    NIXL: "vlarl_rllib.weights.ray_transports:NixlTransport",
}
"""`module:Class` of the transports that come with the package, by name."""
PARTS = ("lends_tensors", "put", "get", "free", "obstacle")
"""What `WeightTransport` asks of a class, so that another one is refused before any actor starts."""


def nixl_is_installed() -> bool:
    """In this process's environment."""
    return importlib.util.find_spec("nixl") is not None


def require_installed(transport: str) -> None:
    """Raise `SettingsError` where this environment lacks what the transport needs."""
    if transport == NIXL and not nixl_is_installed():
        raise SettingsError(
            "weights.transport: nixl needs the package nixl in the environment of every node, and here it is not "
            "installed; run: pip install 'vlarl-rllib[nixl]', or use auto"
        )


def transports() -> dict[str, str]:
    """`module:Class` by name: what installed packages add, and the package's own, which win."""
    return added_by_packages("vlarl_rllib.transports") | TRANSPORTS


def transport_reference(name: str) -> str:
    """`module:Class` of what `weights.transport` means, or may mean; nothing is imported.

    Raises ValueError for what is neither a known name nor of that form. The text does not say of which key.
    """
    reference = transports().get(OBJECT_STORE if name == AUTO else name, name)
    if not all(reference.partition(":")):
        raise ValueError(f"choose one of {', '.join((AUTO, *transports()))}, or name a class as module:Class")
    return reference


def transport_class(name: str) -> Any:
    """The class that `weights.transport` means; importing it may import torch or Ray.

    Raises:
        ValueError: there is none, or it is no transport. The text says what to do, and not of which key.
    """
    reference = transport_reference(name)
    try:
        found = load_class(reference)
    except ValueError as error:
        raise ValueError(f"no such class, since {error}") from error
    if missing := [part for part in PARTS if not hasattr(found, part)]:
        raise ValueError(f"the class has no {missing[0]}, so it is no vlarl_rllib.weights.protocol.WeightTransport")
    return found
