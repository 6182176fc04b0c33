"""Episodes to tensors, and the minibatches of uneven contributions."""

import numpy as np
import pytest
import torch
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.env.utils.infinite_lookback_buffer import InfiniteLookbackBuffer

from vlarl_rllib.learner.collate import UpdatePlan, assign_owners, collate
from vlarl_rllib.models.family import ActionFormat
from vlarl_rllib.types import DURATION_KEY, INSTRUCTION_KEY, LOG_PROBS_KEY, VALUE_KEY, VERSION_KEY


def fragment(length: int, first: int, *, terminated: bool = False, instruction: str = "reach") -> SingleAgentEpisode:
    """A fragment whose frames hold the numbers first, first + 1, ... and whose rewards are ten times those."""
    episode = SingleAgentEpisode()
    episode.custom_data[INSTRUCTION_KEY] = instruction
    episode.add_env_reset(np.full((2, 2, 3), first, np.uint8))
    for t in range(length):
        episode.add_env_step(
            np.full((2, 2, 3), first + t + 1, np.uint8),
            np.arange(7) + first + t,
            10.0 * (first + t),
            terminated=terminated and t == length - 1,
            extra_model_outputs={
                LOG_PROBS_KEY: np.full(7, -0.5 * (first + t), np.float32),
                DURATION_KEY: 1,
                VERSION_KEY: 0,
            },
        )
    return episode.to_numpy()


ACTIONS = ActionFormat(1, 7, range(256))


def prompt_ids(instruction: str) -> list[int]:
    return [1, *map(ord, instruction)]


def test_steps_then_bootstrap_frames() -> None:
    batch = collate(
        [[fragment(2, 10, terminated=True), fragment(3, 20)], [fragment(1, 30, instruction="push it")]],
        prompt_ids,
        ACTIONS,
    )
    assert batch.num_decisions == 6
    assert batch.contribution_steps == (5, 1)
    # the frame behind the terminated fragment (12) is not there; those behind the two cut ones (23, 31) come last
    assert batch.frames[:, 0, 0, 0].tolist() == [10, 11, 20, 21, 22, 30, 23, 31]
    assert batch.fragment_bootstrap.tolist() == [-1, 6, 7]
    assert batch.fragment_contribution.tolist() == [0, 0, 1]
    assert batch.prompts == [prompt_ids("reach"), prompt_ids("push it")]
    assert batch.frame_prompt.tolist() == [0, 0, 0, 0, 0, 1, 0, 1]
    assert batch.tokens[:, 0].tolist() == [10, 11, 20, 21, 22, 30]
    assert batch.rows(batch.rewards).tolist() == [[100, 110, 0], [200, 210, 220], [300, 0, 0]]
    assert torch.equal(batch.flat(batch.rows(batch.rewards)), batch.rewards)


def test_values_of_the_sampler_are_there_where_it_gave_them() -> None:
    without, given = [fragment(2, 10)], [fragment(2, 10), fragment(1, 20)]
    assert collate([without], prompt_ids, ACTIONS).behaviour_values is None
    for episode, values in zip(given, ([0.25, -1.5], [3.0]), strict=True):
        episode.extra_model_outputs[VALUE_KEY] = InfiniteLookbackBuffer(np.array(values))
    values = collate([given], prompt_ids, ACTIONS).behaviour_values
    assert values is not None and values.tolist() == [0.25, -1.5, 3.0] and values.dtype == torch.float32


def test_nothing_to_collate_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        collate([[]], prompt_ids, ACTIONS)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_minibatches_cover_every_step_once_per_epoch_with_equal_forwards(num_ranks: int) -> None:
    steps = (7, 3, 5, 4)
    plan = UpdatePlan(steps, assign_owners(steps, num_ranks), num_ranks, seed=4)
    per_rank = [
        list(plan.minibatches(rank, num_epochs=2, minibatch_size=8, micro_batch_size=2)) for rank in range(num_ranks)
    ]
    assert [len(batches) for batches in per_rank] == [6] * num_ranks  # 19 steps, at most 8 each: 3 a epoch
    for batches in zip(*per_rank, strict=True):
        assert len({len(b.forwards) for b in batches}) == 1
        assert {b.num_valid for b in batches} == {sum(len(f) for b in batches for f in b.forwards)}
    for rank, batches in enumerate(per_rank):
        owned = sum(s for s, owner in zip(steps, plan.owners, strict=True) if owner == rank)
        for epoch in (batches[:3], batches[3:]):
            seen = np.concatenate([f for b in epoch for f in b.forwards])
            assert sorted(seen.tolist()) == list(range(owned))


def test_minibatches_hold_the_same_steps_whatever_the_number_of_ranks() -> None:
    steps = (7, 3, 5, 4)

    def global_steps(num_ranks: int) -> list[list[tuple[int, int]]]:
        plan = UpdatePlan(steps, assign_owners(steps, num_ranks), num_ranks, seed=4)
        batches: list[list[tuple[int, int]]] = []
        for rank in range(num_ranks):
            own = [(c, t) for c, owner in enumerate(plan.owners) if owner == rank for t in range(steps[c])]
            for i, b in enumerate(plan.minibatches(rank, 1, 8, 2)):
                batches += [[]] if i == len(batches) else []
                batches[i] += [own[j] for f in b.forwards for j in f]
        return [sorted(b) for b in batches]

    assert global_steps(1) == global_steps(2) == global_steps(3)


def test_owners_balance_steps_and_leave_contributions_whole() -> None:
    assert assign_owners([9, 2, 3, 4], 2) == (0, 1, 1, 1)
