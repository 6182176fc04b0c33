"""Learners with adapters, a frozen or quantised base, or a critic of its own."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from learner_helpers import (
    ACTIONS,
    changed,
    contributions,
    largest_difference,
    parameters,
    update,
    weights,
)

from vlarl_rllib.learner.collate import collate
from vlarl_rllib.learner.device_batch import DeviceBatch
from vlarl_rllib.learner.learner_group import VLALearnerGroup
from vlarl_rllib.models.openvla import OpenVLAForActionPrediction
from vlarl_rllib.models.presets import resolve_model

LORA = {"lora": {"rank": 4}}


def test_adapters_alone_are_trained_sent_merged_and_saved(
    make_group: Callable[..., VLALearnerGroup], tmp_path: Path
) -> None:
    local = make_group(0, LORA, lr=1e-3)
    before, sent_before = parameters(local), weights(local, 1)
    update(local)
    after, sent = parameters(local), weights(local, 2)
    moved = changed(before, after)
    assert moved == {name for name, p in local._learner.sharded.trained_modules().named_parameters() if p.requires_grad}
    assert all(".lora_A." in name or ".lora_B." in name or "value_head" in name for name in moved) and len(moved) > 50
    for name in changed(sent_before, sent):
        module = "policy." + name.removesuffix(".weight")
        lora_a, lora_b = (after[f"{module}.lora_{part}.default.weight"].flatten(1) for part in "AB")
        merged = after[f"{module}.base_layer.weight"] + (4 / 4 * lora_b @ lora_a).view(
            sent[name].shape
        )  # alpha = rank = 4
        torch.testing.assert_close(sent[name], merged, atol=1e-6, rtol=0)
    assert len(changed(sent_before, sent)) == sum(".lora_B." in name for name in moved)

    local.call("save_sharded", str(tmp_path))
    stored = dcp.FileSystemReader(tmp_path / "shards").read_metadata().state_dict_metadata
    assert {name.removeprefix("model.") for name in stored if name.startswith("model.")} == moved, (
        "the frozen base is model.path's"
    )


@pytest.mark.parametrize("targets", ["published", "language_model"])
def test_adapters_merged_ahead_learn_and_send_the_same(
    make_group: Callable[..., VLALearnerGroup], targets: str
) -> None:
    """To the bit, also where features of frozen towers are kept from the score pass."""
    groups = [
        make_group(0, {"lora": {"rank": 4, "targets": targets}}, learners={"merge_ahead": ahead}, lr=1e-3)
        for ahead in (False, True)
    ]
    for iteration in range(2):
        in_each_pass, ahead = (update(group, iteration) for group in groups)
        assert in_each_pass == ahead
    assert not changed(*(parameters(group) for group in groups))
    assert not changed(*(weights(group, 1) for group in groups))
    held = dict(groups[1]._learner.sharded.policy.named_buffers())
    name = "language_model.model.layers.0.mlp.up_proj.merged_weight"
    assert torch.equal(held[name], weights(groups[1], 2)[name.replace("merged_weight", "weight")])
    assert weights(groups[1], 3)[name.replace("merged_weight", "weight")].data_ptr() != held[name].data_ptr()
    assert not [name for name in groups[0]._learner.sharded.policy.state_dict() if "merged_weight" in name]


def test_a_frozen_bfloat16_base_under_float32_adapters(make_group: Callable[..., VLALearnerGroup]) -> None:
    group = make_group(0, LORA | {"dtype": "bfloat16"}, lr=1e-3)
    before, sent_before = parameters(group), weights(group, 1)
    dtypes = {name: p.dtype for name, p in group._learner.sharded.trained_modules().named_parameters()}
    assert {dtypes[name] for name in before if ".lora_" in name or "value_head" in name} == {torch.float32}
    assert dtypes["policy.language_model.model.layers.0.self_attn.q_proj.base_layer.weight"] == torch.bfloat16
    update(group)
    assert not [
        name for name in changed(before, parameters(group)) if ".lora_" not in name and "value_head" not in name
    ]
    sent = weights(group, 2)
    assert {tensor.dtype for tensor in sent.values()} == {torch.bfloat16} and changed(sent_before, sent)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantised_base_in_bfloat16(make_group: Callable[..., VLALearnerGroup], bits: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="k-bit weights need bitsandbytes")
    group, other = (make_group(0, LORA | {"quantization": bits, "dtype": "bfloat16"}, lr=1e-3) for _ in range(2))
    before = weights(group, 1)
    assert update(group)["skipped_updates"] == 0
    assert changed(before, weights(group, 2))
    assert changed(parameters(group), parameters(other))
    group.call("save_sharded", str(tmp_path))
    other.call("load_sharded", str(tmp_path))
    assert not changed(parameters(group), parameters(other))


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantised_base_sends_what_it_computes_with(make_group: Callable[..., VLALearnerGroup], bits: str) -> None:
    pytest.importorskip("bitsandbytes", reason="k-bit weights need bitsandbytes")
    group = make_group(0, LORA | {"quantization": bits}, lr=1e-3)
    reference = OpenVLAForActionPrediction.from_pretrained(
        resolve_model(group.ranks.settings.model.path), dtype=torch.float32
    )
    sent, exact = weights(group, 1), {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    quantised = changed(exact, sent)
    assert len(quantised) == 2 * 7 and all(".layers." in name for name in quantised)  # the decoder's linear layers
    for name in quantised:
        error = (sent[name] - exact[name]).norm() / exact[name].norm()
        assert error < {"8bit": 0.01, "4bit": 0.12}[bits], name
    policy = group._learner.sharded.policy
    reference.load_state_dict(sent)
    batch = collate(contributions(), group._learner._processor.prompt_ids, ACTIONS)
    inputs = DeviceBatch(batch, torch.device("cpu"), fixed_length=False).inputs(np.arange(6))
    with torch.no_grad():
        torch.testing.assert_close(policy(**inputs).action_logits, reference(**inputs).action_logits, atol=1e-5, rtol=0)
    before = parameters(group)
    update(group)
    assert all(".lora_" in name or "value_head" in name for name in changed(before, parameters(group)))
    assert changed(sent, weights(group, 2)) > quantised


def test_a_separate_critic_learns_apart_from_the_policy(
    make_group: Callable[..., VLALearnerGroup], tmp_path: Path
) -> None:
    group = make_group(0, {"critic": "separate"}, critic_warmup_iterations=1)
    before, sent = parameters(group), weights(group, 1)
    assert not [name for name in sent if "value_head" in name]
    update(group, iteration=0)
    moved = changed(before, parameters(group))
    assert (
        moved
        and all(name.startswith("critic.") for name in moved)
        and "critic.language_model.model.layers.0.mlp.up_proj.weight" in moved
    )
    update(group, iteration=1)
    assert largest_difference(sent, weights(group, 2)) > 0.0
    group.call("save_sharded", str(tmp_path))
    saved = parameters(group)
    update(group, iteration=2)
    group.call("load_sharded", str(tmp_path))
    assert not changed(saved, parameters(group))


def test_two_learners_with_adapters_and_a_critic_of_its_own_do_what_one_does(
    make_group: Callable[..., VLALearnerGroup], tmp_path: Path
) -> None:
    one, two = (
        make_group(number, LORA | {"critic": "separate"}, lr=1e-3, critic_warmup_iterations=1) for number in (0, 2)
    )
    before = weights(one, 1)
    metrics, other = update(one, iteration=0), update(two, iteration=0)
    assert other["value_loss"] == pytest.approx(metrics["value_loss"], abs=1e-4)
    for group in (one, two):
        update(group, iteration=1)
    sent = weights(one, 2)
    assert changed(before, sent)
    assert largest_difference(sent, weights(two, 1)) <= 1e-4  # Adam on gradients near zero, at a large learning rate
    one.call("save_sharded", str(tmp_path))
    two.call("load_sharded", str(tmp_path))
    assert largest_difference(sent, weights(two, 2)) == 0.0
