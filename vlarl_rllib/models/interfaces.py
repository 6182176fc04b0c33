"""What a policy is asked through, and what it answers with. Importing this loads no torch.

Letters as in `models.family`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class ActionCodec(Protocol):
    """Between a policy's tokens and the environment's actions (`envs.base.VLAEnv`), in NumPy."""

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """[A] token ids of a reply -> [K, 7] float64 environment actions.

        Raises ValueError for anything else than one reply: a malformed one must never move a robot.
        """
        ...

    def normalized(self, tokens: np.ndarray) -> np.ndarray:
        """[..., A] token ids -> [..., K, 7] float64 as the policy sees actions: within [-1, 1]."""
        ...

    def encode(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[N, K, 7] environment actions -> their token ids [N, A] int64, and [N, K, 7] float64 as `normalized`."""
        ...


class PolicyOutput(Protocol):
    """What a policy's forward pass returns, as a named tuple, so that FSDP2 finds the tensors in it."""

    @property
    def action_logits(self) -> Tensor:
        """[B, A, V] float32, over the action ids in id order, or over all ids."""
        ...

    @property
    def values(self) -> Tensor | None:
        """[B] float32; None without a value head."""
        ...


class PolicyProcessor(Protocol):
    """Prompts and frames as a policy's model takes them."""

    @property
    def image_size(self) -> int:
        """S"""
        ...

    @property
    def end_token_id(self) -> int:
        """Of the end of sequence."""
        ...

    def prompt_ids(self, instruction: str) -> list[int]:
        """Token ids of an instruction's prompt."""
        ...

    def resize(self, image: np.ndarray) -> np.ndarray:
        """A frame [H, W, 3] uint8 at the model's size: [S, S, 3] uint8."""
        ...

    def raw_inputs(self, images: Sequence[np.ndarray], instructions: Sequence[str]) -> dict[str, Tensor]:
        """input_ids, attention_mask and pixel_values of a batch, as `Policy` takes them."""
        ...
