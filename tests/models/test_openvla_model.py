"""Batching, padding, sampling, values and training behaviour of the model, on golden checkpoint S."""

import copy

import pytest
import torch

from vlarl_rllib.models.openvla import OpenVLAForActionPrediction
from vlarl_rllib.models.openvla.last_layer import gather_positions

SAMPLES = slice(0, 6)
"""Two images with three prompts each, of 25, 20 and 21 tokens."""


def rows(inputs: dict[str, torch.Tensor], index: slice) -> dict[str, torch.Tensor]:
    return {name: tensor[index] for name, tensor in inputs.items()}


def without_pads(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One row of a batch, cut to its own prompt."""
    length = int(inputs["attention_mask"][row].sum())
    single = rows(inputs, slice(row, row + 1))
    single["input_ids"] = single["input_ids"][:, :length]
    single["attention_mask"] = single["attention_mask"][:, :length]
    return single


@pytest.fixture
def inputs(golden_s):
    return golden_s.inputs(SAMPLES)


@pytest.fixture
def tokens(golden_s):
    return golden_s.tensor("forced_tokens")[SAMPLES, 0]


@pytest.fixture
def model_with_values(golden_s) -> OpenVLAForActionPrediction:
    """A copy of S whose value head is not at its zero start."""
    model = copy.deepcopy(golden_s.model)
    head = model.add_value_head(seed=1)
    torch.nn.init.normal_(head.fc3.weight, generator=torch.Generator().manual_seed(0))
    return model


@torch.no_grad()
def test_a_row_scores_alike_alone_and_in_a_batch_of_uneven_prompts(golden_s, inputs, tokens):
    batched = golden_s.model.action_logits(**inputs, action_tokens=tokens)
    for row in range(len(tokens)):
        alone = golden_s.model.action_logits(**without_pads(inputs, row), action_tokens=tokens[row : row + 1])
        torch.testing.assert_close(batched[row], alone[0], atol=5e-5, rtol=0)


@torch.no_grad()
def test_padding_side_does_not_matter(golden_s, inputs, tokens):
    shift = (inputs["attention_mask"] == 0).sum(dim=1)
    columns = (torch.arange(inputs["input_ids"].shape[1]) - shift[:, None]) % inputs["input_ids"].shape[1]
    left = dict(inputs)
    for name in ("input_ids", "attention_mask"):
        left[name] = inputs[name].gather(1, columns)
    assert left["attention_mask"][1, 0] == 0
    expected = golden_s.model.action_logits(**inputs, action_tokens=tokens)
    assert torch.equal(golden_s.model.action_logits(**left, action_tokens=tokens), expected)


def test_the_last_layer_read_at_some_positions_is_the_whole_layer_there(golden_s):
    decoder = golden_s.model.language_model.model
    embeddings = torch.randn(
        3, 20, decoder.config.hidden_size, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    positions = torch.tensor([[0, 1, 2], [10, 11, 12], [17, 18, 19]])
    whole = gather_positions(decoder(inputs_embeds=embeddings, use_cache=False).last_hidden_state, positions)
    read = decoder(inputs_embeds=embeddings, use_cache=False, read_positions=positions).last_hidden_state
    torch.testing.assert_close(read, whole, atol=1e-5, rtol=5e-6)
    expected, got = (torch.autograd.grad(states.square().sum(), embeddings)[0] for states in (whole, read))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_teacher_forced_log_probs_equal_those_of_decoding(golden_s, inputs):
    temperatures = torch.tensor([1.0, 1.6, 0.7, 0.0, 1.0, 1.6])
    tokens, log_probs, values = golden_s.model.sample_action_tokens(
        **inputs, temperatures=temperatures, seeds=range_of(6)
    )
    logits = golden_s.model.action_logits(**inputs, action_tokens=tokens)
    # temperature 0 is greedy, with log-probs at temperature 1
    divisor = torch.where(temperatures == 0, 1.0, temperatures)[:, None, None]
    index = (tokens - golden_s.model.action_token_ids[0])[..., None]
    expected = torch.log_softmax(logits / divisor, dim=-1).gather(-1, index)[..., 0]
    torch.testing.assert_close(log_probs, expected, atol=5e-5, rtol=0)
    assert torch.equal(tokens[3], golden_s.tensor("greedy_tokens")[3])
    assert tokens.dtype == torch.int64 and log_probs.dtype == torch.float32 and values is None


def test_a_sample_depends_on_its_seed_and_not_on_the_batch(golden_s, inputs):
    def sample(batch, seeds):
        return golden_s.model.sample_action_tokens(
            **batch, temperatures=torch.ones(len(batch["input_ids"])), seeds=seeds
        )[0]

    together = sample(inputs, [7, 8, 9, 10, 11, 12])
    for row in range(6):
        assert torch.equal(sample(without_pads(inputs, row), [7 + row])[0], together[row])
    assert torch.equal(sample(inputs, torch.tensor([7, 8, 9, 10, 11, 12])), together)
    assert not torch.equal(sample(inputs, [107, 108, 109, 110, 111, 112]), together)


def test_samples_follow_the_tempered_distribution(golden_s):
    """4,000 first tokens of one frame: the share of the likeliest token is its probability within 4 deviations."""
    inputs = rows(golden_s.inputs(), slice(0, 1))
    model, temperature, count = golden_s.model, 1.6, 4000
    with torch.no_grad():
        probabilities = torch.softmax(model.action_logits(**inputs)[0, 0] / temperature, dim=-1)
    from vlarl_rllib.models.openvla.sampling import choose_tokens, draw_noise

    logits = (probabilities.log() * temperature).expand(count, -1)
    noise = draw_noise(range_of(count), count, 1, 256)[:, 0]
    choice, _ = choose_tokens(logits, torch.full((count,), temperature), torch.zeros(count, dtype=torch.bool), noise)
    best = int(probabilities.argmax())
    p = float(probabilities[best])
    assert abs(float((choice == best).float().mean()) - p) < 4 * (p * (1 - p) / count) ** 0.5


def test_wrong_number_of_seeds_and_bad_temperature_are_refused(golden_s, inputs):
    with pytest.raises(ValueError, match="one integer per row, got 2 for 6 rows"):
        golden_s.model.sample_action_tokens(**inputs, temperatures=torch.ones(6), seeds=[1, 2])
    with pytest.raises(ValueError, match="temperature=0 must be above 0"):
        golden_s.model.predict_action(**inputs, unnorm_key="libero_10", do_sample=True, temperature=0)


@torch.no_grad()
def test_the_image_changes_the_logits(golden_s):
    """Images 6 and 7 are black and white; an implementation that drops the image gives equal rows."""
    inputs = golden_s.inputs()
    black_and_white = {name: tensor[[18, 21]] for name, tensor in inputs.items()}
    assert torch.equal(black_and_white["input_ids"][0], black_and_white["input_ids"][1])
    black, white = golden_s.model.action_logits(**black_and_white)
    assert (black - white).abs().max() > 0.1


@torch.no_grad()
def test_raw_pixels_and_precomputed_features_give_the_same_logits(golden_s, tokens):
    images = list(golden_s.arrays["images_u8"][:2].repeat(3, axis=0))
    instructions = [str(instruction) for instruction in golden_s.arrays["instructions"]] * 2
    raw = golden_s.processor(images=images, instructions=instructions, raw_images=True)
    expected = golden_s.model.action_logits(**golden_s.inputs(SAMPLES), action_tokens=tokens)
    assert torch.equal(golden_s.model.action_logits(**raw, action_tokens=tokens), expected)

    features = golden_s.model.vision_backbone(raw["pixel_values"])
    del raw["pixel_values"]
    cached = golden_s.model.action_logits(**raw, action_tokens=tokens, vision_features=features)
    assert torch.equal(cached, expected)
    with pytest.raises(ValueError, match="pass pixel_values, or vision_features"):
        golden_s.model.action_logits(**raw, action_tokens=tokens)


@torch.no_grad()
def test_values_start_at_zero_and_the_head_is_the_same_for_every_learner(golden_s, inputs):
    first, second = copy.deepcopy(golden_s.model), copy.deepcopy(golden_s.model)
    torch.manual_seed(1)
    head = first.add_value_head()
    torch.manual_seed(2)
    assert all(map(torch.equal, head.parameters(), second.add_value_head().parameters()))
    assert golden_s.model(**inputs).values is None
    assert torch.equal(first(**inputs).values, torch.zeros(6))


@torch.no_grad()
def test_values_come_from_the_last_prompt_token_and_never_from_a_pad(model_with_values, inputs, tokens):
    values = model_with_values(**inputs, action_tokens=tokens).values
    assert values.dtype == torch.float32 and values.shape == (6,)
    # neither the content nor the number of pads, nor the action, changes a value
    other_pads = dict(inputs, input_ids=torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], 5))
    torch.testing.assert_close(model_with_values(**other_pads, action_tokens=tokens).values, values)
    for row in range(6):
        alone = model_with_values(**without_pads(inputs, row)).values
        torch.testing.assert_close(alone[0], values[row], atol=1e-5, rtol=5e-6)
    # the two images differ (rows 0 and 3), and so do the prompts (rows 0 to 2)
    assert len(values.unique()) == 6


def test_gradients_reach_everything_but_the_dead_weights(golden_s, inputs, tokens):
    model = copy.deepcopy(golden_s.model)
    model.add_value_head()
    output = model(**inputs, action_tokens=tokens)
    (output.action_logits.square().mean() + (output.values - 1).square().mean()).backward()
    without_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    depth = model.config.vision_tower_configs()["featurizer"].depth
    dead = (f".blocks.{depth - 1}.", "featurizer.norm.", ".attn_pool.")
    assert without_gradient == {name for name in dict(model.named_parameters()) if any(part in name for part in dead)}


def test_gradient_checkpointing_gives_the_same_gradients_and_refuses_to_sample(golden_s, inputs, tokens):
    gradients = []
    for enabled in (False, True):
        model = copy.deepcopy(golden_s.model).train()
        if enabled:
            model.gradient_checkpointing_enable()
        model(**inputs, action_tokens=tokens).action_logits.square().mean().backward()
        gradients.append(model.vision_backbone.featurizer.patch_embed.proj.weight.grad)
    torch.testing.assert_close(*gradients)
    with pytest.raises(ValueError, match=r"call model\.eval"):
        model.sample_action_tokens(**inputs, temperatures=torch.ones(6))


@torch.no_grad()
def test_bfloat16_stays_close_and_keeps_rope_in_float32(golden_s, inputs, tokens):
    model = OpenVLAForActionPrediction.from_pretrained(
        golden_s.directory, vision_towers=golden_s.vision_towers, dtype=torch.bfloat16
    )
    model.add_value_head()
    assert model.language_model.model.rotary_emb.inv_freq.dtype == torch.float32
    output = model(**inputs, action_tokens=tokens)
    assert output.action_logits.dtype == output.values.dtype == torch.float32
    exact = golden_s.model.action_logits(**inputs, action_tokens=tokens)
    # S amplifies rounding (its streams are small on purpose); a wrong cast is off by the logits' own size, 3
    assert (output.action_logits - exact).square().mean().sqrt() < 0.3


def range_of(count: int) -> list[int]:
    return list(range(count))
