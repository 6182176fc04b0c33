"""Frozen weights in 8 or 4 bits with bitsandbytes, as transformers loads them.

Linear layers are quantised but for what the family excepts (`PolicyFamily.never_quantized`). A layer's product uses the
dequantised weight (`lora._Merged.base_weight`), which is also what the sampler receives, so both run on the same
numbers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


def quantization_config(
    kind: Literal["8bit", "4bit"], dtype: torch.dtype, never_quantized: Sequence[str]
) -> BitsAndBytesConfig:
    """What `from_pretrained(quantization_config=...)` takes: LLM.int8 (arXiv 2208.07339) or NF4 (QLoRA, arXiv
    2305.14314).

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f"model.quantization: {kind} needs bitsandbytes, which is not installed; run: pip install bitsandbytes"
        )
    return BitsAndBytesConfig(
        load_in_8bit=kind == "8bit",
        load_in_4bit=kind == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(never_quantized),
    )


def quantized_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Those that bitsandbytes keeps in its own types; they cannot be sharded."""
    return {parameter for parameter in model.parameters() if type(parameter).__name__ in ("Params4bit", "Int8Params")}
