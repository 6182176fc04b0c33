"""The model against the original implementation, on golden checkpoints S, B and A (see tests/data/golden)."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vlarl_rllib.models.openvla import build_prompt, normalize_pixels

EOS = 2


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def tempered(logits: torch.Tensor, tokens: torch.Tensor, first_id: int, temperature: float) -> torch.Tensor:
    log_probs = torch.log_softmax(logits / temperature, dim=-1)
    return log_probs.gather(-1, (tokens - first_id)[..., None])[..., 0]


@pytest.fixture(scope="module")
def greedy_pass(golden):
    """Hidden states and full-vocabulary logits under the golden greedy tokens."""
    with torch.no_grad():
        hidden, prompt_hidden = golden.model.action_hidden_states(**golden.inputs(), action_tokens=golden.tensor("greedy_tokens"))
        return hidden, prompt_hidden, golden.model.language_model.lm_head(hidden)


def test_prompts_and_images_are_prepared_alike(golden):
    instructions = [str(instruction) for instruction in golden.arrays["instructions"]]
    images = list(golden.arrays["images_u8"])
    assert [build_prompt(instruction) for instruction in instructions] == golden.arrays["prompts"].tolist()

    inputs = golden.processor(images=images[:3], instructions=instructions)
    assert torch.equal(inputs["input_ids"], golden.tensor("input_ids"))
    assert inputs["attention_mask"].sum(dim=1).tolist() == golden.arrays["input_len"].tolist()

    pixel_values = golden.processor(images=images, instructions=instructions[:1] * 8)["pixel_values"]
    assert torch.equal(pixel_values, golden.tensor("pixel_values"))


def test_raw_frames_give_the_same_bits_as_normalised_ones(golden):
    images, instructions = list(golden.arrays["images_u8"]), ["push"] * 8
    raw = golden.processor(images=images, instructions=instructions, raw_images=True)["pixel_values"]
    assert raw.dtype == torch.uint8
    assert torch.equal(normalize_pixels(raw), golden.tensor("pixel_values"))
    assert torch.equal(normalize_pixels(raw.permute(0, 2, 3, 1)), golden.tensor("pixel_values"))


@torch.no_grad()
def test_vision_features_and_projector(golden):
    features = golden.model.vision_backbone(golden.tensor("pixel_values"))
    assert_close(features, golden.tensor("vision_features"), 5e-6)
    assert_close(golden.model.projector(features), golden.tensor("projector_output"), 5e-6)


def test_hidden_states_and_logits_under_greedy_tokens(golden, greedy_pass):
    hidden, prompt_hidden, logits = greedy_pass
    first = golden.model.action_token_ids[0]
    assert_close(hidden, golden.tensor("greedy_hidden"), golden.tolerance)
    assert torch.equal(prompt_hidden, hidden[:, 0])
    action_logits = golden.tensor("greedy_action_logits")
    assert_close(logits[..., first : first + 256], action_logits, golden.tolerance)
    with torch.no_grad():
        ours = golden.model.action_logits(**golden.inputs(), action_tokens=golden.tensor("greedy_tokens"))
    assert ours.dtype == torch.float32
    assert_close(ours, action_logits, golden.tolerance)
    # A keeps the large full rows of four samples only
    samples = golden.arrays.get("full_logits_samples", np.arange(24))
    assert_close(logits[samples], golden.tensor("full_logits"), golden.tolerance)
    assert_close(logits.logsumexp(dim=-1), golden.tensor("greedy_logsumexp_full"), golden.tolerance)
    full_log_probs = tempered(logits, golden.tensor("greedy_tokens"), 0, 1.0)
    assert_close(full_log_probs, golden.tensor("greedy_logprob_fullvocab_T1.0"), golden.tolerance)


@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_cached_decoding_gives_greedy_tokens_log_probs_and_actions(golden, greedy_pass, temperature):
    prediction = golden.model.predict_action(**golden.inputs(), unnorm_key="libero_spatial", temperature=temperature)
    assert torch.equal(prediction.tokens, golden.tensor("greedy_tokens"))
    assert_close(prediction.log_probs, golden.tensor(f"greedy_logprob_T{temperature}"), golden.tolerance)
    assert prediction.actions.dtype == np.float64
    np.testing.assert_allclose(prediction.actions, golden.arrays["actions"], atol=1e-12)

    first = golden.model.action_token_ids[0]
    action_logits = greedy_pass[2][..., first : first + 256]
    entropy = torch.distributions.Categorical(logits=action_logits / temperature).entropy()
    assert_close(entropy, golden.tensor(f"greedy_entropy_T{temperature}"), golden.tolerance)


@torch.no_grad()
def test_teacher_forced_logits_and_log_probs(golden):
    first = golden.model.action_token_ids[0]
    for sequence in range(3):
        tokens = golden.tensor("forced_tokens")[:, sequence]
        logits = golden.model.action_logits(**golden.inputs(), action_tokens=tokens)
        assert_close(logits, golden.tensor("forced_action_logits")[:, sequence], golden.tolerance)
        for temperature in (1.0, 1.6):
            expected = golden.tensor(f"forced_logprob_T{temperature}")[:, sequence]
            assert_close(tempered(logits, tokens, first, temperature), expected, golden.tolerance)
            entropy = torch.distributions.Categorical(logits=logits / temperature).entropy()
            assert_close(entropy, golden.tensor(f"forced_entropy_T{temperature}")[:, sequence], golden.tolerance)


@torch.no_grad()
def test_supervised_loss_over_actions_and_end_of_sequence(golden):
    forced = golden.tensor("forced_tokens")[:, 0]
    targets = torch.cat([forced, torch.full((24, 1), EOS)], dim=1)
    hidden, _ = golden.model.action_hidden_states(**golden.inputs(), action_tokens=targets)
    logits = golden.model.language_model.lm_head(hidden)
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    assert_close(losses.mean(dim=1), golden.tensor("sft_loss"), 1e-4)
    batch = golden.arrays["sft_batch_samples"]
    assert_close(losses[batch].mean(), golden.tensor("sft_batch_loss"), 1e-4)
    full = golden.tensor("forced_logprob_fullvocab_T1.0")[:, 0]
    assert_close(-losses[:, :7], full, golden.tolerance)


def test_action_tables(golden):
    tokenizer, arrays = golden.model.action_tokenizer, golden.arrays
    np.testing.assert_array_equal(tokenizer.encode(arrays["grid_values"]), arrays["grid_tokens"])
    np.testing.assert_allclose(tokenizer.decode(arrays["grid_tokens"]), arrays["grid_decoded"], atol=1e-12)
    np.testing.assert_allclose(tokenizer.decode(arrays["decode_tokens"]), arrays["decode_values"], atol=1e-12)
    np.testing.assert_allclose(tokenizer.bins, arrays["bins"], atol=1e-12)
    np.testing.assert_allclose(tokenizer.bin_centers, arrays["bin_centers"], atol=1e-12)
    assert list(golden.model.action_token_ids) == arrays["gripper_tokens"].tolist()
    assert golden.model.action_token_ids[0] == arrays["action_token_begin_idx"] + 1

    normalized = tokenizer.decode(arrays["greedy_tokens"])
    np.testing.assert_allclose(normalized, arrays["actions_normalized"], atol=1e-12)
    for index, suite in enumerate(arrays["suites"]):
        actions = tokenizer.unnormalize(normalized, golden.model.config.action_statistics(str(suite)))
        np.testing.assert_allclose(actions, arrays["actions_all_suites"][:, index], atol=1e-12)


def test_only_llama_prompts_have_space_marks(golden):
    ids = golden.processor.prompt_ids("Pick up the Bowl")
    if golden.name == "A":
        # <s> ▁In ... Out : ▁
        assert ids[:2] == [1, 512]
        assert ids[-3:] == [3744, 29901, 29871]
    else:
        assert ids == golden.processor.tokenizer(build_prompt("pick up the bowl"))["input_ids"]
