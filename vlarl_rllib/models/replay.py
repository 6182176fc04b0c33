"""Passes as CUDA graphs: launching the kernels of a small model, or of a few rows, one by one takes several times as
long as a GPU needs for them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
Pass = Callable[..., Tensors]
"""Of one or several mappings of tensors."""
Capture = Callable[[Callable[[], Tensors]], "tuple[Callable[[], None], Tensors]"]
"""Records what a function does; returns how to do it again, and the results that each replay overwrites."""

EAGER_CALLS = 2
"""Before a capture: libraries choose algorithms and allocate workspaces, and gradients find their place."""


@dataclass
class _Shape:
    """What is known of calls with tensors of one set of shapes."""

    calls: int = 0
    given: tuple[dict[str, Tensor], ...] = ()
    results: Tensors | None = None
    replay: Callable[[], None] | None = None


class Replayed:
    """A function of mappings of tensors that is recorded for each set of shapes and then replayed.

    All that the function reads beside its arguments must stay where it is, gradients among it: whoever resets them
    writes zeros (`zero_grad(set_to_none=False)`). It must wait for nothing and decide nothing by what tensors hold.

    Args:
        run: the function.
        capture: how it is recorded.
    """

    def __init__(self, run: Pass, capture: Capture) -> None:
        self._run, self._capture = run, capture
        self._shapes: dict[Hashable, _Shape] = {}

    def forget(self, capture: Capture) -> None:
        """What was recorded reads or writes where nothing is any more; record anew, in this way."""
        self._shapes.clear()
        self._capture = capture

    def __call__(self, *arguments: Tensors) -> dict[str, Tensor]:
        key = tuple(tuple((name, tensor.shape, tensor.dtype) for name, tensor in given.items()) for given in arguments)
        shape = self._shapes.setdefault(key, _Shape())
        shape.calls += 1
        if shape.calls <= EAGER_CALLS:
            return dict(self._run(*arguments))
        if shape.replay is None:
            shape.given = tuple({name: tensor.clone() for name, tensor in given.items()} for given in arguments)
            shape.replay, shape.results = self._capture(lambda: self._run(*shape.given))
        for kept, given in zip(shape.given, arguments, strict=True):
            for name, tensor in given.items():
                kept[name].copy_(tensor)
        shape.replay()
        assert shape.results is not None
        return {name: tensor.clone() for name, tensor in shape.results.items()}


class GraphCapture:
    """As CUDA graphs that share their memory: one must have been replayed to its end before the next begins.

    Memory and stream are its own: those of graphs that are all gone cannot be used again, because cuBLAS keeps its
    workspace there. So what is recorded after that needs another `GraphCapture`.
    """

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, run: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may do with the device what a capture forbids, such as allocating memory.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            results = {name: tensor.detach() for name, tensor in run().items()}
        return graph.replay, results


def graph_rows(needed: int, most: int) -> int:
    """Rows of the graph that serves so many: powers of two, then multiples of 16, so that few are filled up."""
    rows = -(-needed // 16) * 16 if needed > 16 else 1 << (needed - 1).bit_length()
    return min(rows, most)
