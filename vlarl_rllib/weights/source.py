"""Which tensors a policy consists of, under their published names, and how to gather them for a push.

The value head is the trainer's own: no engine has one, so it never travels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlarl_rllib.weights.protocol import NamedTensors, Shapes

VALUE_HEAD_PREFIX = "value_head."
ADAPTER = re.compile(r"\.lora_[AB]\.")
NUM_NAMES_SHOWN = 3
"""Names of each kind in an error message; a wrong prefix makes hundreds."""


def published_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor, Any]]:
    """What an engine has to hold, in the same order on every rank.

    Yields:
        (published name, parameter or shard, the adapted module (`models.lora`) whose merged weight takes its place, or
        None).
    """
    adapted = {
        f"{name}.base_layer.weight": module
        for name, module in model.named_modules()
        if hasattr(module, "published_weight")
    }
    for name, parameter in model.named_parameters():
        if not name.startswith(VALUE_HEAD_PREFIX) and not ADAPTER.search(name):
            yield name.replace(".base_layer.", "."), parameter, adapted.get(name)


def expected_tensors(model: nn.Module) -> Shapes:
    """Names and full shapes of a policy's tensors, the value head excluded."""
    return {name: tuple(parameter.shape) for name, parameter, _ in published_parameters(model)}


@torch.no_grad()
def iterate_weights(
    model: nn.Module, dtype: torch.dtype, *, to_host: bool = True, unchanging: bool = False
) -> NamedTensors:
    """Gather the policy's weights one tensor at a time.

    Gathering an FSDP2 parameter is collective: every rank must run this to its end. At most one full tensor and its
    copy exist at once, beside what the consumer keeps.

    Args:
        dtype: of the yielded tensors; shards are cast before they are gathered, so bfloat16 halves the traffic.
            Adapters are merged in float32 before their weight is cast.
        to_host: copy to the CPU. False on ranks that only take part in the gather, and where the tensors travel from
            the device.
        unchanging: where they stay on the device, copy what is trained; else what is yielded may be the parameter's
            own memory, which the next optimiser step changes.

    Yields:
        (published name, full tensor); with `to_host` on the CPU and sharing no memory with the model.

    Raises:
        ValueError: the model has nothing to send.
    """
    num_tensors = 0
    for name, parameter, adapted in published_parameters(model):
        tensor = _gather(parameter, dtype) if adapted is None else adapted.published_weight(_gather).to(dtype)
        num_tensors += 1
        # On one rank `full_tensor` is the parameter's own memory, hence always a copy.
        if to_host:
            yield name, tensor.to(device="cpu", dtype=dtype, copy=True)
        else:
            yield name, tensor.to(dtype, copy=unchanging and parameter.requires_grad)
    if num_tensors == 0:
        raise ValueError("the model has no parameters to send; pass the policy itself, not a wrapper without modules")


def _gather(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The whole of a sharded tensor, cast to `dtype` first; others as they are."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    # Offloaded shards lie on the CPU, whereas the mesh's collectives run on its own device.
    return cast(DTensor, tensor.to(device=tensor.device_mesh.device_type, dtype=dtype)).full_tensor()


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
