"""LoRA adapters: PEFT's layers and files, with one merged product instead of PEFT's extra ones.

r = rank, N = rows of the input (batch x sequence), I = in features, O = out features.

PEFT computes `x Wᵀ + s (x Aᵀ) Bᵀ`. Here a layer multiplies once with `W' = W + s B A`, rounded to the compute type as
the sampler's weights are, and its backward pass forms the two low-rank gradients alone. So the learner runs on exactly
the weights that the engines hold, and saves the extra products. W' is made anew in both passes, or, where there is
memory for it beside the base, once for all passes between two optimiser steps (`merge_ahead`).

The base may be quantised (`models/quantization.py`); then W is what it dequantises to.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import layer as peft_layers
from peft.utils.integrations import dequantize_module_weight
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlarl_rllib.models.files import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, check_adapter
from vlarl_rllib.models.low_rank import MergedProduct, Product, merge_lora

if TYPE_CHECKING:
    from vlarl_rllib.settings import LoraSettings

ADAPTER_NAME = "default"
PEFT_PREFIX = "base_model.model."
"""In front of every name of an adapter file."""

USED_KEYS = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "use_rslora",
)  # fmt: skip
"""Fields of an adapter's config that say what is computed."""
MAX_ALPHA = 16
"""Default alpha is min(rank, 16), as in OpenVLA's fine-tuning code."""


class _Merged(peft_layers.LoraLayer):
    """What both kinds of layers share; `base_layer`, `lora_A` and `lora_B` are PEFT's."""

    dequantized_dtype = torch.float32
    """Type of the weight of a quantised base."""

    @property
    def factors(self) -> tuple[Tensor, Tensor, float]:
        """(A, B, scaling)."""
        lora_a, lora_b = cast(nn.Linear, self.lora_A[ADAPTER_NAME]), cast(nn.Linear, self.lora_B[ADAPTER_NAME])
        return lora_a.weight, lora_b.weight, self.scaling[ADAPTER_NAME]

    def base_weight(self) -> Tensor:
        """The base layer's weight, dequantised where it is quantised."""
        weight = cast(Tensor, self.base_layer.weight)
        if weight.is_floating_point():
            return weight  # past PEFT's function, which the compiler cannot look into
        return dequantize_module_weight(self.base_layer).to(self.dequantized_dtype)

    @torch.no_grad()
    def published_weight(self, gather: Callable[[Tensor], Tensor]) -> Tensor:
        """The merged weight as `forward` uses it, from whole tensors that `gather` makes of shards."""
        lora_a, lora_b, scaling = self.factors
        return merge_lora(gather(self.base_weight()), gather(lora_a), gather(lora_b), scaling)


class MergedLinear(peft_layers.Linear, _Merged):
    """A linear layer with an adapter."""

    merged_weight: Tensor | None
    """W', where it was merged ahead and is current."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("merged_weight", None, persistent=False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        lora_a, lora_b, scaling = self.factors
        if self.merged_weight is None:
            out = MergedProduct.apply(x, lora_a, lora_b, self, scaling)
        else:
            out = Product.apply(x, self.merged_weight, lora_a, lora_b, scaling)
        return out if self.base_layer.bias is None else out + self.base_layer.bias

    @torch.no_grad()
    def merge_ahead(self) -> None:
        """Merge what A and B are now."""
        weight = self.base_weight()
        if self.merged_weight is None:
            self.merged_weight = torch.empty_like(weight)
        merge_lora(weight, *self.factors, out=self.merged_weight)

    def published_weight(self, gather: Callable[[Tensor], Tensor]) -> Tensor:
        return super().published_weight(gather) if self.merged_weight is None else self.merged_weight

    def rows(self, ids: slice) -> Tensor:
        """Rows of the merged weight, differentiable; for a head of which only some outputs are wanted."""
        lora_a, lora_b, scaling = self.factors
        return merge_lora(self.base_weight()[ids], lora_a, lora_b[ids], scaling)


class MergedConv2d(peft_layers.Conv2d, _Merged):
    """A convolution with an adapter: the patch embeddings, small enough for autograd's own way through the merge."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        conv = cast(nn.Conv2d, self.base_layer)
        return F.conv2d(
            x, merge_lora(conv.weight, *self.factors), conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
        )


