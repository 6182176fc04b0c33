"""Frames through graphs of a few sizes; what a graph does is played by a function."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vlarl_rllib.engines.vllm.frame_encoder import FrameEncoder


class Replayed:
    """A CUDA graph's part: reads and writes the same memory at each replay."""

    def __init__(self, encode: Callable[[Tensor], Tensor], given: Tensor) -> None:
        self.encode, self.given = encode, given
        self.encoded = torch.full((len(given), 2), -1.0)
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.encoded.copy_(self.encode(self.given))


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> FrameEncoder:
    def capture(self: FrameEncoder, like: Tensor, rows: int) -> tuple[Replayed, Tensor, Tensor]:
        graph = Replayed(self._encode, like.new_zeros((rows, *like.shape[1:])))
        return graph, graph.given, graph.encoded

    monkeypatch.setattr(FrameEncoder, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return FrameEncoder(lambda frames: torch.stack([frames.float().sum((1, 2, 3)), frames[:, 0, 0, 0]], 1), 24)


def frames(count: int) -> Tensor:
    return torch.arange(count * 12, dtype=torch.uint8).view(count, 2, 2, 3)


@pytest.mark.parametrize("count", [1, 3, 16, 17, 24, 25, 60])
def test_every_frame_is_encoded_for_itself(encoder: FrameEncoder, count: int) -> None:
    assert torch.equal(encoder(frames(count)), encoder._encode(frames(count)))


def test_a_result_outlives_the_next_one_and_graphs_are_captured_once(encoder: FrameEncoder) -> None:
    first = encoder(frames(3))
    expected = first.clone()
    encoder(frames(4).flip(0))
    assert torch.equal(first, expected)
    assert {rows: graph.replays for rows, (graph, _, _) in encoder._graphs.items()} == {4: 2}
    encoder(frames(60))
    assert {rows: graph.replays for rows, (graph, _, _) in encoder._graphs.items()} == {4: 2, 24: 2, 16: 1}
