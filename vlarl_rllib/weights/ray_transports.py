"""Weights through Ray: its object store, and past it from card to card (Ray Direct Transport).

All that the package uses of Ray's alpha API is here: `ray.put(tensors, _tensor_transport=...)` in the learner and
`ray.get` in the engine, actors with `enable_tensor_transport=True`, and `ray.experimental.set_target_for_ref`. Both
ends live through each other's death; Ray kills both where the result of an actor's method is passed on instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, ClassVar

import ray
import torch
from ray.exceptions import ObjectLostError, ObjectStoreFullError, OutOfDiskError, RayError
from torch import Tensor

from vlarl_rllib.settings.transports import CUDA_IPC, NIXL, require_installed
from vlarl_rllib.types import Site, TensorSpec
from vlarl_rllib.weights.protocol import GoneError, WeightTransport

ALIGNMENT = 512
"""Of tensors within a buffer, in bytes: what PyTorch's allocator gives a tensor of its own on a card."""
COPY_THREADS, COPY_BYTES = 4, 2**24
"""That fill pinned memory, and how much one of them takes at a time."""
SPARE_BUFFERS = 2
"""That a sender keeps: one is read while the next is filled."""
_NOTHING = torch.empty(0, dtype=torch.uint8)


class ObjectStoreTransport(WeightTransport):
    """Through the shared memory of the nodes: anywhere in a cluster, from CPU or GPU to CPU or GPU."""

    lends_tensors = False

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._staging = Staging()

    def put(self, tensors: Sequence[Tensor]) -> Any:
        """See `WeightTransport.put`. Ray copies from where the tensors lie; those of a card through a pinned buffer."""
        on_host = self._staging.down(tensors) if tensors[0].is_cuda else [_bytes(tensor) for tensor in tensors]
        try:
            return ray.put([tensor.numpy() for tensor in on_host])
        except (ObjectStoreFullError, OutOfDiskError) as error:
            size = sum(tensor.nbytes for tensor in tensors)
            raise OSError(
                f"a bucket of {size:,} bytes does not fit into Ray's object store; lower weights.bucket_mb, or enlarge "
                "the store (ray start --object-store-memory, docker run --shm-size)"
            ) from error

    def get(self, handle: Any, specs: Sequence[TensorSpec], device: torch.device) -> list[Tensor]:
        """See `WeightTransport.get`. They lie in the store itself; for an engine on a card they are copied there."""
        with _gone_with_its_owner():
            arrays = ray.get(handle)
        with warnings.catch_warnings():  # of arrays that must not be written to; nobody does
            warnings.simplefilter("ignore", UserWarning)
            pieces = [torch.from_numpy(array) for array in arrays]
        if device.type == "cuda":
            pieces = self._staging.up(pieces, device)
        return _shaped(pieces, specs)

    def free(self, handle: Any) -> None:
        """Nothing: the object goes with the last reference to it."""


class DirectTransport(WeightTransport):
    """From card to card, by one of Ray's one-sided transports, which a subclass names.

    The learner copies into two buffers of its own on its card, or where versions are kept, into as many as a version
    has buckets. That takes a hundredth of a second for 13 GB, and what is published then takes no more memory than
    that: torch gives back what another process has had open only when it runs out, and hardware takes longer to
    register memory than to move what is in it.
    """

    lends_tensors = False
    ray_name: ClassVar[str]

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._free: list[Tensor] = []
        self._used: dict[int, Tensor] = {}

    def put(self, tensors: Sequence[Tensor]) -> Any:
        """See `WeightTransport.put`."""
        sizes = [tensor.nbytes for tensor in tensors]
        total, device = _offsets(sizes)[-1], tensors[0].device
        fitting = [index for index, buffer in enumerate(self._free) if buffer.numel() >= total]
        buffer = self._free.pop(fitting[0]) if fitting else self._made(total, device)
        pieces = _cut(buffer, sizes)
        for piece, tensor in zip(pieces, tensors, strict=True):
            piece.copy_(_bytes(tensor))
        lent = [piece.view(tensor.dtype).view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]
        handle = ray.put(lent, _tensor_transport=self.ray_name)
        self._used[id(handle)] = buffer
        return handle

    def get(self, handle: Any, specs: Sequence[TensorSpec], device: torch.device) -> list[Tensor]:
        """See `WeightTransport.get`."""
        self._prepare(handle, specs, device)
        with _gone_with_its_owner():
            return list(ray.get(handle))

    def free(self, handle: Any) -> None:
        """Use its buffer for another bucket."""
        self._free.append(self._used.pop(id(handle)))
        if len(self._free) > SPARE_BUFFERS:  # of a version that was kept, or too small by now
            self._done_with(self._free.pop(0))

    def _made(self, size: int, device: torch.device) -> Tensor:
        """A buffer of so many bytes."""
        return torch.empty(size, dtype=torch.uint8, device=device)

    def _done_with(self, buffer: Tensor) -> None:
        """Before a buffer goes."""

    def _prepare(self, ref: Any, specs: Sequence[TensorSpec], device: torch.device) -> None:
        """Before a ref is fetched."""

    def obstacle(self, learner: Site, engines: Sequence[Site]) -> str | None:
        """See `WeightTransport.obstacle`."""
        if self.ray_name not in learner.direct:
            return (
                f"the first learner cannot take part in Ray's {self.ray_name}; it has to be an actor "
                "(learners.num: 1 or more) with what the transport needs"
            )
        if unable := [index for index, place in enumerate(engines) if self.ray_name not in place.direct]:
            return f"engine-{unable[0]} cannot take part in Ray's {self.ray_name}"
        return None


