"""What moves weights: the contract of a transport. One class serves both ends; no vLLM and no RLlib here.

    transport.put([tensor, ...]) -> handle                  the learner's rank 0; the handle is small and can be pickled
    transport.get(handle, specs, device) -> [tensor, ...]   an engine, any number of them, any number of times
    transport.free(handle)                                  the learner, once nobody reads it any more

It is one-sided: engines come and go, and none joins a group. What a version is, which tensors travel and when, is not
the transport's to know (`weights/publisher.py`, `weights/sync.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from vlarl_rllib.types import Site, TensorSpec

if TYPE_CHECKING:
    import torch

NamedTensors: TypeAlias = "Iterator[tuple[str, torch.Tensor]]"
Shapes = dict[str, tuple[int, ...]]
"""Shape of each tensor by published name."""


class TransferError(RuntimeError):
    """A bucket did not arrive as it was sent. The engine is well, but samples only once it has a whole version."""


class GoneError(TransferError):
    """What a handle points to can be read no more, by any engine."""

    def __init__(self, why: str) -> None:
        super().__init__(f"the weights are gone: {why}")
        self.why = why

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return GoneError, (self.why,)


class WeightTransport(ABC):
    """One way for weights to travel.

    Args:
        name: what manifests call it, so that engines find the class: a known name or `module:Class`.
    """

    lends_tensors: ClassVar[bool]
    """Whether a handle points at the very tensors that `put` got, so that they must not change until it is freed: the
    learner then hands over copies of what it trains."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def put(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Make a bucket readable; contiguous tensors on the learner's device.

        Raises `OSError` where there is no room.
        """

    @abstractmethod
    def get(self, handle: Any, specs: Sequence[TensorSpec], device: torch.device) -> list[torch.Tensor]:
        """The tensors in the order of `put`, on `device` or on the host, valid until the next call.

        Raises `GoneError` where they are gone.
        """

    @abstractmethod
    def free(self, handle: Any) -> None:
        """Forget a bucket; in the process that `put` it."""

    def obstacle(self, learner: Site, engines: Sequence[Site]) -> str | None:
        """Why weights cannot travel so between these, in one line with the remedy; None where they can."""
        return None
