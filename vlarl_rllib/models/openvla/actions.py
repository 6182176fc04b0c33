"""Actions to token ids and back, in float64 NumPy.

An action has 7 numbers: position (x, y, z) and rotation deltas, then the gripper, which the policy sees as 1 = open and
0 = closed, whereas the environments and the data sets have -1 = open and +1 = close. Each is normalised to [-1, 1] by
the data set's 1 % and 99 % quantiles and cut into bins; bin d has the id `vocab_size - d`. Source: OpenVLA (Kim et al.
2024), section 3.2.

N = decisions, K = actions of each.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

NUM_ACTION_TOKENS = 7
"""Tokens of one action: x, y, z, roll, pitch, yaw, gripper."""
NUM_BINS = 256
"""Values that a token can take in the published checkpoints."""
GRIPPER = 6
"""Place of the gripper among an action's numbers."""
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

    def decode_checked(self, ids: ArrayLike, num_actions: int = 1) -> NDArray[np.float64]:
        """Normalised actions [K, 7] of one sampled reply.

        Raises ValueError unless the reply is exactly seven action ids for each of the K: a malformed reply must never
        move a robot.
        """
        reply, expected = np.asarray(ids), num_actions * NUM_ACTION_TOKENS
        if reply.shape != (expected,) or not np.issubdtype(reply.dtype, np.integer):
            raise ValueError(f"a reply must be {expected} token ids, got {list(np.atleast_1d(reply))}")
        first, last = self.token_ids[0], self.token_ids[-1]
        if np.any((reply < first) | (reply > last)):
            raise ValueError(f"reply {reply.tolist()} has a token id outside the action ids {first}..{last}")
        return self.decode(reply).reshape(num_actions, NUM_ACTION_TOKENS)

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


class OpenVLACodec:
    """See `models.interfaces.ActionCodec`.

    Args:
        tokenizer: of the checkpoint.
        statistics: `q01`, `q99`, `mask` of the data set.
        num_actions: K of a decision.
    """

    def __init__(self, tokenizer: ActionTokenizer, statistics: Mapping[str, Any], num_actions: int = 1) -> None:
        self._tokenizer, self._statistics, self._num_actions = tokenizer, statistics, num_actions

    def decode(self, tokens: ArrayLike) -> NDArray[np.float64]:
        """[7 K] ids -> [K, 7]. Raises ValueError, see `ActionTokenizer.decode_checked`."""
        normalized = self._tokenizer.decode_checked(tokens, self._num_actions)
        return to_environment(self._tokenizer.unnormalize(normalized, self._statistics))

    def normalized(self, tokens: ArrayLike) -> NDArray[np.float64]:
        """[..., 7 K] ids -> [..., K, 7]."""
        values = self._tokenizer.decode(tokens)
        return values.reshape(*values.shape[:-1], self._num_actions, NUM_ACTION_TOKENS)

    def encode(self, actions: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """[N, K, 7] -> ([N, 7 K] ids, [N, K, 7] normalised)."""
        normalized = self._tokenizer.normalize(to_policy(actions), self._statistics)
        return self._tokenizer.encode(normalized).reshape(len(normalized), -1), normalized


def to_environment(actions: ArrayLike) -> NDArray[np.float64]:
    """The policy's un-normalised actions [..., 7] -> the environment's.

    The arm's six numbers stay. The gripper is stretched from [0, 1] to [-1, 1], reduced to its sign and negated, as
    OpenVLA's LIBERO evaluation does.
    """
    converted = np.array(actions, dtype=np.float64)
    converted[..., GRIPPER] = -np.sign(2.0 * converted[..., GRIPPER] - 1.0)
    return converted


def to_policy(actions: ArrayLike) -> NDArray[np.float32]:
    """The environment's actions [..., 7] -> the policy's, not yet normalised: the inverse of `to_environment`."""
    converted = np.array(actions, dtype=np.float32)
    converted[..., GRIPPER] = 1.0 - np.clip(converted[..., GRIPPER], 0.0, 1.0)
    return converted


def dataset_statistics(actions: ArrayLike, num_episodes: int) -> dict[str, Any]:
    """`norm_stats` entry of the environment's actions [n, 7], in the published layout: 1 % and 99 % quantiles, the
    gripper not normalised."""
    seen = to_policy(actions)
    values = {
        "mean": seen.mean(0),
        "std": seen.std(0),
        "max": seen.max(0),
        "min": seen.min(0),
        "q01": np.quantile(seen, 0.01, axis=0),
        "q99": np.quantile(seen, 0.99, axis=0),
    }
    return {
        "action": {name: [float(number) for number in value] for name, value in values.items()}
        | {"mask": [index != GRIPPER for index in range(NUM_ACTION_TOKENS)]},
        "proprio": {name: [0.0] * NUM_ACTION_TOKENS for name in values},
        "num_transitions": len(seen),
        "num_trajectories": num_episodes,
    }
