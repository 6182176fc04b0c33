"""OpenVLA's configuration: the published `config.json` fields, tower sizes, action vocabulary and action statistics."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from transformers import LlamaConfig, PretrainedConfig
from transformers.utils import cached_file

from vlarl_rllib.models.files import AGAIN, CONFIG_FILE, STATISTICS_FILE, refuse_foreign_code
from vlarl_rllib.models.statistics import action_statistics
from vlarl_rllib.process.json_files import read_json_object

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")
"""The `from_pretrained` keywords that say how a file is fetched from the Hugging Face Hub."""


@dataclass(frozen=True)
class VisionTowerConfig:
    """Sizes of one vision transformer; the field names are timm's."""

    embed_dim: int
    depth: int
    """Number of blocks that exist; features leave block `depth - 2` and the last block is never run."""
    num_heads: int
    mlp_ratio: float
    img_size: int
    """Side of the square input, in pixels."""
    patch_size: int
    class_token: bool
    reg_tokens: int
    """Register tokens behind the class token; prefix tokens carry no position embedding."""
    init_values: float | None
    """Initial LayerScale factor; None: blocks have no LayerScale."""
    global_pool: str
    """`map`: an attention-pooling head exists (its weights are published but unused); `token`: none exists."""

    @property
    def num_patches(self) -> int:
        """Patches of one image, in row-major order."""
        return (self.img_size // self.patch_size) ** 2

    @property
    def num_prefix_tokens(self) -> int:
        """Class and register tokens in front of the patches."""
        return int(self.class_token) + self.reg_tokens

    def validate(self, name: str) -> None:
        """Raise ValueError where the sizes describe no tower; `name` is the tower's name in the message."""
        if self.img_size % self.patch_size:
            raise ValueError(f"{name}.img_size={self.img_size} must be a multiple of patch_size={self.patch_size}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"{name}.embed_dim={self.embed_dim} must be a multiple of num_heads={self.num_heads}")
        if self.depth < 2:
            raise ValueError(f"{name}.depth={self.depth} must be at least 2: features leave block depth - 2")
        if self.global_pool not in ("map", "token"):
            raise ValueError(f"{name}.global_pool={self.global_pool!r} must be one of: map, token")


PUBLISHED_TOWERS = {
    # timm vit_large_patch14_reg4_dinov2.lvd142m
    "featurizer": VisionTowerConfig(
        embed_dim=1024,
        depth=24,
        num_heads=16,
        mlp_ratio=4.0,
        img_size=224,
        patch_size=14,
        class_token=True,
        reg_tokens=4,
        init_values=1e-5,
        global_pool="token",
    ),
    # timm vit_so400m_patch14_siglip_224
    "fused_featurizer": VisionTowerConfig(
        embed_dim=1152,
        depth=27,
        num_heads=16,
        mlp_ratio=3.7362,
        img_size=224,
        patch_size=14,
        class_token=False,
        reg_tokens=0,
        init_values=None,
        global_pool="map",
    ),
}
"""The two towers of openvla-7b: DINOv2 (`featurizer`) and SigLIP (`fused_featurizer`)."""

_TOWER_KEYS = tuple(tower_field.name for tower_field in fields(VisionTowerConfig))
# `kind` is a label; `no_embed_class` is what every tower here does.
_TOWER_LABELS = {"kind", "no_embed_class"}


def find_checkpoint_file(checkpoint: str | Path, name: str, **hub_options: Any) -> Path | None:
    """Path of file `name` of a checkpoint directory or Hub id, or None where the checkpoint has no such file.

    Raises FileNotFoundError where `checkpoint` is neither a directory nor of the form `owner/name`.
    """
    checkpoint = str(checkpoint)
    if Path(checkpoint).is_dir():
        path = Path(checkpoint) / name
        return path if path.is_file() else None
    if checkpoint.count("/") != 1 or checkpoint.startswith(("/", ".", "~")):
        raise FileNotFoundError(
            f"checkpoint '{checkpoint}' is neither a directory nor a Hugging Face id of the form owner/name"
        )
    found = cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False, **hub_options)
    return None if found is None else Path(found)


def require_checkpoint_file(checkpoint: str | Path, name: str, **hub_options: Any) -> Path:
    """As `find_checkpoint_file`, but a missing file raises FileNotFoundError."""
    path = find_checkpoint_file(checkpoint, name, **hub_options)
    if path is None:
        raise FileNotFoundError(
            f"checkpoint '{checkpoint}' has no {name}; copy it from the checkpoint that this one was trained from"
        )
    return path


def hub_options_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `from_pretrained`'s keywords that concerns fetching files."""
    return {name: options[name] for name in HUB_OPTIONS if name in options}


def merge_dataset_statistics(norm_stats: Mapping[str, Any] | None, checkpoint: str | Path, **hub_options: Any) -> dict:
    """Action statistics of a checkpoint: its `dataset_statistics.json` (if it has one) laid over `norm_stats`.

    Fine-tuned checkpoints keep the base model's `norm_stats` in `config.json` and ship the statistics of their own
    data set in the separate file.
    """
    merged = dict(norm_stats or {})
    path = find_checkpoint_file(checkpoint, STATISTICS_FILE, **hub_options)
    if path is not None:
        merged.update(read_json_object(path, AGAIN))
    return merged


class OpenVLAConfig(PretrainedConfig):
    """Configuration of OpenVLA, readable from any published `config.json`.

    `text_config` keys that equal Llama's defaults are absent from published files; RMSNorm's epsilon is one of them,
    so it is 1e-6 here and in the published models (Llama 2 itself uses 1e-5).
    """

    model_type = "openvla"
    sub_configs: ClassVar[dict[str, type[PretrainedConfig]]] = {"text_config": LlamaConfig}

    text_config: LlamaConfig = None  # type: ignore[assignment]
    """Language model; a dictionary or None (Llama 2 7B's sizes) is turned into a LlamaConfig."""
    vision_towers: dict[str, dict[str, Any]] | None = None
    """Sizes that differ from `PUBLISHED_TOWERS`, by tower and key; `img_size` defaults to `image_sizes`."""
    norm_stats: dict[str, Any] | None = None
    """Statistics by data set: `{"action": {q01, q99, mask, mean, std, min, max: 7 each}, "proprio": ..., ...}`."""
    image_sizes: list[int] = field(default_factory=lambda: [224, 224])
    """Input side of each tower, in pixels."""
    image_token_index: int | None = None
    """Id that stands for an image patch in a vLLM prompt; the pad id unless given. It must be inside the vocabulary."""
    n_action_bins: int = 256
    pad_token_id: int = 32000
    pad_to_multiple_of: int = 64
    """Rows by which the embedding exceeds the tokenizer's vocabulary; action ids end just below them."""
    image_resize_strategy: str = "resize-naive"
    use_fused_vision_backbone: bool = True
    vision_backbone_id: str = "dinosiglip-vit-so-224px"
    llm_backbone_id: str = "llama2-7b-pure"
    hf_llm_id: str = "meta-llama/Llama-2-7b-hf"
    arch_specifier: str = "no-align+fused-gelu-mlp"
    llm_max_length: int = 2048
    output_projector_states: bool = False
    timm_model_ids: list[str] = field(
        default_factory=lambda: ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"]
    )
    timm_override_act_layers: list[str | None] = field(default_factory=lambda: [None, None])

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_foreign_code(
            kwargs | {"text_config": self.text_config}, "the model's config"
        )  # vLLM reads configs by itself
        if self.text_config is None:
            self.text_config = LlamaConfig(vocab_size=32064, pad_token_id=self.pad_token_id)
        elif isinstance(self.text_config, Mapping):
            self.text_config = LlamaConfig(**self.text_config)
        if self.image_token_index is None:
            self.image_token_index = self.pad_token_id
        super().__post_init__(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:  # type: ignore[override]
        """Read `config.json` of a directory or Hub id and merge `dataset_statistics.json` into `norm_stats`.

        Keywords that name a field override it, e.g. `vision_towers={"featurizer": {...}, "fused_featurizer": {...}}`.
        Raises FileNotFoundError where there is no `config.json`.
        """
        hub_options = hub_options_of(kwargs)
        if not Path(pretrained_model_name_or_path).is_file():
            require_checkpoint_file(pretrained_model_name_or_path, CONFIG_FILE, **hub_options)
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if not Path(pretrained_model_name_or_path).is_file():
            config.norm_stats = merge_dataset_statistics(
                config.norm_stats, pretrained_model_name_or_path, **hub_options
            )
        return loaded

    def vision_tower_configs(self) -> dict[str, VisionTowerConfig]:
        """Sizes of the towers `featurizer` and `fused_featurizer`: the published ones with `vision_towers` on top.

        Raises ValueError for an unknown tower or key, for sizes that fit no tower, and for the published variants with
        one tower or another projector.
        """
        if not self.use_fused_vision_backbone or self.arch_specifier != "no-align+fused-gelu-mlp":
            raise ValueError(
                f"use_fused_vision_backbone={self.use_fused_vision_backbone} with arch_specifier="
                f"'{self.arch_specifier}' is not supported; only True with 'no-align+fused-gelu-mlp' is"
            )
        overrides = self.vision_towers or {}
        if unknown := set(overrides) - set(PUBLISHED_TOWERS):
            raise ValueError(
                f"vision_towers has unknown towers {sorted(unknown)}; choose from {list(PUBLISHED_TOWERS)}"
            )
        towers = {}
        for (name, published), image_size in zip(PUBLISHED_TOWERS.items(), self.image_sizes, strict=True):
            sizes = {key: value for key, value in overrides.get(name, {}).items() if key not in _TOWER_LABELS}
            if unknown := set(sizes) - set(_TOWER_KEYS):
                raise ValueError(f"vision_towers.{name} has unknown keys {sorted(unknown)}; choose from {_TOWER_KEYS}")
            tower = replace(published, **{"img_size": image_size, **sizes})
            tower.validate(name)
            if tower.img_size != image_size:
                raise ValueError(f"vision_towers.{name}.img_size={tower.img_size} must equal image_sizes={image_size}")
            towers[name] = tower
        if len({tower.num_patches for tower in towers.values()}) != 1:
            raise ValueError(f"both towers must have the same number of patches, got {towers}")
        return towers

    @property
    def image_size(self) -> int:
        """Side of the square model input, in pixels."""
        return self.image_sizes[0]

    @property
    def num_patches(self) -> int:
        """Image positions in the language model's sequence."""
        return self.vision_tower_configs()["featurizer"].num_patches

    @property
    def action_vocab_size(self) -> int:
        """Size of the tokenizer's own vocabulary (32000 for Llama): one above the highest action id."""
        return self.text_config.vocab_size - self.pad_to_multiple_of

    @property
    def action_token_ids(self) -> range:
        """The ids that stand for action bins, ascending: the highest `n_action_bins` of the tokenizer's vocabulary."""
        return range(self.action_vocab_size - self.n_action_bins, self.action_vocab_size)

    def action_statistics(self, unnorm_key: str | None = None) -> dict[str, Any]:
        """Action statistics (`q01`, `q99`, `mask`, ...: 7 numbers each) of data set `unnorm_key`.

        A key that is absent is looked up as `<key>_no_noops` too, since published checkpoints use either name. None
        picks the only data set. Raises ValueError for an unknown or ambiguous key, or numbers that scale no action.
        """
        norm_stats = self.norm_stats or {}
        if unnorm_key is None and len(norm_stats) == 1:
            unnorm_key = next(iter(norm_stats))
        for key in (unnorm_key, f"{unnorm_key}_no_noops"):
            if key in norm_stats:
                return action_statistics(norm_stats[key], f"norm_stats: {key}")
        raise ValueError(f"unnorm_key={unnorm_key!r} is not in this checkpoint; choose from {sorted(norm_stats)}")
