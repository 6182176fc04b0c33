"""A model of the published sizes with random weights: for measuring, where the published ones are not at hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from vlarl_rllib.models.openvla.actions import NUM_BINS
from vlarl_rllib.models.openvla.configuration import OpenVLAConfig
from vlarl_rllib.models.openvla.modeling import OpenVLAForActionPrediction
from vlarl_rllib.models.openvla.presets import (
    PRESETS,
    action_statistics,
    initialize_for_exploration,
    write_tokenizer,
)
from vlarl_rllib.models.openvla.processing import PrismaticImageProcessor

LLAMA_WORDS = 32000
"""Ids of Llama's tokenizer; the action ids are the last ones."""
LARGEST_SHARD = "5GB"
"""As the published files have it."""


def write_random_7b(directory: Path, seed: int = 0) -> None:
    """Published sizes, names and shards, random bfloat16 weights, a word-level tokenizer with Llama's id ranges.

    On a GPU, where there is one, it takes a minute, and 16 GB of the card while it lasts. The same seed gives the same
    weights on the same kind of device.
    """
    from huggingface_hub import save_torch_state_dict

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = {"pad_token_id": LLAMA_WORDS, "vocab_size": LLAMA_WORDS + 64, "torch_dtype": "bfloat16"}
    config = OpenVLAConfig(
        text_config=text, norm_stats=action_statistics(), dtype="bfloat16", architectures=["OpenVLAForActionPrediction"]
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            model = OpenVLAForActionPrediction(config)
            initialize_for_exploration(model)
    finally:
        torch.set_default_dtype(default)
    directory.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(model.state_dict(), directory, max_shard_size=LARGEST_SHARD, metadata={"format": "pt"})
    config.save_pretrained(directory)
    PrismaticImageProcessor.for_image_size(config.image_size).save_pretrained(directory)
    write_tokenizer(replace(PRESETS["tiny"], word_vocab_size=LLAMA_WORDS - NUM_BINS), directory)
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the card is the learner's and the engine's from here on
