"""Which transport can serve between the places where a run's processes are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlarl_rllib.settings import SettingsError
from vlarl_rllib.settings.transports import AUTO, CUDA_IPC, NIXL, OBJECT_STORE, nixl_is_installed
from vlarl_rllib.types import Site
from vlarl_rllib.weights import find_transport


@dataclass(frozen=True, slots=True)
class Choice:
    """How weights travel."""

    name: str
    why: str


def own_place(device: str, *, takes_part: bool) -> Site:
    """Of this process.

    Args:
        device: on which it computes, "cpu" or "cuda".
        takes_part: whether it is an actor with `tensor_transport_options`.
    """
    import ray
    import torch

    gpu = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid) if device == "cuda" else ""
    direct = set()
    if takes_part:
        direct = ({CUDA_IPC} if gpu else set()) | ({NIXL} if nixl_is_installed() else set())
    return Site(ray.get_runtime_context().get_node_id() if ray.is_initialized() else "", gpu, frozenset(direct))


def choose_transport(wanted: str, learner: Site, engines: Sequence[Site]) -> Choice:
    """What `weights.transport` means between the first learner and these engines; without engines, runners read.

    Raises:
        SettingsError: what is named cannot serve there; one line.
    """
    if wanted != AUTO:
        if obstacle := find_transport(wanted).obstacle(learner, engines):
            raise SettingsError(f"weights.transport: {wanted}: {obstacle}")
        return Choice(wanted, "weights.transport names it")
    if not engines:
        return Choice(OBJECT_STORE, "the runners sample themselves")
    obstacles = {name: find_transport(name).obstacle(learner, engines) for name in (CUDA_IPC, NIXL)}
    if obstacles[CUDA_IPC] is None:
        return Choice(CUDA_IPC, "learner and engines share one GPU")
    if all(place.gpu for place in (learner, *engines)):
        if obstacles[NIXL] is None:
            return Choice(NIXL, "learner and engines are on different GPUs, and all have nixl")
        return Choice(
            OBJECT_STORE, f"learner and engines are on different GPUs, and nixl cannot serve: {obstacles[NIXL]}"
        )
    return Choice(OBJECT_STORE, "not all of them are on GPUs")
