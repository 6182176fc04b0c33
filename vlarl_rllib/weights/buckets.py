"""Cutting a stream of weights into the pieces that a transport moves one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from torch import Tensor

from vlarl_rllib.weights.protocol import NamedTensors


def pack_buckets(tensors: NamedTensors, bucket_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Cut a stream of tensors into buckets of about `bucket_bytes`, never between tensors that an engine fuses.

    A module's tensors (q, k, v, o of one attention; gate, up, down of one MLP) stay together, since an engine that
    gets `q_proj` alone for its fused projection computes silently wrong numbers. A bucket therefore exceeds
    `bucket_bytes` where one module does. Raises ValueError for a repeated name.
    """
    seen: set[str] = set()
    bucket: dict[str, Tensor] = {}
    size = 0
    for _, members in groupby(tensors, key=lambda item: _module_of(item[0])):
        group = dict[str, Tensor]()
        for name, tensor in members:
            if name in seen:
                raise ValueError(f"tensor '{name}' was given twice; a full set of weights names each tensor once")
            seen.add(name)
            group[name] = tensor
        group_size = sum(tensor.nbytes for tensor in group.values())
        if bucket and size + group_size > bucket_bytes:
            yield bucket
            bucket, size = {}, 0
        bucket |= group
        size += group_size
    if bucket:
        yield bucket


def _module_of(name: str) -> str:
    """Module that fuses the tensor with its neighbours: `...self_attn` for `...self_attn.q_proj.weight`."""
    return name.rsplit(".", 2)[0]
