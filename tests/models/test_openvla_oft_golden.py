"""OpenVLA-OFT against the original implementations, on golden checkpoint T (see tests/data/golden), and the mistakes
that give a model which runs and is wrong: each of them must be seen in these very numbers.

The numbers themselves are computed in benchmarks/parity_oft.py, which also prints them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.parity_oft import INPUT_ENDINGS, INPUTS, GoldenOFT, load_golden_oft, oft_differences
from vlarl_rllib.models.openvla_oft import OpenVLAOFTForActionPrediction

Inputs = dict[str, Tensor]
Case = tuple[OpenVLAOFTForActionPrediction, Inputs]
Mistake = Callable[[GoldenOFT], Case]


@pytest.fixture(scope="module", params=["kept", "whole"])
def golden(request: pytest.FixtureRequest) -> GoldenOFT:
    """T with what the repository keeps, and with all arrays."""
    if request.param == "kept":
        return request.getfixturevalue("golden_t")
    return load_golden_oft(request.getfixturevalue("golden_folder")("golden_T.npz"))


def test_every_array_is_as_the_original_computed_it(golden: GoldenOFT) -> None:
    differences = oft_differences(golden)
    assert {name: difference for name, difference in differences.items() if not difference.is_small} == {}
    inputs = {name for name in golden.arrays if name in INPUTS or name.endswith(INPUT_ENDINGS)}
    assert golden.arrays.keys() == differences.keys() | inputs


# Mistakes


def changed_tokens(golden: GoldenOFT, mode: str, case: Case) -> int:
    """Of the greedy tokens, how many are not the original's."""
    model, inputs = case
    with torch.no_grad():
        best = model.action_logits(**inputs).argmax(-1) + model.action_token_ids.start
    return int((best != golden.tensor(f"{mode}.greedy_tokens")[:, : best.shape[1]]).sum())


def right(golden: GoldenOFT, mode: str, **layout: Any) -> Case:
    return golden.model(mode, **layout), golden.inputs(mode)


def causal(golden: GoldenOFT, mode: str = "one") -> Case:
    model, inputs = right(golden, mode)
    read_states = model._read_states
    model._read_states = lambda embeddings, positions, visible: read_states(embeddings, positions)  # type: ignore
    return model, inputs


def causal_with_two_images(golden: GoldenOFT) -> Case:
    return causal(golden, "two")


def placeholders_of_bos(golden: GoldenOFT) -> Case:
    model, inputs = right(golden, "one")
    words = model._words

    def with_bos(text: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        embeddings, num_words = words(text, lengths)
        bos = model.language_model.model.embed_tokens(torch.tensor(1))
        is_zero = (embeddings == 0).all(-1, keepdim=True)
        return torch.where(is_zero, bos, embeddings), num_words

    model._words = with_bos  # type: ignore[method-assign]
    return model, inputs


def read_at_the_first_placeholder(golden: GoldenOFT) -> Case:
    model, inputs = right(golden, "one")
    last_position = model._last_prompt_position
    model._last_prompt_position = lambda lengths: last_position(lengths) + 1  # type: ignore[method-assign]
    return model, inputs


def no_stop_token(golden: GoldenOFT) -> Case:
    return right(golden, "one", stop_token=False)


def superfluous_stop_token(golden: GoldenOFT) -> Case:
    return right(golden, "nostop", stop_token=True)


def no_trailing_space(golden: GoldenOFT) -> Case:
    model, inputs = right(golden, "one")
    last = inputs["attention_mask"].sum(1, keepdim=True) - 1
    return model, inputs | {"attention_mask": inputs["attention_mask"].scatter(1, last, 0)}


def chunk_of_seven(golden: GoldenOFT) -> Case:
    return right(golden, "one", chunk=7)


def coarse_norms(golden: GoldenOFT) -> Case:
    model, inputs = right(golden, "one")
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-5
    return model, inputs


def patches_before_bos(golden: GoldenOFT) -> Case:
    model, inputs = right(golden, "one")
    read_states, count = model._read_states, model.num_image_tokens

    def turned_round(embeddings: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        first, patches, rest = embeddings.split([1, count, embeddings.shape[1] - 1 - count], dim=1)
        return read_states(torch.cat([patches, first, rest], dim=1), positions, visible)

    model._read_states = turned_round  # type: ignore[assignment, method-assign]
    return model, inputs


def wrist_first(golden: GoldenOFT) -> Case:
    model, inputs = right(golden, "two")
    return model, inputs | {"pixel_values": inputs["pixel_values"].roll(6, dims=1)}


def main_frame_twice(golden: GoldenOFT) -> Case:
    model, inputs = right(golden, "two")
    return model, inputs | {"pixel_values": inputs["pixel_values"][:, :6].repeat(1, 2, 1, 1)}


def state_before_the_patches(golden: GoldenOFT) -> Case:
    model, inputs = right(golden, "two")
    seen = model._seen
    model._seen = lambda features, proprio: seen(features, proprio).roll(1, dims=1)  # type: ignore[method-assign]
    return model, inputs


def no_state(golden: GoldenOFT) -> Case:
    model, inputs = right(golden, "two", proprio=False)
    del inputs["proprio"]
    return model, inputs


def raw_state(golden: GoldenOFT) -> Case:
    model, inputs = right(golden, "two")
    states = golden.tensor("proprio_states")[golden.tensor("two.sample_image")]
    return model, inputs | {"proprio": states.float()}


MISTAKES: dict[Mistake, tuple[str, int]] = {
    causal: ("one", 396),
    no_stop_token: ("one", 211),
    superfluous_stop_token: ("nostop", 118),
    placeholders_of_bos: ("one", 444),
    read_at_the_first_placeholder: ("one", 213),
    coarse_norms: ("one", 6),
    patches_before_bos: ("one", 242),
    no_trailing_space: ("one", 312),
    chunk_of_seven: ("one", 113),
    wrist_first: ("two", 92),
    state_before_the_patches: ("two", 113),
    no_state: ("two", 146),
    main_frame_twice: ("two", 195),
    raw_state: ("two", 124),
    causal_with_two_images: ("two", 268),
}
"""By mistake, the layout in which it is made, and how many of the greedy tokens (448 of `one`, 336 of `two`, 224 of
`nostop`) it changes according to an independent computation in float64."""


@pytest.mark.parametrize("mode", ["one", "two", "nostop"])
def test_without_a_mistake_no_token_changes(mode: str, golden_t: GoldenOFT) -> None:
    assert changed_tokens(golden_t, mode, right(golden_t, mode)) == 0


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_changes_tokens(mistake: Mistake, golden_t: GoldenOFT) -> None:
    mode, expected = MISTAKES[mistake]
    assert changed_tokens(golden_t, mode, mistake(golden_t)) == expected


def test_a_state_that_is_normalised_twice_is_seen(golden_t: GoldenOFT) -> None:
    """It still lies within the bounds, so that only the numbers tell."""
    processor, states = golden_t.processor("two"), golden_t.arrays["proprio_normalized"]
    main, wrist = list(golden_t.arrays["images_u8"]), list(golden_t.arrays["wrist_images_u8"])
    twice = processor(main, ["push"] * 8, wrist, states, golden_t.unnorm_key)
    assert np.abs(twice["proprio"].numpy() - states).max() > 0.5
    both = [np.concatenate(pair, axis=2) for pair in zip(main, wrist, strict=True)]
    raw = processor.raw_inputs(both, ["push"] * 8, states)
    np.testing.assert_array_equal(raw["proprio"].numpy(), states.astype(np.float32))
