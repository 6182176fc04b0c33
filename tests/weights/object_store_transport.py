"""Weights through Ray's object store, between any two machines of a cluster: the whole of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
import torch
from ray.exceptions import ObjectLostError

from vlarl_rllib.types import TensorSpec
from vlarl_rllib.weights.protocol import GoneError, WeightTransport


class PickledTransport(WeightTransport):
    """A bucket is an object; it lives as long as the process that put it."""

    lends_tensors = False

    def put(self, tensors: Sequence[torch.Tensor]) -> Any:
        return ray.put([tensor.cpu() for tensor in tensors])

    def get(self, handle: Any, specs: Sequence[TensorSpec], device: torch.device) -> list[torch.Tensor]:
        try:
            return ray.get(handle)
        except ObjectLostError as error:
            raise GoneError(type(error).__name__) from error

    def free(self, handle: Any) -> None:
        """Ray frees the object once nobody refers to it."""
