"""Small OpenVLA models that are made from a seed. Importing this module loads no torch."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlarl_rllib.models.family import ActionFormat, PolicyFacts
from vlarl_rllib.models.openvla.actions import NUM_ACTION_TOKENS, NUM_BINS

if TYPE_CHECKING:
    from vlarl_rllib.models.openvla import OpenVLAConfig, OpenVLAForActionPrediction

# Words of the instructions of the five LIBERO suites.
LIBERO_WORDS = """
alphabet and at back basket bbq between black book both bottle bottom bowl box butter cabinet caddy center cheese
chocolate close compartment cookie cream drawer dressing from front frying in inside it juice ketchup left microwave
middle milk moka mug next of off on open orange pan pick place plate pot pots pudding push put rack ramekin red right
salad sauce shelf soup stack stove table the them to tomato top tray turn under up white wine wooden yellow
"""
# Words that other table-top tasks are likely to use.
OTHER_WORDS = """
a above along an area away ball beside block blue brown circle corner cube cyan cylinder dark door down edge far
forward gray green grey grasp gripper handle into large lift light line magenta marker move near object onto out over
pink purple reach region release ring rotate side slide small square star target touch toward towards triangle upright
with zone goal
"""
PROMPT_WORDS = "In What action should robot take Out"
PUNCTUATION = ("\n", ":", "?")

EMBEDDING_STD = 0.1
"""Small beside what the first layers add (about 1), so that the image, not the last word, decides the first actions."""

UNKNOWN, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<PAD>"

# 1 % and 99 % quantiles (x, y, z, roll, pitch, yaw; the gripper passes through), demonstrations and steps of each
# LIBERO suite, as published with the fine-tuned OpenVLA checkpoints.
LIBERO_QUANTILES: dict[str, dict[str, Any]] = {
    "libero_spatial": {
        "q01": [
            -0.7454732114076613,
            -0.6616071462631226,
            -0.9375,
            -0.1071428582072258,
            -0.20678570866584778,
            -0.1842857152223587,
        ],
        "q99": [
            0.9375,
            0.8758928775787354,
            0.9321428537368774,
            0.1039285734295845,
            0.17678570747375488,
            0.14571428298950195,
        ],
        "num_transitions": 52970,
        "num_trajectories": 432,
    },
    "libero_object": {
        "q01": [
            -0.5383928418159485,
            -0.8758928775787354,
            -0.9375,
            -0.06964285671710968,
            -0.11678571254014969,
            -0.15964286029338837,
        ],
        "q99": [0.8464285731315613, 0.84375, 0.9375, 0.08142857253551483, 0.14892856776714325, 0.0867857113480568],
        "num_transitions": 66984,
        "num_trajectories": 454,
    },
    "libero_goal": {
        "q01": [
            -0.8785714507102966,
            -0.7553571462631226,
            -0.9375,
            -0.1510714292526245,
            -0.1639285683631897,
            -0.13777500048279764,
        ],
        "q99": [0.9375, 0.9107142686843872, 0.9375, 0.20357142388820648, 0.26357144117355347, 0.375],
        "num_transitions": 52042,
        "num_trajectories": 428,
    },
    "libero_10": {
        "q01": [
            -0.6348214149475098,
            -0.7741071581840515,
            -0.7633928656578064,
            -0.09749999642372131,
            -0.14819999992847435,
            -0.2742857038974762,
        ],
        "q99": [
            0.7714285850524902,
            0.8464285731315613,
            0.9375,
            0.13928571343421936,
            0.15964286029338837,
            0.3246428668498993,
        ],
        "num_transitions": 101469,
        "num_trajectories": 379,
    },
}


@dataclass(frozen=True)
class Preset:
    """Sizes of a small model that is made from a seed."""

    image_size: int
    """Pixels; patches are 14 pixels wide."""
    tower_width: int
    """Of each of the two vision towers."""
    tower_depth: int
    tower_heads: int
    hidden_size: int
    """Of the language model."""
    intermediate_size: int
    num_layers: int
    num_heads: int
    """hidden_size / num_heads must be a head size that vLLM's CPU attention has: 32, 64, 80, 96, 128, ..."""
    word_vocab_size: int = 256
    """Ids below the 256 action ids: special tokens and words."""


PRESETS = {
    # 0.7 M parameters, 4 patches: seconds on a CPU
    "tiny": Preset(
        image_size=28,
        tower_width=64,
        tower_depth=3,
        tower_heads=2,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=2,
    ),
    # 1.1 M parameters, 16 patches: for `tabletop` on a CPU. Fine-tuning mostly learns within 600 steps which object the
    # instruction names; with two decoder layers, or with one tower block more, it had not by then.
    "small": Preset(
        image_size=56,
        tower_width=64,
        tower_depth=2,
        tower_heads=2,
        hidden_size=128,
        intermediate_size=256,
        num_layers=3,
        num_heads=4,
    ),
    # 32 M parameters, 64 patches: minutes on one GPU
    "mini": Preset(
        image_size=112,
        tower_width=256,
        tower_depth=6,
        tower_heads=4,
        hidden_size=384,
        intermediate_size=1536,
        num_layers=8,
        num_heads=6,
    ),
}


def write_preset(
    preset: Preset, directory: Path, seed: int, model_class: "type[OpenVLAForActionPrediction] | None" = None
) -> None:
    """See `PolicyFamily.write_preset`; the model is of the class, by default OpenVLA's."""
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar

    from vlarl_rllib.models.openvla import PrismaticImageProcessor

    directory.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()  # of one shard; it would be the first thing that a quickstart shows
    try:
        build_model(preset, seed, model_class).save_pretrained(directory)
    finally:
        enable_progress_bar()
    PrismaticImageProcessor.for_image_size(preset.image_size).save_pretrained(directory)
    write_tokenizer(preset, directory)


