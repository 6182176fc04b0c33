"""Cutting a policy's tensors into the pieces that a transport moves one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from vlarl_rllib.types import TensorSpec


def plan_buckets(specs: Sequence[TensorSpec], bucket_bytes: int) -> Iterator[tuple[TensorSpec, ...]]:
    """Cut tensors into buckets of about `bucket_bytes`, never between tensors that an engine fuses.

    A module's tensors (q, k, v, o of one attention; gate, up, down of one MLP) stay together, since an engine that
    gets `q_proj` alone for its fused projection computes silently wrong numbers. A bucket therefore exceeds
    `bucket_bytes` where one module does. Raises ValueError for a repeated name.
    """
    if len({spec.name for spec in specs}) != len(specs):
        repeated = next(spec.name for i, spec in enumerate(specs) if spec.name in {s.name for s in specs[:i]})
        raise ValueError(f"tensor '{repeated}' was given twice; a full set of weights names each tensor once")
    bucket: list[TensorSpec] = []
    size = 0
    for _, members in groupby(specs, key=lambda spec: module_of(spec.name)):
        group = list(members)
        group_size = sum(spec.num_bytes for spec in group)
        if bucket and size + group_size > bucket_bytes:
            yield tuple(bucket)
            bucket, size = [], 0
        bucket += group
        size += group_size
    if bucket:
        yield tuple(bucket)


def frozen_names(names: Iterable[str], trained: Iterable[str]) -> frozenset[str]:
    """Those of `names` that neither are trained nor belong to a module of which something is."""
    modules = {module_of(name) for name in trained}
    return frozenset(name for name in names if module_of(name) not in modules)


def module_of(name: str) -> str:
    """Module that fuses the tensor with its neighbours: `...self_attn` for `...self_attn.q_proj.weight`."""
    return name.rsplit(".", 2)[0]