def add_lora(
    model: nn.Module, settings: LoraSettings, targets: Mapping[str, str | tuple[str, ...]] | None = None
) -> LoraConfig:
    """Put adapters into `model` in place: float32, B = 0 and A drawn from torch's global generator, or those of
    `settings.adapter`.

    Everything else is frozen.

    Args:
        targets: what the words of `settings.targets` stand for, see `PolicyFamily.lora_targets`.

    Raises:
        FileNotFoundError: no adapter in `settings.adapter`.
        ValueError: an adapter of another kind or for another model, or targets that match nothing.
    """
    config = read_adapter_config(settings.adapter) if settings.adapter else _new_config(settings, targets or {})
    config._register_custom_module({nn.Linear: MergedLinear, nn.Conv2d: MergedConv2d})
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", category=UserWarning, module="peft"
        )  # of keys that an inference-only adapter would have
        inject_adapter_in_model(config, model, ADAPTER_NAME)
    for parameter in adapter_parameters(model).values():
        parameter.data = parameter.data.float()
    if settings.adapter:
        load_adapter_weights(model, settings.adapter)
    return config


def set_dequantized_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Choose the type in which quantised weights are used."""
    for _, layer in lora_layers(model):
        layer.dequantized_dtype = dtype


def merge_ahead(model: nn.Module) -> None:
    """Merge every adapted linear layer once, for all passes until A and B change: as much memory again as their
    weights. Call it again after each change; the model must not be sharded or quantised."""
    for _, layer in lora_layers(model):
        if isinstance(layer, MergedLinear):
            layer.merge_ahead()


def lora_layers(model: nn.Module) -> Iterator[tuple[str, MergedLinear | MergedConv2d]]:
    """(published module name, layer) of every adapted module."""
    for name, module in model.named_modules():
        if isinstance(module, (MergedLinear, MergedConv2d)):
            yield name, module


# Names and files


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every A and B under the name that PEFT's files give it."""
    return {peft_name(name): parameter for name, parameter in model.named_parameters() if is_adapter(name)}


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return f".lora_A.{ADAPTER_NAME}." in name or f".lora_B.{ADAPTER_NAME}." in name


def peft_name(name: str) -> str:
    """`layer.lora_A.default.weight` -> `base_model.model.layer.lora_A.weight`."""
    return PEFT_PREFIX + name.replace(f".{ADAPTER_NAME}.weight", ".weight")


def published_name(name: str) -> str:
    """Published name of a parameter that is not an adapter's: `layer.base_layer.weight` -> `layer.weight`."""
    return name.replace(".base_layer.", ".")


def read_adapter_config(directory: str | Path) -> LoraConfig:
    """PEFT's `adapter_config.json`, for training on: dropout off.

    Raises:
        FileNotFoundError: there is none.
        ValueError: not LoRA, a variant that is not implemented here, or a damaged one.
    """
    stored = check_adapter(directory)
    try:
        config = LoraConfig(**{name: stored[name] for name in USED_KEYS if name in stored})
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{directory}: {ADAPTER_CONFIG_FILE} is not PEFT's ({error}); copy the adapter again"
        ) from None
    config.init_lora_weights = True
    return config


def load_adapter_weights(model: nn.Module, directory: str | Path) -> None:
    """Copy an adapter file into `model`. Raises ValueError unless it has exactly the model's adapters."""
    try:
        stored = load_file(Path(directory) / ADAPTER_WEIGHTS_FILE)
    except SafetensorError as error:
        raise ValueError(f"{directory}: {ADAPTER_WEIGHTS_FILE} is damaged ({error}); copy it again") from None
    own = adapter_parameters(model)
    wrong = sorted(stored.keys() ^ own.keys()) or sorted(
        name for name, tensor in stored.items() if tensor.shape != own[name].shape
    )
    if wrong:
        raise ValueError(
            f"{directory}: {len(wrong)} tensors do not fit this model, the first is {wrong[0]}; was it trained "
            "on another one?"
        )
    with torch.no_grad():
        for name, tensor in stored.items():
            own[name].copy_(tensor)


def save_adapter(model: nn.Module, config: LoraConfig, directory: str | Path, base_model: str) -> None:
    """Write an adapter that PEFT loads onto `base_model`, a directory or hub id. `model` must not be sharded."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    saved = copy.copy(config)
    saved.base_model_name_or_path, saved.inference_mode = base_model, True
    saved.save_pretrained(str(directory))
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in adapter_parameters(model).items()}
    save_file(tensors, directory / ADAPTER_WEIGHTS_FILE, metadata={"format": "pt"})


def _new_config(settings: LoraSettings, known: Mapping[str, str | tuple[str, ...]]) -> LoraConfig:
    if isinstance(settings.targets, str) and settings.targets not in known:
        raise ValueError(
            f"model.lora.targets: {settings.targets!r} means nothing for this policy; choose from {', '.join(known)}, "
            "or list modules"
        )
    targets = known[settings.targets] if isinstance(settings.targets, str) else settings.targets
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha or min(settings.rank, MAX_ALPHA),
        target_modules=targets if isinstance(targets, str) else list(targets),
        init_lora_weights="gaussian",
    )
