"""Batching, padding, sampling, values, frames and training behaviour of OpenVLA-OFT, on golden checkpoint T."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.parity_oft import GoldenOFT
from vlarl_rllib.models.openvla_oft import OpenVLAOFTForActionPrediction

Inputs = dict[str, Tensor]
MODES = ["one", "two", "nostop"]


def without_pads(inputs: Inputs, row: int) -> Inputs:
    """One row of a batch, cut to its own prompt."""
    length = int(inputs["attention_mask"][row].sum())
    single = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
    return single | {name: single[name][:, :length] for name in ("input_ids", "attention_mask")}


@pytest.fixture(scope="module")
def model(golden_t: GoldenOFT) -> OpenVLAOFTForActionPrediction:
    """Of one image; nobody may change it."""
    return golden_t.model("one")


@pytest.fixture
def inputs(golden_t: GoldenOFT) -> Inputs:
    """Prompts of three lengths."""
    return golden_t.inputs("one")


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_a_row_scores_alike_alone_and_in_a_batch_of_uneven_prompts(mode: str, golden_t: GoldenOFT) -> None:
    model, inputs = golden_t.model(mode), golden_t.inputs(mode)
    assert len(set(inputs["attention_mask"].sum(1).tolist())) == 3
    batched = model.action_logits(**inputs)
    assert batched.dtype == torch.float32 and batched.shape[1:] == (56, 256)
    for row in range(len(batched)):
        alone = model.action_logits(**without_pads(inputs, row))
        torch.testing.assert_close(batched[row], alone[0], atol=2e-4, rtol=0)


@torch.no_grad()
def test_neither_side_nor_content_of_pads_matters(model: OpenVLAOFTForActionPrediction, inputs: Inputs) -> None:
    expected = model.action_logits(**inputs)
    mask = inputs["attention_mask"]
    length = mask.shape[1]
    columns = (torch.arange(length) - (length - mask.sum(1))[:, None]) % length
    left = inputs | {name: inputs[name].gather(1, columns) for name in ("input_ids", "attention_mask")}
    assert left["attention_mask"][:, 0].min() == 0
    assert torch.equal(model.action_logits(**left), expected)
    scribbled = inputs | {"input_ids": torch.where(mask == 1, inputs["input_ids"], 5)}
    torch.testing.assert_close(model.action_logits(**scribbled), expected, atol=2e-4, rtol=0)
    longer = torch.nn.functional.pad(inputs["input_ids"], (0, 9), value=384)
    wider = inputs | {"input_ids": longer, "attention_mask": torch.nn.functional.pad(mask, (0, 9))}
    torch.testing.assert_close(model.action_logits(**wider), expected, atol=2e-4, rtol=0)


@torch.no_grad()
def test_every_token_sees_every_other(golden_t: GoldenOFT, inputs: Inputs) -> None:
    """A word of the prompt changes the first token's distribution, and so does what stands behind all of them."""
    model, row = golden_t.model("one"), without_pads(inputs, 0)
    expected = model.action_logits(**row)[0, 0]
    other = row | {"input_ids": row["input_ids"].clone()}
    other["input_ids"][0, -4] = 7
    assert (model.action_logits(**other)[0, 0] - expected).abs().max() > 0.1
    model.config.text_config.eos_token_id = 7
    assert (model.action_logits(**row)[0, 0] - expected).abs().max() > 0.1


@torch.no_grad()
def test_log_probs_of_samples_are_those_of_the_forward_pass(
    model: OpenVLAOFTForActionPrediction, inputs: Inputs, golden_t: GoldenOFT
) -> None:
    temperatures = torch.tensor([1.0, 1.6, 0.7, 0.0, 1.0, 1.6, 0.0, 2.0])
    tokens, log_probs, values = model.sample_action_tokens(**inputs, temperatures=temperatures, seeds=list(range(8)))
    logits = model(**inputs, action_tokens=tokens).action_logits  # which are not looked at
    divisor = torch.where(temperatures == 0, 1.0, temperatures)[:, None, None]
    index = (tokens - model.action_token_ids[0])[..., None]
    expected = torch.log_softmax(logits / divisor, dim=-1).gather(-1, index)[..., 0]
    assert torch.equal(log_probs, expected)
    for row in (3, 6):
        assert torch.equal(tokens[row], golden_t.tensor("one.greedy_tokens")[row])
    assert tokens.dtype == torch.int64 and log_probs.dtype == torch.float32 and tokens.shape == (8, 56)
    assert values is None, "without a value head"


