"""Products with `W' = W + s B A`, the weight of an adapted layer, and their gradients.

r = rank, N = rows of the input (batch x sequence), I = in features, O = out features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_LIBRARY = torch.library.Library("vlarl", "DEF")
_LIBRARY.define(
    "merged_product(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, float scaling, bool transposed) -> Tensor"
)


def merge_lora(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, out: Tensor | None = None) -> Tensor:
    """`W + scaling * B A` out of place, in the type of W: sums in float32, rounded once.

    In bfloat16 that reads and writes each weight once; a float32 sum would be five times the traffic, a quarter of a
    training step.

    Args:
        weight: [O, I], or [O, C, h, w] of a convolution.
        lora_a: [r, I], or [r, C, h, w]; rounded to the type of W.
        lora_b: [O, r], or [O, r, 1, 1]; rounded to the type of W.
        out: [O, I] where the sum goes, without gradients.
    """
    factors = (factor.flatten(1).to(weight.dtype) for factor in (lora_b, lora_a))
    return torch.addmm(weight.flatten(1), *factors, alpha=scaling, out=out).view(weight.shape)


def _merged_product(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, transposed: bool
) -> Tensor:
    """x [..., I] W'ᵀ, or x [..., O] W' where it is `transposed`.

    It is an operator of its own because the compiler would see the forward and the backward pass merge the same, and
    keep what they share between them: all merged weights of the model.
    """
    merged = merge_lora(weight, lora_a, lora_b, scaling)
    return x @ merged if transposed else F.linear(x, merged)


def _fake_merged_product(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, transposed: bool
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1 if transposed else 0]))


_LIBRARY.impl("merged_product", _merged_product, "CompositeExplicitAutograd")
torch.library.register_fake("vlarl::merged_product", _fake_merged_product, lib=_LIBRARY)


@register_flop_formula(torch.ops.vlarl.merged_product)
def _merged_product_flops(
    x_shape: Sequence[int], weight_shape: Sequence[int], *_: Any, out_shape: Any = None, **__: Any
) -> int:
    """Of the product, as the merge takes next to none. The compiler weighs with it what it computes again for the
    backward pass; an operator that it knows nothing of costs nothing to it."""
    return 2 * math.prod(x_shape[:-1]) * math.prod(weight_shape)


class HasBase(Protocol):
    """A layer that says what its weight is without the adapter."""

    def base_weight(self) -> Tensor: ...


class MergedProduct(torch.autograd.Function):
    """x [..., I] -> x W'ᵀ [..., O], merging on the way; gradients for x, A and B."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_a: Tensor, lora_b: Tensor, layer: HasBase, scaling: float) -> Tensor:
        ctx.save_for_backward(x, lora_a, lora_b)
        ctx.layer, ctx.scaling = layer, scaling
        return torch.ops.vlarl.merged_product(x, layer.base_weight(), lora_a, lora_b, scaling, False)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_a, lora_b = ctx.saved_tensors
        (grad,) = grad_outputs
        grad_x = None
        if ctx.needs_input_grad[0]:
            # The base weight is read from the layer rather than saved: FSDP has gathered it again by now.
            factors = ctx.layer.base_weight(), lora_a, lora_b, ctx.scaling
            grad_x = torch.ops.vlarl.merged_product(grad, *factors, True)
        return grad_x, *_factor_gradients(ctx, x, grad, lora_a, lora_b, ctx.scaling), None, None


class Product(torch.autograd.Function):
    """x [..., I] -> x W'ᵀ [..., O] with W' as given; gradients for x, A and B."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, merged: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(x, merged, lora_a, lora_b)
        ctx.scaling = scaling
        return F.linear(x, merged)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        x, merged, lora_a, lora_b = ctx.saved_tensors
        (grad,) = grad_outputs
        grad_x = grad @ merged if ctx.needs_input_grad[0] else None
        return grad_x, None, *_factor_gradients(ctx, x, grad, lora_a, lora_b, ctx.scaling), None


def _factor_gradients(
    ctx: Any, x: Tensor, grad: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> tuple[Tensor | None, Tensor | None]:
    """Of A and B, in their types, from products in that of x."""
    if not any(ctx.needs_input_grad[1:]):
        return None, None
    rows, grad_rows = x.flatten(0, -2), grad.flatten(0, -2)
    low = grad_rows @ lora_b.to(grad.dtype)
    grad_a = (low.T @ rows).to(lora_a.dtype) * scaling
    grad_b = (grad_rows.T @ (rows @ lora_a.to(x.dtype).T)).to(lora_b.dtype) * scaling
    return grad_a, grad_b
