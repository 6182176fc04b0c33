"""What a policy's passes cost in floating-point operations, counted from its sizes. Importing this loads no torch.

Counted are matrix products, attention's two among them; a product of [n, i] and [i, o] is 2 n i o operations. Not
counted: norms, rotations, activations, softmax, embeddings, and everything that is done twice. Attention is counted in
full, also where a causal mask hides half of it. That is what `torch.utils.flop_counter` counts too, and a test holds
the two together.

r = rank of an adapter, n = rows of a product (tokens), i = its inputs, o = its outputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum


class Training(Enum):
    """What is trained of a module with weights."""

    FROZEN = "frozen"
    WHOLE = "whole"
    ADAPTER = "adapter"


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product of a pass, for one sample."""

    module: str
    """Published name of the module whose weight it is; empty = of two activations: attention."""
    level: int
    """Products of one level read what products of lower levels made, and not each other's."""
    rows: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.inputs * self.outputs

    def adapter_flops(self, rank: int) -> float:
        """Of x A, or of what comes behind it, times B, together: 2 n r (i + o)."""
        return 2.0 * self.rows * rank * (self.inputs + self.outputs)


def attention(level: int, queries: int, keys: int, width: int) -> Product:
    """Scores and their product with the values: 2 x 2 `queries` `keys` `width`, over all heads."""
    return Product("", level, queries, keys, 2 * width)


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass for one sample."""

    towers: tuple[tuple[Product, ...], ...]
    """Chains that do not read each other."""
    trunk: tuple[Product, ...]
    """Reads what all of them made."""

    @property
    def forward_flops(self) -> float:
        return sum(product.flops for chain in (*self.towers, self.trunk) for product in chain)

    def frozen_flops(self, training_of: Callable[[str], Training]) -> float:
        """Of the forward pass, what nothing that is trained comes before or into: it stays the same over updates, so
        one pass over a frame is enough."""
        total, none_so_far = 0.0, True
        for chain in self.towers:
            flops, is_trained = _frozen_start(chain, training_of)
            total, none_so_far = total + flops, none_so_far and not is_trained
        return total + (_frozen_start(self.trunk, training_of)[0] if none_so_far else 0.0)

    def training_flops(self, training_of: Callable[[str], Training], rank: int = 0) -> float:
        """Forward and backward pass, adapters' products included.

        A frozen weight costs its backward pass one product, for the gradient of its input, and none where nothing
        before it is trained; a trained one costs another for its own gradient; attention costs two.

        Args:
            training_of: of a module's published name.
            rank: of the adapters.
        """
        total, towers_are_trained = 0.0, False
        for chain in self.towers:
            flops, is_trained = _chain_flops(chain, training_of, rank, False)
            total, towers_are_trained = total + flops, towers_are_trained or is_trained
        return total + _chain_flops(self.trunk, training_of, rank, towers_are_trained)[0]


def _frozen_start(chain: Iterable[Product], training_of: Callable[[str], Training]) -> tuple[float, bool]:
    """Forward, of the products below the first level with a trained one, and whether there is one."""
    products = list(chain)
    trained = [
        product.level for product in products if product.module and training_of(product.module) is not Training.FROZEN
    ]
    first = min(trained, default=None)
    return sum(product.flops for product in products if first is None or product.level < first), first is not None


def _chain_flops(
    chain: Iterable[Product], training_of: Callable[[str], Training], rank: int, input_is_trained: bool
) -> tuple[float, bool]:
    """Forward and backward, and whether anything in it, or before it, is trained."""
    products = [(product, training_of(product.module) if product.module else None) for product in chain]
    levels = [product.level for product, training in products if training not in (None, Training.FROZEN)]
    lowest, total = min(levels, default=None), 0.0
    for product, training in products:
        wants_input = input_is_trained or (lowest is not None and lowest < product.level)
        total += product.flops * (1 + wants_input)
        if training is None:  # both of its factors are activations
            total += product.flops * wants_input
        elif training is Training.WHOLE:
            total += product.flops
        elif training is Training.ADAPTER:
            down, up = (2.0 * product.rows * rank * size for size in (product.inputs, product.outputs))
            # forward; the gradients of A and B; the gradient between them, and that of the input
            total += product.adapter_flops(rank) * 2 + up + down * wants_input
    return total, input_is_trained or lowest is not None


@dataclass(frozen=True, slots=True)
class PolicyFlops:
    """What a policy does for one sample, by what it is asked for."""

    score: Pass
    """Log-probs of a decision's tokens and the frame's value: the score pass, and the forward pass of an update."""
    supervise: Pass
    """Logits over all ids of a decision's targets: the forward pass of supervised fine-tuning."""
    sample: float
    """Operations of sampling one decision, without anything computed twice."""


def training_of(targets: str | Iterable[str] | None, always: Iterable[str] = ()) -> Callable[[str], Training]:
    """Which modules are trained, as PEFT reads an adapter's targets: a pattern of whole names, or names at the end.

    Args:
        targets: of the adapters; None = there are none, and all is trained.
        always: beginnings of names of modules that are trained whole beside adapters.
    """
    starts, names = tuple(always), None if targets is None or isinstance(targets, str) else tuple(targets)

    def training(module: str) -> Training:
        if targets is None or (starts and module.startswith(starts)):
            return Training.WHOLE
        if names is None:
            adapted = re.fullmatch(str(targets), module) is not None
        else:
            adapted = any(module == name or module.endswith(f".{name}") for name in names)
        return Training.ADAPTER if adapted else Training.FROZEN

    return training
