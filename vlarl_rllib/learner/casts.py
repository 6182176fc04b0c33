"""A model that computes in another type than its trained weights are kept in, without FSDP: what its mixed precision
does, with the same numbers, for a rank that holds the whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def in_type(model: nn.Module, dtype: torch.dtype) -> Callable[..., Any]:
    """`model` as a function of its keyword arguments that rounds what is trained now to `dtype` at each call; gradients
    are those of the rounded weights, and add up in the parameters' own type.

    The rounded weights take the parameters' places for the call, as `torch.func.functional_call` has it, which looks
    all of them up by name each time: a quarter of a pass of `mini` (cProfile, on an H200). What the backward pass
    computes again, as activation checkpointing does, would find the unrounded ones.
    """
    places = [
        (module._parameters, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    ]
    trained = [parameter for _, _, parameter in places]

    def forward(**inputs: Any) -> Any:
        rounded = _Round.apply(dtype, *trained)
        try:
            for (parameters, name, _), tensor in zip(places, rounded, strict=True):
                parameters[name] = tensor
            return model(**inputs)
        finally:
            for parameters, name, parameter in places:
                parameters[name] = parameter

    return forward


class _Round(torch.autograd.Function):
    """All parameters at once: one kernel instead of hundreds."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # what no pass has read gets none
        ctx.dtypes = [p.dtype for p in parameters]
        rounded = [torch.empty_like(p, dtype=dtype) for p in parameters]
        torch._foreach_copy_(rounded, list(parameters))
        return tuple(rounded)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        wide = [
            None if grad is None else torch.empty_like(grad, dtype=dtype)
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        ]
        if to := [grad for grad in wide if grad is not None]:
            torch._foreach_copy_(to, [grad for grad in grads if grad is not None])
        return None, *wide