def test_a_sample_depends_on_its_seed_and_not_on_the_batch(
    model: OpenVLAOFTForActionPrediction, inputs: Inputs
) -> None:
    def sample(batch: Inputs, seeds: Any) -> Tensor:
        ones = torch.ones(len(batch["input_ids"]))
        return model.sample_action_tokens(**batch, temperatures=ones, seeds=seeds).tokens

    together = sample(inputs, list(range(7, 15)))
    for row in range(8):
        assert torch.equal(sample(without_pads(inputs, row), [7 + row])[0], together[row])
    assert torch.equal(sample(inputs, torch.arange(7, 15)), together)
    assert not torch.equal(sample(inputs, list(range(107, 115))), together)
    with pytest.raises(ValueError, match="one integer per row, got 2 for 8 rows"):
        sample(inputs, [1, 2])


def test_the_tokens_of_a_chunk_are_drawn_apart(model: OpenVLAOFTForActionPrediction, inputs: Inputs) -> None:
    """1,000 chunks of one frame: how often a position has its likeliest token is that token's probability, within four
    deviations at each of the 56."""
    temperatures, greedy = torch.full((1000,), 1.6), torch.zeros(1000, dtype=torch.bool)
    with torch.no_grad():
        logits = model.action_logits(**{name: tensor[:1] for name, tensor in inputs.items()})[0]
        tokens, _ = model._choose(logits.expand(1000, -1, -1), temperatures, greedy, list(range(1000)))
    best, p = logits.argmax(-1), torch.softmax(logits / 1.6, -1).max(-1).values
    share = (tokens - model.action_token_ids[0] == best).float().mean(0)
    assert ((share - p).abs() < 4 * (p * (1 - p) / 1000).sqrt() + 1e-6).all()


@torch.no_grad()
def test_values_come_from_the_last_prompt_token_and_never_from_a_pad(golden_t: GoldenOFT, inputs: Inputs) -> None:
    model = golden_t.model("one")
    assert model(**inputs).values is None
    head = model.add_value_head(seed=1)
    assert torch.equal(model(**inputs).values, torch.zeros(8))
    torch.nn.init.normal_(head.fc3.weight, generator=torch.Generator().manual_seed(0))
    values = model(**inputs).values
    torch.testing.assert_close(values, head(golden_t.tensor("one.prompt_hidden")), atol=1e-4, rtol=0)
    for row in range(8):
        torch.testing.assert_close(model(**without_pads(inputs, row)).values[0], values[row], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(**inputs, full_vocabulary=True).values, values)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["one", "two"])
def test_raw_frames_and_earlier_features_give_the_same_logits(mode: str, golden_t: GoldenOFT) -> None:
    model, inputs = golden_t.model(mode), golden_t.inputs(mode)
    output = model(**inputs)
    raw = golden_t.inputs(mode, raw_images=True)
    assert raw["pixel_values"].dtype == torch.uint8 and raw["pixel_values"].shape[1] == 3 * model.layout.num_images
    assert torch.equal(model.action_logits(**raw), output.action_logits)
    del raw["pixel_values"]
    again = model(**raw, vision_features=output.vision_features)
    assert torch.equal(again.action_logits, output.action_logits)
    with pytest.raises(ValueError, match="pass pixel_values, or vision_features"):
        model(**raw)


def test_what_an_engine_sends_are_the_cameras_side_by_side(golden_t: GoldenOFT) -> None:
    processor, arrays = golden_t.processor("two"), golden_t.arrays
    both = np.concatenate([arrays["images_u8"], arrays["wrist_images_u8"]], axis=3)
    sized = [processor.resize(frames) for frames in both]
    assert sized[0].shape == (28, 28, 6)
    from_engine = processor.raw_inputs(sized, ["push"] * 8, arrays["proprio_normalized"])
    expected = processor(
        list(arrays["images_u8"]),
        ["push"] * 8,
        list(arrays["wrist_images_u8"]),
        arrays["proprio_states"],
        golden_t.unnorm_key,
        raw_images=True,
    )
    assert from_engine.keys() == expected.keys()
    assert all(torch.equal(from_engine[name], expected[name]) for name in expected)