def preset_facts(preset: Preset) -> PolicyFacts:
    """What `read_facts` would say of the written checkpoint."""
    vocabulary, statistics = _action_vocab_size(preset), action_statistics()
    return PolicyFacts(
        image_size=preset.image_size,
        actions=ActionFormat(1, NUM_ACTION_TOKENS, range(vocabulary - NUM_BINS, vocabulary)),
        norm_stats=statistics,
        origins=dict.fromkeys(statistics, "the preset"),
    )


def build_config(preset: Preset, config_class: "type[OpenVLAConfig] | None" = None) -> "OpenVLAConfig":
    """Configuration of a preset, with the action statistics of the LIBERO suites and of `tabletop`."""
    from transformers import LlamaConfig

    from vlarl_rllib.models.openvla import OpenVLAConfig

    tower = {
        "embed_dim": preset.tower_width,
        "depth": preset.tower_depth,
        "num_heads": preset.tower_heads,
        "mlp_ratio": 4.0,
    }
    pad_token_id = _action_vocab_size(preset)
    text_config = LlamaConfig(
        vocab_size=pad_token_id + 64,
        hidden_size=preset.hidden_size,
        intermediate_size=preset.intermediate_size,
        num_hidden_layers=preset.num_layers,
        num_attention_heads=preset.num_heads,
        max_position_embeddings=2048,
        pad_token_id=pad_token_id,
    )
    return (config_class or OpenVLAConfig)(
        text_config=text_config,
        # DINOv2's 1e-5 is meant for towers that train for long; it would silence these blocks
        vision_towers={"featurizer": {**tower, "init_values": 1.0}, "fused_featurizer": tower},
        image_sizes=[preset.image_size, preset.image_size],
        pad_token_id=pad_token_id,
        image_token_index=pad_token_id,
        norm_stats=action_statistics(),
        dtype="float32",
    )


def build_model(
    preset: Preset, seed: int = 0, model_class: "type[OpenVLAForActionPrediction] | None" = None
) -> "OpenVLAForActionPrediction":
    """A float32 model with random weights; torch's global generator is left as it was."""
    import torch

    from vlarl_rllib.models.openvla import OpenVLAForActionPrediction

    chosen = model_class or OpenVLAForActionPrediction
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = chosen(build_config(preset, chosen.config_class))
        initialize_for_exploration(model)
    return model.eval()


def action_statistics() -> dict[str, Any]:
    """`norm_stats` of the presets: the LIBERO suites', and `tabletop`, whose actions already lie in [-1, 1].

    `libero_90` has libero_10's quantiles: no checkpoint for it was published. Only `q01`, `q99` and `mask` mean
    something; the other fields keep the published shape.
    """
    whole_range = {"q01": [-1.0] * 6, "q99": [1.0] * 6, "num_transitions": 0, "num_trajectories": 0}
    quantiles = {**LIBERO_QUANTILES, "libero_90": LIBERO_QUANTILES["libero_10"], "tabletop": whole_range}
    return {key: _dataset_statistics(values) for key, values in quantiles.items()}


def _dataset_statistics(values: Mapping[str, Any]) -> dict[str, Any]:
    placeholders = {"mean": [0.0] * 7, "std": [1.0] * 7, "max": [1.0] * 7, "min": [-1.0] * 6 + [0.0]}
    return {
        "action": {
            **placeholders,
            "q01": [*values["q01"], 0.0],
            "q99": [*values["q99"], 1.0],
            "mask": [True] * 6 + [False],
        },
        "proprio": {name: [0.0] * 7 for name in ("mean", "std", "max", "min", "q01", "q99")},
        "num_transitions": values["num_transitions"],
        "num_trajectories": values["num_trajectories"],
    }


def initialize_for_exploration(model: "OpenVLAForActionPrediction") -> None:
    """Scale random weights so that the first policy explores and sees the image.

    Every linear map keeps the size of what it is given, so that action logits have a standard deviation of about 1:
    about 5 nats of entropy per token, of at most 5.5.
    """
    import torch
    from torch import nn

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(std=EMBEDDING_STD)


def _action_vocab_size(preset: Preset) -> int:
    return preset.word_vocab_size + NUM_BINS


def write_tokenizer(preset: Preset, directory: Path) -> None:
    """Word-level tokenizer: splits at spaces; `:`, `?` and newline are tokens; an unknown word becomes `<unk>`."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors

    words = [UNKNOWN, BOS, EOS, *PUNCTUATION, *PROMPT_WORDS.split()]
    words += sorted({*LIBERO_WORDS.split(), *OTHER_WORDS.split()})
    if len(words) > preset.word_vocab_size:
        raise ValueError(f"{len(words)} words do not fit word_vocab_size={preset.word_vocab_size}")
    words += [f"<extra_{index}>" for index in range(len(words), preset.word_vocab_size)]
    words += [f"<act_{index}>" for index in range(_action_vocab_size(preset) - len(words))]
    vocabulary = {word: index for index, word in enumerate([*words, PAD])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", behavior="removed"),
            pre_tokenizers.Split(Regex("[:?\\n]"), behavior="isolated"),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair="$A $B:1", special_tokens=[(BOS, vocabulary[BOS])]
    )
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in (UNKNOWN, BOS, EOS, PAD)])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": 2048,
        "pad_token": PAD,
        "padding_side": "right",
        "processor_class": "PrismaticProcessor",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNKNOWN,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def preset_digest(preset_name: str) -> str:
    """Changes with this file and the preset's sizes."""
    source = Path(__file__).read_bytes() + json.dumps(asdict(PRESETS[preset_name])).encode()
    return hashlib.sha256(source).hexdigest()[:12]