class CudaIpcTransport(DirectTransport):
    """Within one card: engines read the learner's own memory."""

    ray_name = CUDA_IPC

    def obstacle(self, learner: Site, engines: Sequence[Site]) -> str | None:
        """See `WeightTransport.obstacle`."""
        if found := super().obstacle(learner, engines):
            return found
        for index, place in enumerate(engines):
            if (place.node, place.gpu) != (learner.node, learner.gpu):
                return (
                    f"engine-{index} is on another GPU ({place.gpu or 'none'}) than the first learner ({learner.gpu}); "
                    "use nixl or object_store"
                )
        return None


class NixlTransport(DirectTransport):
    """Between memories of any cards and nodes, over NVLink, RDMA, shared memory or TCP, as NIXL finds them; into a
    buffer of the engine's own, too."""

    ray_name = NIXL

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._inbox = _NOTHING

    def _prepare(self, ref: Any, specs: Sequence[TensorSpec], device: torch.device) -> None:
        """Have Ray write into the engine's buffer."""
        sizes = [spec.num_bytes for spec in specs]
        if self._inbox.numel() < (total := _offsets(sizes)[-1]):
            if self._inbox is not _NOTHING:
                self._done_with(self._inbox)
            self._inbox = self._made(total, device)
        self._targets = _shaped(_cut(self._inbox, sizes), specs)  # Ray keeps weak references
        ray.experimental.set_target_for_ref(ref, self._targets)

    def _made(self, size: int, device: torch.device) -> Tensor:
        buffer = super()._made(size, device)
        ray.experimental.register_nixl_memory(buffer)
        return buffer

    def _done_with(self, buffer: Tensor) -> None:
        ray.experimental.deregister_nixl_memory(buffer)


class Staging:
    """Pinned memory on the host through which tensors come from a card and go to one; grown as needed and reused.

    Ordinary memory would be copied by one thread of the driver's, page by page.
    """

    def __init__(self) -> None:
        self._host = self._device = _NOTHING
        self._threads: ThreadPoolExecutor | None = None
        self._stream: Any = None

    def down(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Bytes of tensors that lie on a card, valid until the next call."""
        pieces = self._host_pieces([tensor.nbytes for tensor in tensors])
        for piece, tensor in zip(pieces, tensors, strict=True):
            piece.copy_(_bytes(tensor), non_blocking=True)
        torch.cuda.current_stream(tensors[0].device).synchronize()
        return pieces

    def up(self, pieces: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """Bytes from the host on the card, valid until the next call."""
        if self._threads is None:
            self._threads, self._stream = ThreadPoolExecutor(COPY_THREADS, "staging"), torch.cuda.Stream(device)
        sizes = [piece.numel() for piece in pieces]
        staged, total = self._host_pieces(sizes), _offsets(sizes)[-1]
        if self._device.numel() < total:
            self._device = torch.empty(total, dtype=torch.uint8, device=device)
        on_device = _cut(self._device, sizes)

        def copy(part: tuple[int, slice]) -> None:
            index, rows = part
            staged[index][rows].copy_(pieces[index][rows])
            with torch.cuda.stream(self._stream):
                on_device[index][rows].copy_(staged[index][rows], non_blocking=True)

        parts = [
            (index, slice(start, min(start + COPY_BYTES, size)))
            for index, size in enumerate(sizes)
            for start in range(0, size, COPY_BYTES)
        ]
        list(self._threads.map(copy, parts))
        self._stream.synchronize()
        return on_device

    def _host_pieces(self, sizes: Sequence[int]) -> list[Tensor]:
        if self._host.numel() < (total := _offsets(sizes)[-1]):
            self._host = torch.empty(total, dtype=torch.uint8, pin_memory=True)
        return _cut(self._host, sizes)


def tensor_transport_options(gpus: float, transport: str) -> dict[str, Any]:
    """Ray options of an actor that may have to take part in a direct transport; none where it cannot have to.

    Raises `SettingsError`, before there is any actor, where the transport is not installed.
    """
    require_installed(transport)
    return {"enable_tensor_transport": True} if gpus or transport in (CUDA_IPC, NIXL) else {}


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten().view(torch.uint8)


def _shaped(pieces: Sequence[Tensor], specs: Sequence[TensorSpec]) -> list[Tensor]:
    """Bytes as the tensors that they are."""
    return [piece.view(getattr(torch, spec.dtype)).view(spec.shape) for piece, spec in zip(pieces, specs, strict=True)]


def _cut(buffer: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Pieces of these sizes in bytes, one behind the other."""
    return [buffer[offset : offset + size] for offset, size in zip(_offsets(sizes), sizes, strict=False)]


def _offsets(sizes: Sequence[int]) -> list[int]:
    """Where each piece begins in a buffer, and its whole size."""
    return list(accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))


@contextmanager
def _gone_with_its_owner() -> Iterator[None]:
    try:
        yield
    except ObjectLostError as error:
        raise GoneError(f"their learner died, or the node that they lay on ({type(error).__name__})") from error
    except RayError as error:
        raise GoneError(f"Ray cannot fetch them ({type(error).__name__})") from error