def test_gradients_reach_everything_but_the_dead_weights(golden_t: GoldenOFT) -> None:
    model, inputs = golden_t.model("two"), golden_t.inputs("two")
    model.add_value_head()
    output = model(**inputs)
    assert output.normalized_actions is not None and output.values is not None
    parts = (output.action_logits, output.values - 1, output.normalized_actions)
    sum(part.square().mean() for part in parts).backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    dead = (".blocks.2.", "featurizer.norm.", ".attn_pool.")
    assert without == {name for name in dict(model.named_parameters()) if any(part in name for part in dead)}


def test_checkpointed_activations_give_the_same_gradients_and_can_be_sampled(golden_t: GoldenOFT) -> None:
    from vlarl_rllib.models.openvla_oft.family import FAMILY

    gradients, inputs = [], golden_t.inputs("one")
    for enabled in (False, True):
        model = golden_t.model("one")
        if enabled:
            FAMILY.checkpoint_activations(model)
        model(**inputs).action_logits.square().mean().backward()
        gradients.append(model.vision_backbone.featurizer.patch_embed.proj.weight.grad)
    torch.testing.assert_close(*gradients)
    sampled = model.sample_action_tokens(**inputs, temperatures=torch.zeros(8))
    assert torch.equal(sampled.tokens, golden_t.tensor("one.greedy_tokens"))


@torch.no_grad()
def test_bfloat16_stays_close(golden_t: GoldenOFT) -> None:
    model, inputs = golden_t.model("two").to(torch.bfloat16), golden_t.inputs("two")
    output = model(**inputs)
    assert output.action_logits.dtype == output.normalized_actions.dtype == torch.float32
    exact = golden_t.model("two")(**inputs)
    # T's logits have a standard deviation of 3.4; a wrong cast is off by that
    assert (output.action_logits - exact.action_logits).square().mean().sqrt() < 0.5
    assert (output.normalized_actions - exact.normalized_actions).abs().mean() < 0.1


def test_what_does_not_fit_the_layout_is_refused_in_one_line(golden_t: GoldenOFT) -> None:
    one, two = golden_t.model("one"), golden_t.model("two")
    of_one, of_two = golden_t.inputs("one", slice(0, 2)), golden_t.inputs("two", slice(0, 2))
    frame = golden_t.arrays["images_u8"][0]
    processors = {mode: golden_t.processor(mode) for mode in ("one", "two")}
    states = golden_t.arrays["proprio_states"][:1]
    for call, message in (
        (lambda: two(**of_one), r"pixel_values has 6 channels, 2 image\(s\) have 12"),
        (lambda: one(**of_two), r"pixel_values has 12 channels, 1 image\(s\) have 6"),
        (lambda: two(**of_two | {"proprio": None}), "proprio is missing, and the model's layout says proprio=True"),
        (lambda: one(**of_one, proprio=of_two["proprio"]), "proprio is given, .* says proprio=False"),
        (lambda: one.regress_action(**of_one, unnorm_key=golden_t.unnorm_key), "no head that regresses"),
        (lambda: one.predict_action(**of_one, unnorm_key=golden_t.unnorm_key, temperature=0.0), "must be above 0"),
        (lambda: processors["two"]([frame], ["push"], proprio=states, unnorm_key=golden_t.unnorm_key), "1 image.s. of"),
        (lambda: processors["one"]([frame], ["push"], wrist_images=[frame]), r"2 image\(s\) of each"),
        (lambda: processors["two"]([frame], ["push"], [frame]), "proprio is missing"),
        (lambda: processors["two"]([frame], ["push"], [frame], states, "libero_none"), "'libero_none' has no stat"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="attn_implementation is 'eager', must be 'sdpa'"):
        golden_t.model("one", attn_implementation="eager")
