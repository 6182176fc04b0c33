"""Sharding the policy with FSDP2, and the few collectives around it.

One unit for each module that the family names, and the root with the rest (embeddings, heads, and units too small to be
worth their own collectives). Everything a parameter belongs to is inside the root unit:
parameters left outside would never be reduced over ranks.
"""

from __future__ import annotations

import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vlarl_rllib.models.family import PolicyFamily
from vlarl_rllib.models.quantization import quantized_parameters
from vlarl_rllib.settings import FSDPSettings

BACKEND = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""Process-group backend by device type; on GPUs gloo carries the few numbers that live on the host."""


def init_process_group(
    device: torch.device, rank: int, world_size: int, store: dist.Store, timeout_seconds: float
) -> None:
    """Join the learners' process group. Raises where a peer does not show up within the time-out."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        BACKEND[device.type], store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_seconds)
    )


def shard_model(
    model: nn.Module,
    family: PolicyFamily,
    *,
    device: torch.device,
    mesh_shape: tuple[int, int],
    compute_dtype: torch.dtype | None,
    settings: FSDPSettings,
) -> None:
    """Shard a policy in place; gradients are reduced in float32.

    Args:
        mesh_shape: [replicas, shards]; their product is the number of ranks.
        compute_dtype: what parameters are cast to when they are gathered. None = each is used as it is kept: with
            adapters the frozen base lies in the compute type already, and A and B are merged in float32.
    """
    # F.linear of 3-D inputs and slices are views; the warning is about in-place operations on them, of which there are
    # none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = _device_mesh(device, mesh_shape)
    casts = compute_dtype not in (None, torch.float32)
    precision = (
        MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32) if casts else MixedPrecisionPolicy()
    )
    offload: OffloadPolicy = CPUOffloadPolicy() if settings.cpu_offload else OffloadPolicy()
    unsharded = quantized_parameters(model)
    # `small` on one rank and 2 cores, 64 samples a step: 257 ms in units of its own, 232 ms in one.
    worthwhile = [
        unit
        for unit in family.shard_units(model)
        if sum(p.numel() for p in unit.parameters()) >= settings.min_unit_parameters
    ]
    for unit in (*worthwhile, model):
        fully_shard(unit, mesh=mesh, mp_policy=precision, offload_policy=offload, ignored_params=unsharded)


def place_whole(model: nn.Module, device: torch.device) -> None:
    """Put all of a policy on one device, in place: what one rank does instead of sharding. Quantised weights are there
    already."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != device.type:
            tensor.data = tensor.data.to(device)


def _device_mesh(device: torch.device, shape: tuple[int, int]) -> DeviceMesh:
    replicas, shards = shape
    if replicas == 1:
        return init_device_mesh(device.type, (shards,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicas, shards), mesh_dim_names=("replicate", "shard"))


def fill(parameter: Tensor, whole: Tensor) -> None:
    """Give a parameter, of which this rank may hold a part, the values of a whole tensor that every rank has."""
    if isinstance(parameter, DTensor):
        here = whole.to(parameter.to_local().device)  # type: ignore[attr-defined]
        whole = distribute_tensor(here, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(whole)


def clip_grad_norm(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients to a global norm of at most `max_norm`; the norm before that, a scalar on the device, the
    same on all ranks."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return norm.to(parameters[0].device)  # torch's of no gradients at all is on the CPU


def all_reduce(values: Tensor, how: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Over all ranks, elementwise, in float64 on the host."""
    total = values.to("cpu", torch.float64, copy=True).contiguous()
    dist.all_reduce(total, how)
    return total


def all_reduce_sums(values: dict[str, float]) -> dict[str, float]:
    """Sum over all ranks, in float64 on the host."""
    total = all_reduce(torch.tensor([*values.values()], dtype=torch.float64))
    return dict(zip(values, total.tolist(), strict=True))


def all_reduce_max(value: float) -> float:
    """Largest value over all ranks."""
    return float(all_reduce(torch.tensor([value], dtype=torch.float64), dist.ReduceOp.MAX))


EPSILON = 1e-8
"""Beside a standard deviation that may be 0."""


def normalize(x: Tensor) -> Tensor:
    """Zero mean and unit (population) variance over the values of all ranks."""
    mean, deviation = _mean_and_deviation(x)
    return ((x.double() - mean) / (deviation + EPSILON)).to(x.dtype)


def whiten(x: Tensor) -> Tensor:
    """Unit (population) variance over the values of all ranks, the mean scaled along. Equal values stay as they are."""
    deviation = _mean_and_deviation(x)[1]
    return (x.double() / deviation).to(x.dtype) if deviation > EPSILON else x


def _mean_and_deviation(x: Tensor) -> tuple[float, float]:
    double = x.double()
    sums = all_reduce_sums({"n": len(x), "sum": double.sum().item()})
    mean = sums["sum"] / sums["n"]  # first: the mean square less the squared mean would not be 0 for equal values
    return mean, (all_reduce_sums({"square": (double - mean).square().sum().item()})["square"] / sums["n"]) ** 0.5
