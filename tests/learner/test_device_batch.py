"""What passes read of a rank's decisions."""

import numpy as np
import pytest
import torch
from learner_helpers import ACTIONS, IMAGE_SIZE, contributions

from vlarl_rllib.learner import device_batch
from vlarl_rllib.learner.collate import RolloutBatch, collate
from vlarl_rllib.learner.device_batch import DeviceBatch, padded, score_passes, some_of

CPU = torch.device("cpu")


def prompt_ids(instruction: str) -> list[int]:
    return [1, *(2 + len(word) for word in instruction.split())]


def collated() -> RolloutBatch:
    return collate(contributions(), prompt_ids, ACTIONS)


def test_prompts_are_padded_on_the_right_to_the_longest_of_the_pass_and_frames_stay_uint8() -> None:
    batch = collated()
    inputs = DeviceBatch(batch, CPU, fixed_length=False).inputs(np.array([0, 20, 29]))
    assert inputs["pixel_values"].dtype == torch.uint8
    assert inputs["pixel_values"].shape == (3, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert torch.equal(inputs["pixel_values"][1].permute(1, 2, 0), torch.from_numpy(batch.frames[20]))
    lengths = [len(batch.prompts[batch.frame_prompt[i]]) for i in (0, 20, 29)]
    assert inputs["attention_mask"].sum(1).tolist() == lengths
    assert inputs["attention_mask"].shape[1] == max(lengths)
    assert inputs["input_ids"][0, : lengths[0]].tolist() == prompt_ids("push the bowl")
    assert np.array_equal(inputs["action_tokens"].numpy(), batch.tokens[[0, 20, 29]])


def test_fixed_lengths_are_the_same_in_every_pass() -> None:
    data = DeviceBatch(collated(), CPU, fixed_length=True)
    for frames in ([0], [0, 20], [29]):
        inputs = data.inputs(np.array(frames))
        assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (len(frames), 16)
    assert data.inputs(np.array([0]))["attention_mask"].sum() == len(prompt_ids("push the bowl"))


def test_a_pass_is_filled_up_with_the_first_frame() -> None:
    assert padded(np.array([4, 5]), 4).tolist() == [4, 5, 0, 0]
    assert padded(np.array([4, 5]), 2).tolist() == [4, 5]
    assert padded(np.zeros(0, dtype=np.int64), 0).tolist() == [0]
    assert padded(np.zeros(0, dtype=np.int64), 2).tolist() == [0, 0]


def test_passes_cover_all_frames_in_few_shapes() -> None:
    assert score_passes(10, 4, fixed=False) == [4, 4, 4]
    assert score_passes(16, 4, fixed=True) == [16]
    assert score_passes(37, 4, fixed=True) == [16, 16, 4, 4]
    assert score_passes(0, 4, fixed=True) == []


def test_some_are_spread_over_all() -> None:
    assert some_of(30, 4).tolist() == [0, 9, 19, 29]
    assert some_of(3, 4).tolist() == [0, 1, 2]
    assert some_of(0, 4).tolist() == []


@pytest.mark.parametrize("fits", [True, False])
def test_what_is_reused_takes_the_place_of_frames_if_it_fits(fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = collated()
    features = torch.arange(len(batch.frames), dtype=torch.float32)[:, None]
    monkeypatch.setattr(device_batch, "MAX_BYTES", features.nbytes - (not fits))
    data = DeviceBatch(batch, CPU, fixed_length=False)
    for part in features.split(7):
        data.keep({"vision_features": part})
        assert "pixel_values" in data.inputs(np.array([1]))
    data.all_kept()
    inputs = data.inputs(np.array([9, 2]))
    if fits:
        assert inputs["vision_features"].tolist() == [[9.0], [2.0]] and "pixel_values" not in inputs
    else:
        assert "vision_features" not in inputs and inputs["pixel_values"].shape[0] == 2
