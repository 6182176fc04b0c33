"""OpenVLA as a policy family: one action of seven tokens a decision, sampled one after the other.

Importing this loads no torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vlarl_rllib.models.family import ActionFormat, PolicyFacts, PolicyFamily
from vlarl_rllib.models.files import (
    AGAIN,
    STATISTICS_FILE,
    check_weights,
    find_file,
    read_config,
    refuse_foreign_code,
)
from vlarl_rllib.models.openvla import presets
from vlarl_rllib.models.openvla.actions import NUM_ACTION_TOKENS, NUM_BINS, ActionTokenizer, OpenVLACodec
from vlarl_rllib.models.openvla.actions import dataset_statistics as statistics_of
from vlarl_rllib.models.openvla.prompt import build_prompt
from vlarl_rllib.process.json_files import read_json_object
from vlarl_rllib.process.own_files import replace_file
from vlarl_rllib.settings.published import RANDOM_7B

if TYPE_CHECKING:
    from torch import nn

    from vlarl_rllib.models.flops import PolicyFlops
    from vlarl_rllib.models.openvla import OpenVLAConfig, OpenVLAProcessor

PUBLISHED_PADDING = 64
"""Rows that published checkpoints pad the vocabulary to a multiple of; the action ids lie below them."""
PUBLISHED_VOCABULARY = 32064
MAX_IMAGE_SIZE = 4096
PUBLISHED_IMAGE_SIZE, PATCH_SIZE = 224, 14
PUBLISHED_TOWER_SIZES = {
    "featurizer": {"depth": 24, "embed_dim": 1024},
    "fused_featurizer": {"depth": 27, "embed_dim": 1152},
}
LLAMA_SIZES = {"num_hidden_layers": 32, "hidden_size": 4096}
"""What a config.json that leaves them out means, as the published ones do."""
PROMPT_TOKENS, CACHE_BLOCK = 48, 16
"""Of a prompt that an engine's cache is made for, and of what it reserves at once on a GPU (`engines.vllm.compat`)."""
PUBLISHED_TARGETS = (
    "q", "kv", "qkv", "proj", "fc1", "fc2", "fc3",
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head",
)  # fmt: skip
"""Module names of the adapters published with OpenVLA's fine-tuning code (PEFT 0.11's `all-linear`): both towers with
their patch embeddings, the projector, the language model and its head; 439 modules of the 7B model."""
LORA_TARGETS: dict[str, str | tuple[str, ...]] = {
    "published": PUBLISHED_TARGETS,
    "frozen_vision": r"projector\.fc[123]|language_model\.model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
    r"|language_model\.lm_head",
    "language_model": r"language_model\.model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",
}
"""What `model.lora.targets` stands for; a pattern must match a whole module name."""
HUB_CODE = "openvla/openvla-7b"
"""Repository with the published model code; exported files refer to it, for tools that run remote code. Ours do not."""
AUTO_MAP = {
    "AutoConfig": f"{HUB_CODE}--configuration_prismatic.OpenVLAConfig",
    "AutoModelForVision2Seq": f"{HUB_CODE}--modeling_prismatic.OpenVLAForActionPrediction",
}
PROCESSOR_MAP = {
    "AutoImageProcessor": f"{HUB_CODE}--processing_prismatic.PrismaticImageProcessor",
    "AutoProcessor": f"{HUB_CODE}--processing_prismatic.PrismaticProcessor",
}
"""The same in the processor's files, whatever the base checkpoint's refer to."""
COPIED_FILES = (
    "preprocessor_config.json", STATISTICS_FILE,
    "generation_config.json", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
"""Files of the base checkpoint that training does not change, as far as it has them."""


class OpenVLAFamily(PolicyFamily):
    """See `models.family.PolicyFamily`."""

    name = "openvla"
    vllm_model: ClassVar[str | None] = "vlarl_rllib.engines.vllm.openvla:VlarlOpenVLA"
    lora_targets = LORA_TARGETS
    published_statistics = True
    never_quantized: ClassVar[tuple[str, ...]] = ("vision_backbone", "projector", "lm_head")
    auto_map: ClassVar[Mapping[str, str] | None] = AUTO_MAP
    """Code that config.json of an export refers to; None = to none."""

    def read_facts(self, checkpoint: str) -> PolicyFacts:
        config, file = read_config(checkpoint)
        if config.get("model_type") != "openvla":
            raise ValueError(f"{checkpoint}: model_type is {config.get('model_type')!r}, must be 'openvla'")
        refuse_foreign_code(config, str(file))
        of_config, of_file, origins = _statistics(checkpoint, config, file)
        try:
            vocabulary = int(config.get("text_config", {}).get("vocab_size", PUBLISHED_VOCABULARY))
            image_size, num_bins = int(config["image_sizes"][0]), int(config.get("n_action_bins", NUM_BINS))
            end = vocabulary - int(config.get("pad_to_multiple_of", PUBLISHED_PADDING))
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(
                f"{file}: its sizes cannot be read ({type(error).__name__}: {error}); copy the checkpoint again"
            ) from None
        if not (1 <= image_size <= MAX_IMAGE_SIZE and 2 <= num_bins <= end):
            raise ValueError(f"{file}: {num_bins} bins of {end} ids, frames of {image_size} pixels make no policy")
        if Path(checkpoint).is_dir():
            check_weights(Path(checkpoint))
        actions = ActionFormat(1, NUM_ACTION_TOKENS, range(end - num_bins, end))
        return PolicyFacts(image_size, actions, {**of_config, **of_file}, origins)

    def codec(self, facts: PolicyFacts, statistics: Mapping[str, Any]) -> OpenVLACodec:
        ids = facts.actions.token_ids
        return OpenVLACodec(ActionTokenizer(ids.stop, len(ids)), statistics, facts.actions.num_actions)

    def dataset_statistics(self, actions: np.ndarray, num_episodes: int) -> dict[str, Any]:
        return statistics_of(actions, num_episodes)

    def prompt(self, instruction: str) -> str:
        return build_prompt(instruction)

    def describe(self, checkpoint: str) -> str:
        config, _ = read_config(checkpoint)
        towers = config.get("vision_towers")
        towers = towers if isinstance(towers, Mapping) else {}
        text = _sizes(config.get("text_config"), LLAMA_SIZES)
        seen = " and ".join(
            "{depth} blocks x {embed_dim}".format(**_sizes(towers.get(name), sizes))
            for name, sizes in PUBLISHED_TOWER_SIZES.items()
        )
        return (
            f"two vision towers ({seen}), projector, language model ({text['num_hidden_layers']} layers x "
            f"{text['hidden_size']})"
        )

    def cache_bytes(self, checkpoint: str | None, dtype: str) -> int:
        config = read_config(checkpoint)[0] if checkpoint else {}
        text = _sizes(config.get("text_config"), LLAMA_SIZES)
        side = self.read_facts(checkpoint).image_size if checkpoint else PUBLISHED_IMAGE_SIZE
        tokens = (side // PATCH_SIZE) ** 2 + PROMPT_TOKENS + NUM_ACTION_TOKENS
        element = 4 if dtype == "float32" else 2
        keys_and_values = 2 * text["num_hidden_layers"] * text["hidden_size"] * element
        return keys_and_values * -(-tokens // CACHE_BLOCK) * CACHE_BLOCK

    def count_flops(self, checkpoint: str, prompt_tokens: int) -> PolicyFlops:
        from vlarl_rllib.models.openvla.flops import count_flops

        return count_flops(self.load_config(checkpoint), prompt_tokens)

    def preset_facts(self) -> Mapping[str, PolicyFacts]:
        return {name: presets.preset_facts(preset) for name, preset in presets.PRESETS.items()}

    def preset_digest(self, preset: str) -> str:
        return presets.preset_digest(preset)

    def write_preset(self, preset: str, directory: Path, seed: int) -> None:
        if preset == RANDOM_7B:
            from vlarl_rllib.models.openvla.random_7b import write_random_7b

            write_random_7b(directory, seed)
        else:
            presets.write_preset(presets.PRESETS[preset], directory, seed)

    def load_config(self, checkpoint: str) -> OpenVLAConfig:
        from vlarl_rllib.models.openvla import OpenVLAConfig

        config: OpenVLAConfig = OpenVLAConfig.from_pretrained(checkpoint)
        return config

    def load(self, checkpoint: str, **options: Any) -> Any:
        from vlarl_rllib.models.openvla import OpenVLAForActionPrediction

        return OpenVLAForActionPrediction.from_pretrained(checkpoint, **options)

    def without_memory(self, checkpoint: str) -> nn.Module:
        import torch

        from vlarl_rllib.models.openvla import OpenVLAForActionPrediction

        with torch.device("meta"):
            return OpenVLAForActionPrediction(self.load_config(checkpoint))

    def processor(self, checkpoint: str) -> OpenVLAProcessor:
        from vlarl_rllib.models.openvla import OpenVLAProcessor

        return OpenVLAProcessor.from_pretrained(checkpoint)

    def shard_units(self, policy: Any) -> Iterable[nn.Module]:
        """Each tower, the projector, each decoder layer."""
        backbone = policy.vision_backbone
        yield from (backbone.featurizer, backbone.fused_featurizer, policy.projector)
        yield from policy.language_model.model.layers

    def compile_units(self, policy: Any) -> Iterable[nn.Module]:
        """The towers' blocks and the decoder layers."""
        backbone = policy.vision_backbone
        yield from (*backbone.featurizer.live_blocks, *backbone.fused_featurizer.live_blocks)
        yield from policy.language_model.model.layers

    def frozen_inputs(self, policy: Any) -> tuple[str, ...]:
        """The features of both towers, where neither is trained."""
        trained = any(parameter.requires_grad for parameter in policy.vision_backbone.parameters())
        return () if trained else ("vision_features",)

    def checkpoint_activations(self, policy: Any) -> None:
        """Of the language model's layers, which transformers leaves alone unless they are in training mode. Nothing of
        them is random."""
        how = {"use_reentrant": False, "preserve_rng_state": False}
        policy.language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        for layer in policy.language_model.model.layers:
            layer.training = True

    def freeze_unused(self, policy: Any) -> None:
        """What lies behind the feature block of each tower: published, but read by nothing."""
        for tower in (policy.vision_backbone.featurizer, policy.vision_backbone.fused_featurizer):
            read = {parameter for block in tower.live_blocks for parameter in block.parameters()}
            for name, parameter in tower.named_parameters():
                if name.startswith(("blocks.", "norm.", "attn_pool.")) and parameter not in read:
                    parameter.requires_grad_(False)

    def freeze_token_head(self, critic: Any) -> None:
        critic.language_model.lm_head.requires_grad_(False)

    def write_files(self, base: str, out: Path, dtype: str, norm_stats: dict[str, Any] | None) -> None:
        loaded = self.load_config(base)
        if norm_stats:
            loaded.norm_stats = norm_stats
        config: dict[str, Any] = loaded.to_dict()
        # the type goes under its published name
        for name in ("quantization_config", "_name_or_path", "dtype", "auto_map"):
            config.pop(name, None)
        config |= {"architectures": ["OpenVLAForActionPrediction"], "torch_dtype": dtype}
        if self.auto_map:
            config["auto_map"] = self.auto_map
        (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        _copy_files(base, out)
        if norm_stats:  # this file lies over the config's statistics wherever a checkpoint is read
            (out / STATISTICS_FILE).write_text(json.dumps(norm_stats, indent=2) + "\n")


def _statistics(
    checkpoint: str, config: Mapping[str, Any], config_file: Path
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """`norm_stats` of config.json and of `dataset_statistics.json`, and which file each key is from."""
    statistics_file = find_file(checkpoint, STATISTICS_FILE)
    of_config = config.get("norm_stats") or {}
    of_file = read_json_object(statistics_file, AGAIN) if statistics_file else {}
    if not isinstance(of_config, dict):
        raise ValueError(f"{config_file}: norm_stats is {type(of_config).__name__}, must be an object by data set")
    origins = dict.fromkeys(of_config, str(config_file)) | dict.fromkeys(of_file, str(statistics_file))
    return of_config, of_file, origins


def _sizes(given: Any, published: Mapping[str, int]) -> dict[str, int]:
    """Sizes of a part of config.json; what it leaves out, or what is no number, is as published."""
    values = given if isinstance(given, Mapping) else {}
    return {name: value if isinstance(value := values.get(name), int) else size for name, size in published.items()}


def _copy_files(base: str, out: Path) -> None:
    from vlarl_rllib.models.openvla.configuration import find_checkpoint_file

    for name in COPIED_FILES:
        source = find_checkpoint_file(base, name)
        if source is None:
            continue
        if name.endswith("_config.json") and "auto_map" in (values := read_json_object(source, AGAIN)):
            values["auto_map"] = {
                key: reference for key, reference in PROCESSOR_MAP.items() if key in (values["auto_map"] or ())
            }
            replace_file(out / name, json.dumps(values, indent=2) + "\n")
        else:
            shutil.copyfile(source, out / name)


FAMILY = OpenVLAFamily()
