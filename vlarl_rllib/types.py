"""What travels between the parts, with shapes. Nothing here imports torch, Ray or vLLM.

Letters: A = action tokens of one action (7), S = side of the policy's square input image in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NUM_ACTION_TOKENS = 7
"""Tokens of one action: x, y, z, roll, pitch, yaw, gripper (OpenVLA, arXiv 2406.09246, section 3)."""
NUM_ACTION_BINS = 256
"""Values an action token can take (OpenVLA, section 3.2)."""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One frame that waits for an action."""

    image: np.ndarray
    """[S, S, 3] uint8, already through the observation path; S is exactly the policy's image size."""
    instruction: str
    seed: int
    """Seeds this request's own generator, so that its tokens do not depend on what else is in the batch."""
    temperature: float
    """Softmax temperature over the 256 action ids; 0 = greedy, whose log-probs are those at temperature 1."""


@dataclass(frozen=True, slots=True)
class SampleReply:
    """The action that an engine sampled for one request."""

    tokens: np.ndarray
    """[A] int64 token ids, each one of the 256 action ids."""
    log_probs: np.ndarray
    """[A] float32 natural log-probabilities of `tokens` in the tempered 256-way distribution they were drawn from."""
    policy_version: int
    """Push counter of the weights that produced the tokens."""


@dataclass(frozen=True, slots=True)
class WeightManifest:
    """A full set of policy weights that can be read now; it stays readable until the next version is committed."""

    version: int
    """Push counter: never repeats, never decreases within a run."""
    transport: str
    location: str
    """Where the transport finds the buckets (for `shared_memory`: a directory)."""
    buckets: tuple[str, ...]
    """Names of the buckets in the order they are to be loaded."""
    num_tensors: int
    num_bytes: int
    checksums: tuple[str, ...] | None = None
    """SHA-256 of each bucket in hex where `weights.checksum` is on, else None."""
