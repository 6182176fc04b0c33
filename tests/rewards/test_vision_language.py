"""The judge that is a vision-language model: a tiny random LLaVA, made here."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vlarl_rllib.rewards.judge import check_judge, judge_kind
from vlarl_rllib.rewards.judges import load_judge
from vlarl_rllib.rewards.vision_language import BATCH_SIZE, QUESTION, VisionLanguageJudge

SIDE, PATCH = 28, 14
TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] %}{{ '<image> ' if c['type'] == 'image' else "
    "c['text'] }}{% endfor %}{% endfor %}"
    " ASSISTANT:"
)
WORDS = ["<unk>", "<pad>", "<image>", "USER", ":", "ASSISTANT", ".", "?", "yes", "no", "Yes", "No", "maybe"]


def write_model(directory: Path, template: str | None = TEMPLATE, unknown: tuple[str, ...] = ()) -> Path:
    words = dict.fromkeys([*WORDS, *re.findall(r"\w+", QUESTION.format(instruction="touch the red cube"))])
    vocabulary = [word for word in words if word not in unknown]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", additional_special_tokens=["<image>"]
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=fast.convert_tokens_to_ids("<image>"))
    )
    for parameter in model.parameters():  # the usual random weights make all logits nearly equal
        parameter.data.normal_(std=0.4)
    model.save_pretrained(directory)
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size)
    LlavaProcessor(
        image_processor=images, tokenizer=fast, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(directory)  # fmt: skip
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("vlm"))


def test_the_score_is_the_share_of_yes_in_the_next_token(directory: Path) -> None:
    assert judge_kind(directory) == check_judge(directory) == "vision_language"
    judge = load_judge(directory)
    assert isinstance(judge, VisionLanguageJudge)
    images = np.random.default_rng(0).integers(0, 256, (BATCH_SIZE + 3, SIDE, SIDE, 3), dtype=np.uint8)
    scores = judge.score(images, "touch the red cube")
    assert scores.shape == (BATCH_SIZE + 3,) and scores.dtype == np.float32
    assert (scores > 0).all() and (scores < 1).all() and np.ptp(scores) > 0.01

    # By hand, a frame at a time: tokens in the order of the template, pixels as CLIP normalises them, one image token
    # for each of 2 x 2 patches.
    model = LlavaForConditionalGeneration.from_pretrained(directory)
    processor = LlavaProcessor.from_pretrained(directory)
    ids = {word: processor.tokenizer.convert_tokens_to_ids(word) for word in WORDS}
    for image, score in zip(images[[0, 9]], scores[[0, 9]], strict=True):
        text = f"USER: {'<image>' * 4} {QUESTION.format(instruction='touch the red cube')} ASSISTANT:"
        input_ids = processor.tokenizer(text, return_tensors="pt").input_ids
        assert (input_ids == ids["<image>"]).sum() == 4 and ids["<unk>"] not in input_ids
        mean, std = (
            torch.tensor([0.48145466, 0.4578275, 0.40821073]),
            torch.tensor([0.26862954, 0.26130258, 0.27577711]),
        )
        pixels = ((torch.from_numpy(image) / 255.0 - mean) / std).permute(2, 0, 1)[None]
        with torch.no_grad():
            probabilities = model(input_ids=input_ids, pixel_values=pixels).logits[0, -1].softmax(-1)
        yes, no = (sum(probabilities[ids[word]].item() for word in words) for words in (("yes", "Yes"), ("no", "No")))
        assert score == pytest.approx(yes / (yes + no), abs=1e-5)


def test_a_model_that_cannot_be_asked_is_told(tmp_path: Path) -> None:
    mistakes = {"has no chat template": (None, ()), "yes and no are not single tokens": (TEMPLATE, ("yes", "Yes"))}
    for message, (template, unknown) in mistakes.items():
        directory = write_model(tmp_path / message, template, unknown)
        with pytest.raises(ValueError, match=message) as caught:
            load_judge(directory)
        assert "\n" not in str(caught.value)


def test_damaged_and_missing_weights_are_told(directory: Path, tmp_path: Path) -> None:
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "processor_config.json",
        "chat_template.jinja",
    ):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    with pytest.raises(ValueError, match=r"has no model\.safetensors; weights in another format .* are not read"):
        load_judge(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is no whole safetensors file") as caught:
        load_judge(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds an adapter \(adapter_config\.json\) beside the model; merge it first"):
        check_judge(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    config = json.loads((tmp_path / "config.json").read_text())
    del config["vision_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="holds a model of type 'llava', which cannot judge frames; give a directory"):
        load_judge(tmp_path)
