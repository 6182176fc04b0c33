"""From episodes to tensors, and which steps make up each minibatch on each rank.

A step of a rollout is a decision: a reply of the policy, of which one action or several were played.

Letters: N = decisions of a rank, E = its frames behind fragments that go on, F = its fragments (a fragment is an
uninterrupted piece of one episode), T = longest fragment, A = tokens of a decision, S = image side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vlarl_rllib.models.family import ActionFormat
from vlarl_rllib.types import DURATION_KEY, INSTRUCTION_KEY, LOG_PROBS_KEY, VALUE_KEY, VERSION_KEY

if TYPE_CHECKING:
    from ray.rllib.env.single_agent_episode import SingleAgentEpisode


@dataclass(frozen=True)
class RolloutBatch:
    """All decisions that one rank owns, in host memory; images stay uint8."""

    frames: np.ndarray
    """[N+E, S, S, 3] uint8: the frame of each decision, then the frame behind each fragment that did not terminate."""
    frame_prompt: np.ndarray
    """[N+E] int64 index into `prompts`."""
    prompts: list[list[int]]
    """Token ids of each distinct prompt."""
    tokens: np.ndarray
    """[N, A] int64 action token ids."""
    behaviour_log_probs: Tensor
    """[N, A] float32"""
    executed: Tensor
    """[N, A] bool: tokens of actions that were played."""
    durations: Tensor
    """[N] int64: environment steps of each decision."""
    versions: Tensor
    """[N] int64: policy version that made each decision."""
    rewards: Tensor
    """[N] float32: the discounted sum of those of its environment steps (the plain one where group advantages have no
    discount)."""
    fragment: np.ndarray
    """[N] int64: the fragment of each decision."""
    column: np.ndarray
    """[N] int64: the place of each decision in its fragment."""
    fragment_contribution: np.ndarray
    """[F] int64: the contribution that each fragment came in."""
    fragment_terminated: np.ndarray
    """[F] bool"""
    fragment_bootstrap: np.ndarray
    """[F] int64: index into `frames` of the frame behind the fragment; -1 after termination."""
    contribution_steps: tuple[int, ...]
    """Decisions of each contribution, in order; they sum to N."""
    behaviour_values: Tensor | None = None
    """[N] float32 the sampler's; None where it gave none."""

    @property
    def num_decisions(self) -> int:
        return len(self.tokens)

    @property
    def frames_behind(self) -> np.ndarray:
        """[E] int64 indices into `frames` of those that no decision was made on."""
        return np.arange(self.num_decisions, len(self.frames))

    def rows(self, flat: Tensor) -> Tensor:
        """[N] -> [F, T], zero behind the end of a fragment."""
        num_columns = int(self.column.max()) + 1 if len(self.column) else 0
        rows = torch.zeros(len(self.fragment_terminated), num_columns, dtype=flat.dtype)
        rows[self.fragment, self.column] = flat
        return rows

    def flat(self, rows: Tensor) -> Tensor:
        """[F, T] -> [N]."""
        return rows[self.fragment, self.column]

    def decisions_at(self, frames: np.ndarray) -> np.ndarray:
        """The decision that was made on each of these frames; of one behind a fragment, on which none was made, the
        first of all."""
        return np.where(frames < self.num_decisions, frames, 0)


