"""Which tensors a policy consists of, under their published names, and how to gather them for a push.

The value head is the trainer's own, unless engines give values: then they have one too, and it travels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlarl_rllib.types import TensorSpec
from vlarl_rllib.weights.protocol import NamedTensors, Shapes

VALUE_HEAD_PREFIX = "value_head."
ADAPTER = re.compile(r"\.lora_[AB]\.")
NOTHING_TO_SEND = "the model has no parameters to send; pass the policy itself, not a wrapper without modules"
NUM_NAMES_SHOWN = 3
"""Names of each kind in an error message; a wrong prefix makes hundreds."""


@dataclass(frozen=True, slots=True, eq=False)
class Published:
    """A tensor that an engine has to hold."""

    name: str
    """Its published one."""
    parameter: nn.Parameter
    """Whole, or this rank's shard."""
    adapted: Any
    """The adapted module (`models.lora`) whose merged weight takes the parameter's place, or None."""

    @property
    def trained(self) -> bool:
        """Whether training changes it."""
        return self.adapted is not None or self.parameter.requires_grad

    def _type(self, dtype: torch.dtype) -> torch.dtype:
        """What it travels in where the policy does in `dtype`: values are computed in float32 everywhere."""
        return torch.float32 if self.name.startswith(VALUE_HEAD_PREFIX) else dtype

    def spec(self, dtype: torch.dtype) -> TensorSpec:
        """Of the whole tensor, where the policy travels in `dtype`."""
        dtype = self._type(dtype)
        shape = tuple(self.parameter.shape)
        if self.adapted is not None:  # the base may be packed
            lora_a, lora_b, _ = self.adapted.factors
            shape = (lora_b.shape[0], *lora_a.shape[1:])
        return TensorSpec(self.name, shape, str(dtype).removeprefix("torch."), math.prod(shape) * dtype.itemsize)

    @torch.no_grad()
    def gather(self, dtype: torch.dtype, *, copy: bool = False) -> Tensor:
        """The whole tensor, on the learner's device. Collective where it is sharded.

        Args:
            dtype: of the policy, as in `spec`; shards are cast before they are gathered, so bfloat16 halves the
                traffic. Adapters are merged, always anew from the base, before their weight is cast.
            copy: never memory that the model goes on using, which on one rank the whole tensor may be, nor a part of
                larger memory, which a gathered one may be: safetensors refuses to write those.
        """
        dtype = self._type(dtype)
        if self.adapted is not None:
            own = whole = cast(Tensor, self.adapted.published_weight(_gather))
        else:
            own, whole = local_shard(self.parameter), _gather(self.parameter, dtype)
        tensor = whole.to(dtype).contiguous()
        is_part = tensor.untyped_storage().nbytes() > tensor.nbytes
        return tensor.clone() if copy and (is_part or tensor.data_ptr() == own.data_ptr()) else tensor


def published_parameters(model: nn.Module, *, value_head: bool = False) -> Iterator[Published]:
    """What an engine has to hold, in the same order on every rank.

    Args:
        value_head: whether the model's, too.
    """
    adapted = {
        f"{name}.base_layer.weight": module
        for name, module in model.named_modules()
        if hasattr(module, "published_weight")
    }
    for name, parameter in model.named_parameters():
        if not ADAPTER.search(name) and (value_head or not name.startswith(VALUE_HEAD_PREFIX)):
            yield Published(name.replace(".base_layer.", "."), parameter, adapted.get(name))


def expected_tensors(model: nn.Module, *, value_head: bool = False) -> Shapes:
    """Names and full shapes of a policy's tensors, without its value head unless that is asked for."""
    return {item.name: tuple(item.parameter.shape) for item in published_parameters(model, value_head=value_head)}


def iterate_weights(model: nn.Module, dtype: torch.dtype, *, to_host: bool = True) -> NamedTensors:
    """Gather the policy's weights one tensor at a time.

    Gathering an FSDP2 parameter is collective: every rank must run this to its end. At most one full tensor and its
    copy exist at once, beside what the consumer keeps.

    Args:
        dtype: of the yielded tensors.
        to_host: copy to the CPU. False on ranks that only take part in the gather.

    Yields:
        (published name, full tensor); with `to_host` on the CPU and sharing no memory with the model.

    Raises:
        ValueError: the model has nothing to send.
    """
    num_tensors = 0
    for item in published_parameters(model):
        tensor = item.gather(dtype, copy=to_host)
        num_tensors += 1
        yield item.name, tensor.cpu() if to_host else tensor
    if num_tensors == 0:
        raise ValueError(NOTHING_TO_SEND)


def _gather(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The whole of a sharded tensor, cast to `dtype` first; others as they are."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    # Offloaded shards lie on the CPU, whereas the mesh's collectives run on its own device.
    return cast(DTensor, tensor.to(device=tensor.device_mesh.device_type, dtype=dtype)).full_tensor()


def local_shard(parameter: Tensor) -> Tensor:
    """The part of a parameter that lies on this rank: all of it, where it is not sharded."""
    return parameter.detach().to_local() if isinstance(parameter, DTensor) else parameter.detach()  # type: ignore[attr-defined]


def check_names_and_shapes(expected: Mapping[str, tuple[int, ...]], got: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError, naming the first few differences, unless `got` is exactly `expected`."""
    missing = sorted(expected.keys() - got.keys())
    unexpected = sorted(got.keys() - expected.keys())
    misshaped = [
        f"{name} {list(got[name])} instead of {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in got and got[name] != shape
    ]
    problems = [
        f"{kind} {_first_few(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshaped))
        if names
    ]
    if problems:
        raise ValueError(
            f"weights do not fit the policy ({len(got)} of {len(expected)} tensors): {'; '.join(problems)}"
        )


def _first_few(names: list[str]) -> str:
    shown = ", ".join(names[:NUM_NAMES_SHOWN])
    return shown if len(names) <= NUM_NAMES_SHOWN else f"{shown} and {len(names) - NUM_NAMES_SHOWN} more"
