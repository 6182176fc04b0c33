"""The FSDP learners on a real tiny OpenVLA: any number of them makes the same update."""

import pickle
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from learner_helpers import (
    STEPS,
    add_values,
    contributions,
    largest_difference,
    update,
    weights,
    whole,
)

from tests.replay_helpers import pretend_capture
from vlarl_rllib.errors import DivergedError
from vlarl_rllib.learner import fsdp
from vlarl_rllib.learner.device_batch import DeviceBatch
from vlarl_rllib.learner.learner_group import VLALearnerGroup
from vlarl_rllib.learner.passes import PPOPasses
from vlarl_rllib.learner.rank_group import LearnerError, LearnerGroupError
from vlarl_rllib.learner.sharded_policy import ShardedPolicy
from vlarl_rllib.settings.learning import TrainingSettings


def read_until_lost(ref: Any) -> None:
    """What a process owned can still be fetched for about a second after its death."""
    while True:
        ray.get(ref)
        time.sleep(0.1)


def assert_same_update(
    metrics: dict[str, float],
    expected: dict[str, float],
    after: dict[str, torch.Tensor],
    wanted: dict[str, torch.Tensor],
) -> None:
    assert largest_difference(wanted, after) <= 1e-5
    for name in ("policy_loss", "value_loss", "entropy", "approx_kl", "grad_norm", "explained_variance"):
        assert metrics[name] == pytest.approx(expected[name], abs=1e-4), name


def test_0_and_2_learners_make_the_same_update_and_load_each_others_checkpoint(
    make_group: Callable[..., VLALearnerGroup], tmp_path: Path
) -> None:
    local = make_group(0)
    before = weights(local, 1)
    metrics = update(local)
    after = weights(local, 2)
    assert largest_difference(before, after) > 5e-5, "the update changed nothing, so equality below would mean nothing"
    assert metrics["optimizer_steps"] == 6  # 30 steps in 3 minibatches, 2 epochs
    assert metrics["first_ratio_deviation"] < 1e-4
    local.call("save_sharded", str(tmp_path))

    two = make_group(2)
    assert_same_update(update(two), metrics, weights(two, 2), after)

    # The store of the process group takes commands from whoever connects: it listens to this machine alone.
    port = two.call(
        "apply", lambda learner: torch.distributed.distributed_c10d._get_default_store().underlying_store.port
    )[0]
    assert [c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port] == [
        "127.0.0.1"
    ]

    # Adam's moments travel too: after loading what the local learner saved, both make the same second update.
    local_second = (update(local, 1), weights(local, 3))[1]
    two.call("load_sharded", str(tmp_path))
    update(two, 1)
    assert largest_difference(local_second, weights(two, 3)) <= 2e-5

    # With values of the engines one rank scores 2 frames and the other 3, in as many passes.
    def take_values(learner: Any) -> None:
        chosen = {"values": "engine", "old_log_probs": "behaviour", "num_epochs": 1}
        learner.settings = learner.settings.replaced(training=chosen, learners={"micro_batch_size": 1})

    episodes = contributions()
    add_values(episodes, local)
    for group in (local, two):
        group.call("apply", take_values)
    expected, metrics = update(local, 2, episodes), update(two, 2, episodes)
    for name in ("policy_loss", "value_loss", "advantage_abs_mean", "value_mean"):
        assert metrics[name] == pytest.approx(expected[name], abs=1e-4), name
    assert abs(metrics["value_mean"]) > 1e-3


