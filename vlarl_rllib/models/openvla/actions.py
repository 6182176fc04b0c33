"""Actions to token ids and back, in float64 NumPy.

An action has 7 numbers: position (x, y, z) and rotation deltas, then the gripper (1 open, 0 closed in the data sets).
Each is normalised to [-1, 1] by the data set's 1 % and 99 % quantiles and cut into bins; bin d has the id
`vocab_size - d`. Source: OpenVLA (Kim et al. 2024), section 3.2.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlarl_rllib.types import NUM_ACTION_TOKENS

QUANTILE_EPSILON = 1e-8
"""Keeps the division finite where q01 equals q99; the upstream training pipeline uses the same."""


class ActionTokenizer:
    """Map normalised actions to ids and ids to actions.

    Args:
        vocab_size: size of the tokenizer's own vocabulary, without padding rows: one above the highest action id.
        num_bins: bin edges on [-1, 1], and number of action ids.
    """

    def __init__(self, vocab_size: int = 32000, num_bins: int = 256) -> None:
        self.vocab_size = vocab_size
        self.num_bins = num_bins
        self.bins: NDArray[np.float64] = np.linspace(-1.0, 1.0, num_bins)
        self.bin_centers: NDArray[np.float64] = (self.bins[:-1] + self.bins[1:]) / 2.0

    @property
    def token_ids(self) -> range:
        """All action ids, ascending; the highest id is the lowest action."""
        return range(self.vocab_size - self.num_bins, self.vocab_size)

    def encode(self, actions: ArrayLike) -> NDArray[np.int64]:
        """Ids of normalised actions of any shape; values outside [-1, 1] are clipped."""
        clipped = np.clip(np.asarray(actions, dtype=np.float64), -1.0, 1.0)
        return np.asarray(self.vocab_size - np.digitize(clipped, self.bins), dtype=np.int64)

    def decode(self, ids: ArrayLike) -> NDArray[np.float64]:
        """Normalised actions in (-1, 1) of ids of any shape.

        There is one centre fewer than ids, so the two lowest ids decode alike; an id outside the action ids clips to
        the nearest one, as upstream. Replies of a sampler go through `decode_checked` instead.
        """
        bins = self.vocab_size - np.asarray(ids, dtype=np.int64)
        return self.bin_centers[np.clip(bins - 1, 0, len(self.bin_centers) - 1)]

    def decode_checked(self, ids: ArrayLike) -> NDArray[np.float64]:
        """Normalised action [7] of one sampled reply.

        Raises ValueError unless the reply is exactly seven action ids: a malformed reply must never move a robot.
        """
        reply = np.asarray(ids)
        if reply.shape != (NUM_ACTION_TOKENS,) or not np.issubdtype(reply.dtype, np.integer):
            raise ValueError(f"a reply must be {NUM_ACTION_TOKENS} token ids, got {list(np.atleast_1d(reply))}")
        first, last = self.token_ids[0], self.token_ids[-1]
        if np.any((reply < first) | (reply > last)):
            raise ValueError(f"reply {reply.tolist()} has a token id outside the action ids {first}..{last}")
        return self.decode(reply)

    @staticmethod
    def unnormalize(normalized: ArrayLike, stats: Mapping[str, Any]) -> NDArray[np.float64]:
        """Actions [..., 7] in the data set's units; dimensions outside `mask` (the gripper) pass through.

        Args:
            normalized: [..., 7] in [-1, 1].
            stats: `q01`, `q99` and `mask` (absent: all True), 7 each, as in `norm_stats[key]["action"]`.
        """
        normalized = np.asarray(normalized, dtype=np.float64)
        low, high, mask = _quantiles(stats)
        return np.where(mask, 0.5 * (normalized + 1.0) * (high - low) + low, normalized)

    @staticmethod
    def normalize(actions: ArrayLike, stats: Mapping[str, Any]) -> NDArray[np.float64]:
        """Inverse of `unnormalize`, clipped to [-1, 1] where `mask` holds.

        Dimensions that never change in the data (`min` equals `max`, where given) become 0.
        """
        actions = np.asarray(actions, dtype=np.float64)
        low, high, mask = _quantiles(stats)
        scaled = np.clip(2.0 * (actions - low) / (high - low + QUANTILE_EPSILON) - 1.0, -1.0, 1.0)
        normalized = np.where(mask, scaled, actions)
        if "min" in stats and "max" in stats:
            normalized = np.where(np.equal(stats["min"], stats["max"]), 0.0, normalized)
        return normalized


def _quantiles(stats: Mapping[str, Any]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    low = np.asarray(stats["q01"], dtype=np.float64)
    high = np.asarray(stats["q99"], dtype=np.float64)
    mask = np.asarray(stats["mask"], dtype=bool) if "mask" in stats else np.ones(low.shape, dtype=bool)
    return low, high, mask
