"""Prompts, tokenizers and image preparation."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vlarl_rllib.models.openvla import OpenVLAProcessor, PrismaticImageProcessor, build_prompt
from vlarl_rllib.models.openvla.processing import load_tokenizer

BLACK = np.zeros((28, 28, 3), np.uint8)


def sentencepiece_like_tokenizer(with_prefix: bool) -> PreTrainedTokenizerFast:
    """A few pieces in Llama's manner; without the prefix, as transformers' automatic choice would read them."""
    pieces = ["<unk>", "<s>", "<PAD>", "▁", "▁In", "In", ":"]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    prepend = "first" if with_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme=prepend), pre_tokenizers.Punctuation()]
    )
    tokenizer.model = models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<PAD>", unk_token="<unk>")


def test_the_prompt_is_lower_cased_and_ends_at_the_colon():
    expected = "In: What action should the robot take to pick up the bbq sauce?\nOut:"
    assert build_prompt("Pick up the BBQ sauce") == expected


def test_prompts_are_padded_on_the_right(golden_s):
    inputs = golden_s.processor(images=[BLACK, BLACK], instructions=["push the red mug", "push"])
    pad = golden_s.processor.tokenizer.pad_token_id
    # the shorter prompt lacks three words
    assert inputs["attention_mask"].sum(dim=1).diff().tolist() == [-3]
    assert inputs["input_ids"][1, -3:].tolist() == [pad] * 3
    assert inputs["attention_mask"][1, -4:].tolist() == [1, 0, 0, 0]
    assert inputs["input_ids"].dtype == inputs["attention_mask"].dtype == torch.int64
    assert inputs["pixel_values"].dtype == torch.float32 and inputs["pixel_values"].shape == (2, 6, 28, 28)


def test_prompt_ids_are_cached_and_safe_to_change(golden_s):
    first = golden_s.processor.prompt_ids("push the plate")
    expected = list(first)
    first.append(99)
    assert golden_s.processor.prompt_ids("push the plate") == expected


def test_a_llama_like_prompt_gets_a_stand_alone_space_at_its_end(golden_s):
    processor = OpenVLAProcessor(golden_s.processor.image_processor, sentencepiece_like_tokenizer(True))
    ids = processor.prompt_ids("open the drawer")
    assert ids[:3] == [1, 4, 6]
    assert ids[-2:] == [6, 3]


def test_a_tokenizer_that_loses_the_space_mark_is_refused(golden_s):
    with pytest.raises(ValueError, match="starts a prompt with id 5 instead of 4"):
        OpenVLAProcessor(golden_s.processor.image_processor, sentencepiece_like_tokenizer(False))


def test_a_tokenizer_without_a_pad_token_is_refused(golden_s):
    tokenizer = sentencepiece_like_tokenizer(True)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no pad_token_id"):
        OpenVLAProcessor(golden_s.processor.image_processor, tokenizer)


def test_a_sentencepiece_file_without_its_reader_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.delitem(sys.modules, "sentencepiece")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs sentencepiece and google.protobuf; run: pip install"):
        load_tokenizer(tmp_path)


def test_a_frame_of_the_models_size_is_left_as_it_is_and_others_are_squeezed(golden_s):
    processor = golden_s.processor.image_processor
    noise = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    assert np.array_equal(processor.resize_uint8(noise), noise)
    assert np.array_equal(processor.resize_uint8(Image.fromarray(noise)), noise)
    wide = np.zeros((60, 90, 3), np.uint8)
    wide[:, 45:] = 200
    squeezed = processor.resize_uint8(wide)
    # the edge stays in the middle: the aspect is ignored and nothing is cropped
    assert squeezed.shape == (28, 28, 3)
    assert squeezed[:, :12].max() == 0 and squeezed[:, 16:].min() == 200


def test_frames_that_are_not_rgb_uint8_are_refused(golden_s):
    for frame in (BLACK.astype(np.float32), BLACK[..., 0], np.zeros((28, 28, 4), np.uint8)):
        with pytest.raises(ValueError, match="a frame must be uint8"):
            golden_s.processor(images=[frame], instructions=["push"])


def test_unequal_counts_are_refused(golden_s):
    for images, instructions in (([BLACK], ["a", "b"]), ([], []), ([BLACK], "push")):
        with pytest.raises(ValueError, match="lists of the same length"):
            golden_s.processor(images=images, instructions=instructions)


def test_the_checkpoints_own_constants_are_used_and_exclude_the_raw_path(golden_s):
    settings = {
        **golden_s.processor.image_processor.settings,
        "tvf_normalize_params": [{"mean": [0.0] * 3, "std": [1.0] * 3}, {"mean": [0.5] * 3, "std": [0.25] * 3}],
    }
    processor = PrismaticImageProcessor(settings)
    pixels = processor([np.full((28, 28, 3), 255, np.uint8)])
    # white is 1.0: (1 - 0) / 1 and (1 - 0.5) / 0.25
    assert pixels[0, :, 0, 0].tolist() == [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]
    with pytest.raises(ValueError, match="raw frames need the published normalisation constants"):
        processor.resize_uint8(BLACK)


def test_other_resize_strategies_are_refused(golden_s):
    settings = {**golden_s.processor.image_processor.settings, "image_resize_strategy": "letterbox"}
    with pytest.raises(ValueError, match=r"'letterbox'.*the choice is 'resize-naive'"):
        PrismaticImageProcessor(settings)