def collate(
    contributions: Sequence[Sequence[SingleAgentEpisode]],
    prompt_ids: Callable[[str], list[int]],
    actions: ActionFormat,
) -> RolloutBatch:
    """Put the fragments of all contributions one after the other.

    Args:
        contributions: for each slot, or group of episodes, its fragments in the order they were played.
        prompt_ids: instruction -> token ids.
        actions: how a decision is written.

    Raises:
        ValueError: for no contributions at all, or a fragment without steps.
    """
    fragments = [episode for contribution in contributions for episode in contribution]
    if not fragments or any(len(episode) == 0 for episode in fragments):
        raise ValueError(
            "contributions: every learner needs at least one fragment, and a fragment at least one decision; got an "
            "empty one"
        )
    frames = [np.asarray(episode.get_observations()) for episode in fragments]
    rewards = np.concatenate([np.asarray(episode.get_rewards(), dtype=np.float32) for episode in fragments])
    tokens = np.concatenate([np.asarray(episode.get_actions(), dtype=np.int64) for episode in fragments])
    durations = _column(fragments, DURATION_KEY, np.int64)
    lengths = np.array([len(episode) for episode in fragments])
    terminated = np.array([bool(episode.is_terminated) for episode in fragments])
    num_decisions = int(lengths.sum())
    bootstrap = np.where(terminated, -1, num_decisions + np.cumsum(~terminated) - 1)

    prompts: dict[str, int] = {}
    fragment_prompt = np.array(
        [prompts.setdefault(episode.custom_data[INSTRUCTION_KEY], len(prompts)) for episode in fragments]
    )
    fragment = np.repeat(np.arange(len(fragments)), lengths)
    with_values = VALUE_KEY in fragments[0].extra_model_outputs
    return RolloutBatch(
        frames=np.concatenate(
            [images[:-1] for images in frames]
            + [images[-1:] for images, done in zip(frames, terminated, strict=True) if not done]
        ),
        frame_prompt=np.concatenate([fragment_prompt[fragment], fragment_prompt[~terminated]]),
        prompts=[prompt_ids(instruction) for instruction in prompts],
        tokens=tokens,
        behaviour_log_probs=torch.from_numpy(_column(fragments, LOG_PROBS_KEY, np.float32)),
        executed=torch.from_numpy(actions.executed_tokens(durations)),
        durations=torch.from_numpy(durations),
        versions=torch.from_numpy(_column(fragments, VERSION_KEY, np.int64)),
        rewards=torch.from_numpy(rewards),
        fragment=fragment,
        column=np.concatenate([np.arange(length) for length in lengths]),
        fragment_contribution=np.repeat(
            np.arange(len(contributions)), [len(contribution) for contribution in contributions]
        ),
        fragment_terminated=terminated,
        fragment_bootstrap=bootstrap,
        contribution_steps=tuple(sum(len(episode) for episode in contribution) for contribution in contributions),
        behaviour_values=torch.from_numpy(_column(fragments, VALUE_KEY, np.float32)) if with_values else None,
    )


def _column(fragments: Sequence[SingleAgentEpisode], key: str, dtype: Any) -> np.ndarray:
    """An extra model output of all decisions, [N, ...]."""
    return np.concatenate([np.asarray(episode.get_extra_model_outputs(key), dtype=dtype) for episode in fragments])


@dataclass(frozen=True, slots=True)
class Minibatch:
    """One optimiser step as one rank sees it."""

    forwards: tuple[np.ndarray, ...]
    """Local indices of decisions of each forward pass; as many passes on every rank, so some may be empty."""
    num_valid: int
    """Decisions of the minibatch on all ranks together."""


@dataclass(frozen=True, slots=True)
class UpdatePlan:
    """Who owns which contribution. Every rank derives the same minibatches from it without communication."""

    steps: tuple[int, ...]
    """Decisions of each contribution, in the order that defines their global index."""
    owners: tuple[int, ...]
    """Rank that holds each contribution."""
    num_ranks: int
    seed: int
    """Seed of this iteration's permutations."""

    def minibatches(
        self, rank: int, num_epochs: int, minibatch_size: int, micro_batch_size: int
    ) -> Iterator[Minibatch]:
        """Minibatches of near-equal size, drawn from one permutation of all decisions per epoch; none is left out or
        repeated.

        The permutation does not depend on the number of ranks, so 1 learner and 2 make the same optimiser steps.
        """
        owner = np.repeat(self.owners, self.steps)
        local = np.zeros(len(owner), dtype=np.int64)
        for r in range(self.num_ranks):
            local[owner == r] = np.arange(int((owner == r).sum()))
        rng = np.random.default_rng(self.seed)
        for _ in range(num_epochs):
            for chosen in np.array_split(rng.permutation(len(owner)), math.ceil(len(owner) / minibatch_size)):
                counts = np.bincount(owner[chosen], minlength=self.num_ranks)
                num_forwards = math.ceil(int(counts.max()) / micro_batch_size)
                mine = np.sort(local[chosen[owner[chosen] == rank]])
                yield Minibatch(
                    tuple(mine[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(num_forwards)),
                    len(chosen),
                )


def assign_owners(steps: Sequence[int], num_ranks: int) -> tuple[int, ...]:
    """Give each contribution whole to one rank, the longest first to the rank with the least so far."""
    load = [0] * num_ranks
    owners = [0] * len(steps)
    for index in sorted(range(len(steps)), key=lambda i: (-steps[i], i)):
        owners[index] = load.index(min(load))
        load[owners[index]] += steps[index]
    return tuple(owners)
