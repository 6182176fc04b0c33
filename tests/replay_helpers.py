"""CUDA graphs where there is no GPU."""

from collections.abc import Callable

import torch

from vlarl_rllib.models.replay import Capture, Tensors


def pretend_capture(model: torch.nn.Module) -> Capture:
    """As a CUDA graph does it: recording leaves gradients alone, and each replay overwrites the same results."""

    def capture(run: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        before = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
        results = {name: tensor.detach().clone() for name, tensor in run().items()}
        for p in model.parameters():
            if p.grad is not None:
                p.grad.copy_(before[p])

        def replay() -> None:
            places = {p: p.grad for p in model.parameters()}
            for name, tensor in run().items():
                results[name].copy_(tensor)
            assert all(p.grad is places[p] for p in model.parameters()), "a graph writes where gradients were"

        return replay, results

    return capture
