"""Frames to patch embeddings through CUDA graphs: two towers have some 50 blocks, and launching their kernels one by
one takes longer than a GPU needs for a few frames.

n = frames, S = image side in pixels, P = patches, D = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlarl_rllib.models.replay import graph_rows

WARM_UP_RUNS = 2
"""Before a capture: libraries choose algorithms and allocate workspaces, which a graph cannot hold."""


class FrameEncoder:
    """`encode` as one graph for each of a few numbers of frames, captured when it is first asked for; fewer frames are
    filled up. The graphs read weights where they are, so new ones must be written in place.

    Args:
        encode: [n, S, S, 3] uint8 -> [n, P, D], each frame for itself.
        max_frames: of one graph; more go through several times.
    """

    def __init__(self, encode: Callable[[Tensor], Tensor], max_frames: int) -> None:
        self._encode, self._max_frames = encode, max_frames
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, frames: Tensor) -> Tensor:
        parts = [self._replay(part) for part in frames.split(self._max_frames)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _replay(self, frames: Tensor) -> Tensor:
        rows = graph_rows(len(frames), self._max_frames)
        if rows not in self._graphs:
            self._graphs[rows] = self._capture(frames, rows)
        graph, given, encoded = self._graphs[rows]
        given[: len(frames)].copy_(frames)
        graph.replay()
        return encoded[: len(frames)].clone()

    def _capture(self, like: Tensor, rows: int) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        given = like.new_zeros((rows, *like.shape[1:]))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                self._encode(given)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            encoded = self._encode(given)
        return graph, given, encoded