def test_compiled_blocks_of_fixed_shapes_make_the_same_update(
    make_group: Callable[..., VLALearnerGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uneven passes are filled up, so that each block sees one shape: with a compiler that only traces."""
    shapes = set()

    def trace(module: torch.nn.Module, dynamic: bool) -> None:
        module.register_forward_pre_hook(lambda _, inputs: shapes.add(tuple(inputs[0].shape)))
        module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager", dynamic=dynamic)

    plain = make_group(0)
    monkeypatch.setattr(torch.nn.Module, "compile", trace)
    compiled = make_group(0, learners={"compile": True})
    for iteration in range(2):
        expected, metrics = update(plain, iteration), update(compiled, iteration)
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), name
    assert largest_difference(weights(plain, 1), weights(compiled, 1)) <= 1e-5
    rows_and_lengths = {shape[:2] for shape in shapes}
    lengths = {length for _, length in rows_and_lengths}
    assert len(lengths) == 3, "of either tower, and of the language model"
    assert rows_and_lengths == {(rows, length) for rows in (4, 16) for length in lengths}, "to learn, and to score"


@pytest.mark.slow
def test_inductor_makes_the_same_update(make_group: Callable[..., VLALearnerGroup]) -> None:
    plain, compiled = make_group(0), make_group(0, learners={"compile": True})
    expected, metrics = update(plain), update(compiled)
    assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-5, nan_ok=True)
    assert largest_difference(weights(plain, 1), weights(compiled, 1)) <= 2e-5


def test_recorded_passes_make_the_same_update(
    make_group: Callable[..., VLALearnerGroup], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From the third of a shape on they are replayed; rows and prompts are filled up, as for compiled blocks. What a
    checkpoint brings is learned from by new recordings."""
    plain = make_group(0, critic_warmup_iterations=1)
    monkeypatch.setattr(ShardedPolicy, "_make_capture", lambda sharded: pretend_capture(sharded.trained_modules()))
    recorded = make_group(0, critic_warmup_iterations=1)
    passes = recorded._learner._passes
    for iteration in range(5):
        if iteration == 3:
            plain.call("save_sharded", str(tmp_path))
            for optimizer in recorded._learner.sharded.optimizers.values():
                optimizer.state.clear()  # as for another trial in the same process
            recorded.call("load_sharded", str(tmp_path))
        expected, metrics = update(plain, iteration), update(recorded, iteration)
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), name
        if iteration == 2:
            used = [shape for run in (passes._score, *passes._learn.values()) for shape in run._shapes.values()]
            assert len(used) == 4 and all(shape.replay for shape in used), "two to score, one to learn, one to warm up"
    assert largest_difference(weights(plain, 1), weights(recorded, 1)) <= 1e-5


def test_activations_computed_again_are_those_of_rounded_weights(make_group: Callable[..., VLALearnerGroup]) -> None:
    model, checkpointing = {"dtype": "bfloat16"}, {"fsdp": {"checkpoint_activations": True}}
    plain, again = make_group(0, model), make_group(0, model, learners=checkpointing)
    passes = Counter[VLALearnerGroup]()
    for group in (plain, again):
        first = group._learner.sharded.policy.language_model.model.layers[0].self_attn.q_proj
        first.register_forward_hook(lambda *_, group=group: passes.update([group]))
    expected, metrics = update(plain), update(again)
    assert passes[again] == passes[plain] + 2 * sum(-(-rows // 4) for rows in (10, 10, 10)), "each that learns, twice"
    for name in ("policy_loss", "value_loss", "grad_norm", "grad_norm_critic"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-3), name
    assert largest_difference(weights(plain, 1), weights(again, 1)) <= 2e-5


def test_where_nothing_needs_all_scores_one_pass_measures_the_gap(
    make_group: Callable[..., VLALearnerGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"rollout": {"group_size": 2, "episodes_per_iteration": 4}, "advantages": "rloo"}
    some = make_group(0, **chosen, old_log_probs="behaviour")
    metrics = update(some)
    assert metrics["logprob_gap_samples"] == 4, "a micro-batch"
    monkeypatch.setattr(TrainingSettings, "scores_all", True)
    every = make_group(0, **chosen, old_log_probs="behaviour")
    expected = update(every)
    assert expected["logprob_gap_samples"] == sum(STEPS)
    assert largest_difference(weights(some, 1), weights(every, 1)) == 0.0
    assert metrics["policy_loss"] == expected["policy_loss"] != 0.0
    assert 0.0 < metrics["logprob_gap_max"] <= expected["logprob_gap_max"]


def test_values_of_the_engines_make_the_same_update_and_save_most_scores(
    make_group: Callable[..., VLALearnerGroup], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With a value head that has learned something, so that it matters what the values are."""
    chosen = {"old_log_probs": "behaviour", "num_epochs": 1}
    every, engine = make_group(0, **chosen), make_group(0, **chosen, values="engine")
    update(every)
    every.call("save_sharded", str(tmp_path))
    engine.call("load_sharded", str(tmp_path))
    episodes = contributions()
    add_values(episodes, every)
    scored: list[int] = []
    score = PPOPasses.score

    def counting(passes: PPOPasses, data: DeviceBatch, frames: np.ndarray, rows: int) -> Any:
        scored.extend(frames)
        return score(passes, data, frames, rows)

    monkeypatch.setattr(PPOPasses, "score", counting)
    expected, all_scored = update(every, 1, episodes), scored.copy()
    scored.clear()
    metrics = update(engine, 1, episodes)
    assert len(all_scored) == 33 and len(scored) == 7, "a micro-batch of 4, and what lies behind 3 fragments"
    assert metrics["logprob_gap_samples"] == 4 and metrics["value_gap_max"] < 1e-5
    names = ("policy_loss", "value_loss", "first_value_loss", "advantage_abs_mean", "value_mean", "explained_variance")
    for name in names:
        assert metrics[name] == pytest.approx(expected[name], abs=1e-5), name
    assert abs(metrics["value_mean"]) > 1e-3


def test_reductions_leave_what_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsdp.dist, "all_reduce", lambda tensor, op: tensor.mul_(2))
    values = torch.ones(3, 2, dtype=torch.float64)
    assert fsdp.all_reduce(values[:, 1]).tolist() == [2.0, 2.0, 2.0]
    assert values.eq(1.0).all()


def test_the_norm_of_no_gradients_is_on_their_device() -> None:
    untouched = torch.nn.Linear(2, 2, device="meta")
    assert fsdp.clip_grad_norm([*untouched.parameters()], 1.0).device.type == "meta"


def test_critic_warm_up_leaves_the_policy_alone(make_group: Callable[..., VLALearnerGroup]) -> None:
    group = make_group(0, critic_warmup_iterations=1)
    before = weights(group, 1)
    head = group._learner.sharded.policy.value_head
    values_before = [whole(p) for p in head.parameters()]
    update(group, iteration=0)
    assert largest_difference(before, weights(group, 2)) == 0.0
    assert any(not torch.equal(a, whole(p)) for a, p in zip(values_before, head.parameters(), strict=True))
    update(group, iteration=1)
    assert largest_difference(before, weights(group, 3)) > 0.0


def test_whitened_rewards_have_unit_variance_and_their_mean_is_scaled(
    make_group: Callable[..., VLALearnerGroup],
) -> None:
    make_group(0)  # a process group
    # Mean 1, population variance (3 x 1 + 9) / 4 = 3
    rewards = torch.tensor([0.0, 0.0, 0.0, 4.0])
    assert fsdp.whiten(rewards).tolist() == pytest.approx([0.0, 0.0, 0.0, 4 / 3**0.5])
    assert fsdp.normalize(rewards).tolist() == pytest.approx([-1 / 3**0.5] * 3 + [3**0.5])
    for equal in (0.5, -1.1):  # the second is no binary fraction
        constant = torch.full((1536,), equal)
        assert torch.equal(fsdp.whiten(constant), constant) and fsdp.normalize(constant).abs().max() < 1e-6


def test_rewards_are_whitened_where_asked(make_group: Callable[..., VLALearnerGroup]) -> None:
    plain, whitened = update(make_group(0, num_epochs=1)), update(make_group(0, num_epochs=1, whiten_rewards=True))
    deviation = np.std(np.concatenate([episode.rewards for slot in contributions() for episode in slot]))
    assert abs(deviation - 1.0) > 0.05, "else whitening changes nothing"
    # A new value head says 0 to everything, so advantages are linear in the rewards.
    assert plain["value_mean"] == 0.0
    assert whitened["advantage_abs_mean"] == pytest.approx(plain["advantage_abs_mean"] / deviation, rel=1e-5)
    assert whitened["reward_mean"] == plain["reward_mean"], "the metric is of what was received"


def test_value_shaping_acts_like_a_larger_critic(make_group: Callable[..., VLALearnerGroup]) -> None:
    group = make_group(0, normalize_advantages=False, gamma=0.9, gae_lambda=0.5)
    learner = group._learner
    update(group)  # so that values are not all 0
    learner.settings = learner.settings.replaced(rewards={"value_shaping": 2.0})
    group.receive(contributions(), STEPS)
    batch = learner._batch
    targets = learner._targets(DeviceBatch(batch, torch.device("cpu"), fixed_length=False))
    # The first fragment: five steps to a success, behind which the value is 0.
    values, rewards = targets["old_values"][:5].double(), batch.rewards[:5].double()
    larger = 3.0 * torch.cat([values, torch.zeros(1, dtype=torch.float64)])
    expected, running = [], 0.0
    for step in reversed(range(5)):
        running = float(rewards[step] + 0.9 * larger[step + 1] - larger[step]) + 0.9 * 0.5 * running
        expected.insert(0, running)
    assert values.abs().max() > 1e-3
    assert targets["advantages"][:5].tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.allclose(targets["value_targets"], targets["advantages"] + targets["old_values"])


def test_an_optimiser_that_had_not_stepped_is_new_after_a_restore(
    make_group: Callable[..., VLALearnerGroup], tmp_path: Path
) -> None:
    group = make_group(0)
    group.call("save_sharded", str(tmp_path))
    update(group)
    first = weights(group, 1)
    group.call("load_sharded", str(tmp_path))
    update(group)
    assert largest_difference(first, weights(group, 2)) == 0.0


def test_a_non_finite_gradient_is_skipped_counted_and_at_last_fatal(make_group: Callable[..., VLALearnerGroup]) -> None:
    group = make_group(0, max_skipped_updates=8)
    before = weights(group, 1)
    group._learner.sharded.policy.value_head.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    metrics = update(group)
    assert metrics["skipped_updates"] == 6
    assert largest_difference(before, weights(group, 2)) == 0.0
    with pytest.raises(
        DivergedError, match=r"max_skipped_updates = 8; lower training.lr \(2e-05\) or training.value_lr \(0.001\)"
    ):
        update(group, 1)


def test_weights_that_are_not_finite_reach_neither_engines_nor_a_checkpoint(
    make_group: Callable[..., VLALearnerGroup],
) -> None:
    group = make_group(0)
    group._learner.sharded.optimizers["policy"].param_groups[0]["lr"] = float("inf")
    with pytest.raises(DivergedError, match=r"the update left weights that are not finite; lower training.lr"):
        update(group)


def test_one_learner_makes_the_same_update_leaves_out_a_lost_contribution_and_is_noticed_at_once_when_it_dies(
    make_group: Callable[..., VLALearnerGroup],
) -> None:
    group, local = make_group(1), make_group(0)
    assert_same_update(update(group), update(local), weights(group, 2), weights(local, 2))

    @ray.remote
    class Owner:
        def put(self, value: Any) -> list[Any]:
            return [ray.put(value)]

    owner = Owner.remote()
    (lost,) = ray.get(owner.put.remote("what nobody gets to see"))
    ray.kill(owner)
    with pytest.raises(ray.exceptions.RayError):
        read_until_lost(lost)
    refs = [lost, *(ray.put(fragments) for fragments in contributions()[1:])]
    assert group.receive(refs, STEPS) == [0]
    results = group.update(iteration=0)
    assert float(results[0]["default_policy"]["optimizer_steps"].peek()) == 6  # 22 steps still make 3 minibatches
    assert group.receive([lost], [8]) == [0]
    with pytest.raises(ValueError, match="0 contributions arrived, too few for 1 learner"):
        group.update(iteration=1)

    with pytest.raises(LearnerError, match=r"rank 0 failed: .*no complete checkpoint here"):
        group.call("load_sharded", "/nonexistent")
    ray.kill(group.ranks.workers[0])
    with pytest.raises(LearnerGroupError, match="rank 0 died"):
        group.receive(refs[1:], STEPS[1:])
    group.rebuild()
    assert group.receive(refs[1:], STEPS[1:]) == []
    assert float(group.update(iteration=1)[0]["default_policy"]["optimizer_steps"].peek()) == 6


def test_a_checkpoint_that_would_run_code_is_refused(
    make_group: Callable[..., VLALearnerGroup], tmp_path: Path
) -> None:
    group = make_group(0)
    group.call("save_sharded", str(tmp_path))
    group.call("load_sharded", str(tmp_path))
    metadata = tmp_path / "shards" / ".metadata"
    whole = metadata.read_bytes()
    metadata.write_bytes(pickle.dumps(Touching(tmp_path / "touched")))
    with pytest.raises(
        ValueError,
        match=r"names pathlib\.Path\.touch, which torch's checkpoints have no use for|names builtins\.getattr",
    ):
        group.call("load_sharded", str(tmp_path))
    assert not (tmp_path / "touched").exists()
    metadata.write_bytes(whole)
    next((tmp_path / "shards").glob("*.distcp")).write_bytes(b"cut short")
    with pytest.raises(OSError, match=str(tmp_path)):
        group.call("load_sharded", str(tmp_path))


class Touching:
    """Its unpickling touches a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return self.path.touch, ()


def test_group_relative_advantages_compare_the_episodes_of_a_contribution_and_leave_the_critic_alone(
    make_group: Callable[..., VLALearnerGroup],
) -> None:
    group = make_group(0, rollout={"episodes_per_iteration": 2, "group_size": 2}, advantages="rloo", num_epochs=1)
    group.receive(contributions(), STEPS)
    learner = group._learner
    batch = learner._batch
    advantages = learner._targets(DeviceBatch(batch, torch.device("cpu"), fixed_length=False))["advantages"]
    first, second = batch.rewards[:5].sum(), batch.rewards[5:8].sum()
    assert advantages[:8].tolist() == pytest.approx([float(first - second)] * 5 + [float(second - first)] * 3, abs=1e-5)
    assert advantages[8:].tolist() == [0.0] * 22, "the other contributions are of one episode each"
    before = {name: whole(parameter) for name, parameter in learner.sharded.policy.named_parameters()}
    metrics = update(group)
    assert metrics["advantage_abs_mean"] == pytest.approx(advantages.abs().mean().item(), rel=1e-5)
    moved = {
        name
        for name, parameter in learner.sharded.policy.named_parameters()
        if not torch.equal(whole(parameter), before[name])
    }
    assert moved and not any("value_head" in name for name in moved)
