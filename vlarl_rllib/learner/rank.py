"""One FSDP rank: its process, and its place among the others."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import ray
import torch
import torch.distributed as dist

from vlarl_rllib.learner import fsdp
from vlarl_rllib.models.presets import models_here
from vlarl_rllib.settings import Settings
from vlarl_rllib.telemetry.actors import own_name
from vlarl_rllib.types import Site
from vlarl_rllib.weights.placement import own_place
from vlarl_rllib.weights.ray_transports import tensor_transport_options

LOOPBACK = "127.0.0.1"
_MEMBERS: set[int] = set()
"""Learners of this process that are in the process group which one of them has made."""


class Rank:
    """What a learner's actor answers before and beside learning, whatever it learns.

    The order is `node`, `rendezvous` on rank 0, `join` on all at once, `build`. A learner in the driver's process
    begins with `build`.
    """

    settings: Settings
    _rank, _world_size = 0, 1
    _store_socket: socket.socket | None = None

    def __repr__(self) -> str:
        """What Ray's dashboard and logs call this actor."""
        return own_name(type(self).__name__)

    def node(self) -> str:
        """Which node this actor is on."""
        return ray.get_runtime_context().get_node_id()

    def place(self) -> Site:
        """Where it is, as far as weights go."""
        learners = self.settings.learners
        takes_part = learners.num > 0 and tensor_transport_options(learners.gpus, self.settings.weights.transport)
        return own_place(self.choose_device().type, takes_part=bool(takes_part))

    def ping(self) -> None:
        """Answers as long as the actor lives and is not busy."""

    def rendezvous(self, one_node: bool) -> tuple[str, int]:
        """Open the socket of the process group's store on rank 0; its address and port.

        The store takes commands from whoever connects, so it listens to this machine alone where all learners are on
        it.
        """
        self._store_socket = socket.create_server((LOOPBACK if one_node else ray.util.get_node_ip_address(), 0))
        return self._store_socket.getsockname()

    def join(self, rank: int, world_size: int, address: str, port: int) -> int:
        """Join the process group of all learners; call it on all of them at once, before `build`.

        Returns the process id.
        """
        models_here(self.settings.model)  # transformers writes a preset on rank 0 alone once there is a group
        self._rank, self._world_size = rank, world_size
        timeout = self.settings.learners.timeout_seconds
        if address == LOOPBACK:  # the backends' own sockets too
            for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(variable, "lo")
        listening = {"master_listen_fd": self._store_socket.detach()} if self._store_socket else {}
        store = dist.TCPStore(
            address,
            port,
            world_size,
            is_master=rank == 0,
            timeout=timedelta(seconds=timeout),
            use_libuv=False,
            **listening,
        )
        fsdp.init_process_group(self.choose_device(), rank, world_size, store, timeout)
        _MEMBERS.add(id(self))
        return os.getpid()

    def join_alone(self) -> None:
        """A group of one, where there is none: FSDP needs one. Several learners of one process share it."""
        if not dist.is_initialized():
            fsdp.init_process_group(
                self.choose_device(), 0, 1, dist.HashStore(), self.settings.learners.timeout_seconds
            )
            _MEMBERS.add(id(self))
        elif _MEMBERS:  # else somebody else's, which is not ours to end
            _MEMBERS.add(id(self))

    def leave(self) -> None:
        """Leave the process group, which ends with the last one in this process; safe to call twice."""
        if id(self) in _MEMBERS:
            _MEMBERS.discard(id(self))
            if not _MEMBERS and dist.is_initialized():
                dist.destroy_process_group()

    def choose_device(self) -> torch.device:
        return torch.device("cuda", 0) if self.settings.learners.gpus else torch.device("cpu")
