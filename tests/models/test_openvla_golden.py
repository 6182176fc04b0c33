"""The model against the original implementation, on golden checkpoints S, B and A (see tests/data/golden).

The numbers themselves are computed in benchmarks/parity.py, which also prints them.
"""

import numpy as np
import pytest
import torch

from benchmarks.parity import ADAPTER_PREFIX, INPUTS, Golden, model_differences
from vlarl_rllib.models.openvla import build_prompt, normalize_pixels
from vlarl_rllib.models.openvla.modeling import ActionPrediction


@pytest.fixture(scope="module")
def differences(golden):
    return model_differences(golden)


def predict(golden: Golden, samples: slice = slice(None)) -> ActionPrediction:
    return golden.model.predict_action(**golden.inputs(samples), unnorm_key="libero_spatial")


@pytest.fixture(scope="module")
def prediction(golden):
    """All 24 samples as one batch."""
    return predict(golden)


def test_every_array_is_as_the_original_computed_it(differences):
    assert {name: difference for name, difference in differences.items() if not difference.is_small} == {}


def test_no_array_is_left_out(golden, differences):
    arrays = {name for name in golden.arrays if not name.startswith(ADAPTER_PREFIX)}
    assert arrays == differences.keys() | (INPUTS & arrays)


def test_raw_frames_give_the_same_bits_as_normalised_ones(golden):
    images, instructions = list(golden.arrays["images_u8"]), ["push"] * 8
    raw = golden.processor(images=images, instructions=instructions, raw_images=True)["pixel_values"]
    assert raw.dtype == torch.uint8
    assert torch.equal(normalize_pixels(raw), golden.tensor("pixel_values"))
    assert torch.equal(normalize_pixels(raw.permute(0, 2, 3, 1)), golden.tensor("pixel_values"))


@torch.no_grad()
def test_results_are_in_full_precision_and_begin_at_the_last_prompt_token(golden, prediction):
    tokens = golden.tensor("greedy_tokens")
    hidden, prompt_hidden = golden.model.action_hidden_states(**golden.inputs(), action_tokens=tokens)
    assert torch.equal(prompt_hidden, hidden[:, 0])
    assert golden.model.action_logits(**golden.inputs(), action_tokens=tokens).dtype == torch.float32
    assert (prediction.actions.dtype, prediction.tokens.dtype, prediction.log_probs.dtype) == (
        np.float64,
        torch.int64,
        torch.float32,
    )


def test_a_frame_alone_is_decoded_as_in_a_batch(golden, prediction):
    for sample in range(0, 24, 5):
        alone = predict(golden, slice(sample, sample + 1))
        assert torch.equal(alone.tokens[0], prediction.tokens[sample])
        np.testing.assert_array_equal(alone.actions[0], prediction.actions[sample])
        torch.testing.assert_close(alone.log_probs[0], prediction.log_probs[sample], atol=golden.tolerance, rtol=0)


def test_image_and_instruction_change_most_action_tokens(prediction):
    """Images 6 and 7, black and white, are samples 18-20 and 21-23; an implementation that drops the image gives equal
    tokens."""
    black, white = prediction.tokens[18:21], prediction.tokens[21:24]
    assert (black != white).sum(dim=1).min() >= 4
    by_image = prediction.tokens.view(8, 3, 7)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (by_image[:, one] != by_image[:, other]).sum(dim=1).min() >= 4


def test_only_llama_prompts_have_space_marks(golden):
    ids = golden.processor.prompt_ids("Pick up the Bowl")
    if golden.name == "A":
        # <s> ▁In ... Out : ▁
        assert ids[:2] == [1, 512]
        assert ids[-3:] == [3744, 29901, 29871]
    else:
        assert ids == golden.processor.tokenizer(build_prompt("pick up the bowl"))["input_ids"]
