"""What supervised learning learns from: batches out of tensors that were encoded once."""

import io
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlarl_rllib.data import rlds
from vlarl_rllib.data.rlds import RLDSDataset
from vlarl_rllib.envs.image import resize_lanczos
from vlarl_rllib.learner.demonstrations import DemonstrationBatch, Demonstrations
from vlarl_rllib.learner.device_batch import LENGTH_STEP
from vlarl_rllib.models.family import ActionFormat

SIDE, STORED_SIDE = 28, 40
LENGTHS, INSTRUCTIONS = (3, 5, 4), ("push", "push the red cube", "push")
BYTES = sum(LENGTHS) * 3 * SIDE * SIDE
ACTIONS = ActionFormat(2, 7, range(100, 116))
END = 1


class Processor:
    image_size, end_token_id = SIDE, END

    def prompt_ids(self, instruction: str) -> list[int]:
        return [2 + len(word) for word in instruction.split()]

    def resize(self, image: np.ndarray) -> np.ndarray:
        return np.array(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


class Codec:
    def encode(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.floor((actions.astype(np.float64) + 1.0) * 7.5).astype(np.int64) + 100
        return tokens.reshape(len(actions), -1), actions.astype(np.float64)


def jpeg(generator: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(generator.integers(0, 256, (STORED_SIDE, STORED_SIDE, 3), np.uint8)).save(buffer, format="JPEG")
    return buffer.getvalue()


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> RLDSDataset:
    generator = np.random.default_rng(0)
    episodes = [
        {
            "image": [jpeg(generator) for _ in range(length)],
            "action": generator.uniform(-1, 1, (length, 7)).astype(np.float32),
            "instruction": instruction,
        }
        for length, instruction in zip(LENGTHS, INSTRUCTIONS, strict=True)
    ]
    monkeypatch.setattr(rlds, "find_dataset", lambda directory: Path(directory))
    monkeypatch.setattr(rlds, "read_episodes", lambda path, split: iter(episodes))
    return RLDSDataset("demonstrations", shuffle_seed=3)


def demonstrations(
    data: RLDSDataset, frames_bytes: float = BYTES, batch_size: int = 5, fixed_length: bool = False
) -> Demonstrations:
    return Demonstrations(
        data,
        Processor(),  # type: ignore[arg-type]
        Codec(),  # type: ignore[arg-type]
        ACTIONS,
        torch.device("cpu"),
        batch_size=batch_size,
        frames_bytes=frames_bytes,
        fixed_length=fixed_length,
    )


def by_hand(data: RLDSDataset, steps: Sequence[int]) -> DemonstrationBatch:
    """Example by example."""
    examples = [data[step] for step in steps]
    images = [Processor().resize(resize_lanczos(example["image"], 224)) for example in examples]
    prompts = [Processor().prompt_ids(example["instruction"]) for example in examples]
    longest = max(map(len, prompts))
    chunks = []
    for step, example in zip(steps, examples, strict=True):
        is_last = example["step"] == LENGTHS[example["episode"]] - 1
        chunks.append(data.actions[[step, step if is_last else step + 1]])
    tokens, normalized = Codec().encode(np.stack(chunks))
    return DemonstrationBatch(
        {
            "input_ids": torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]),
            "attention_mask": torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts]),
            "pixel_values": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        },
        torch.from_numpy(np.concatenate([tokens, np.full((len(steps), 1), END)], axis=1)),
        torch.from_numpy(normalized).float(),
    )


def assert_equal(one: DemonstrationBatch, other: DemonstrationBatch) -> None:
    assert one.inputs.keys() == other.inputs.keys()
    for name, tensor in one.inputs.items():
        assert tensor.dtype == other.inputs[name].dtype and torch.equal(tensor, other.inputs[name]), name
        assert tensor.is_contiguous()
    assert torch.equal(one.targets, other.targets) and torch.equal(one.actions, other.actions)


@pytest.mark.parametrize("frames_bytes", [BYTES, BYTES - 1], ids=["kept", "decoded each time"])
def test_batches_are_what_is_made_example_by_example_over_epochs(data: RLDSDataset, frames_bytes: int) -> None:
    batches = list(islice(demonstrations(data, frames_bytes).batches(0), 7))
    order = np.concatenate([data.order(epoch) for epoch in range(3)])
    assert len(data) == 12 and sorted(order[12:24]) == list(range(12)) and list(order[:12]) != list(order[12:24])
    for number, batch in enumerate(batches):
        assert_equal(batch, by_hand(data, order[5 * number : 5 * number + 5].tolist()))


@pytest.mark.parametrize("batch_size", [5, 30], ids=["part of an epoch", "more than two"])
def test_a_step_is_the_same_wherever_learning_begins(data: RLDSDataset, batch_size: int) -> None:
    whole = list(islice(demonstrations(data, batch_size=batch_size).batches(0), 6))
    resumed = islice(demonstrations(data, batch_size=batch_size).batches(4), 2)
    for one, other in zip(whole[4:], resumed, strict=True):
        assert_equal(one, other)


def test_where_shapes_are_to_be_the_same_prompts_are_padded_alike(data: RLDSDataset) -> None:
    fixed, exact = (demonstrations(data, batch_size=1, fixed_length=fixed).batches(0) for fixed in (True, False))
    lengths = set()
    for padded, batch in islice(zip(fixed, exact, strict=False), 12):
        length = batch.inputs["input_ids"].shape[1]
        lengths.add(length)
        for name in ("input_ids", "attention_mask"):
            assert padded.inputs[name].shape == (1, LENGTH_STEP) and not padded.inputs[name][:, length:].any()
            assert torch.equal(padded.inputs[name][:, :length], batch.inputs[name])
    assert lengths == {1, 4}


def test_frames_that_fit_are_decoded_once_and_those_that_do_not_each_time(
    data: RLDSDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    frame = RLDSDataset.frame
    monkeypatch.setattr(RLDSDataset, "frame", lambda self, step: decoded.append(step) or frame(self, step))
    list(islice(demonstrations(data, BYTES).batches(0), 12))
    assert sorted(decoded) == list(range(12)), "five epochs"
    decoded.clear()
    list(islice(demonstrations(data, BYTES - 1).batches(0), 12))
    assert len(decoded) == 60


def test_a_damaged_frame_is_told_when_it_is_met(data: RLDSDataset) -> None:
    data._images[3] = data._images[3][:60]  # type: ignore[index]
    with pytest.raises(ValueError, match=r"demonstrations: the frame of step 0 in episode 1 cannot be decoded"):
        list(islice(demonstrations(data).batches(0), 3))
