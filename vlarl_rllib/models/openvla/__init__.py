"""OpenVLA without remote code: configuration, model, processor and action tokenizer.

The names below are looked up on first use, which imports torch and transformers and registers them with transformers'
Auto classes (`auto.py`); `family.py` and what it needs load neither.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlarl_rllib.models.openvla.auto import (
        NUM_ACTION_TOKENS as NUM_ACTION_TOKENS,
    )
    from vlarl_rllib.models.openvla.auto import (
        ActionPrediction as ActionPrediction,
    )
    from vlarl_rllib.models.openvla.auto import (
        ActionTokenizer as ActionTokenizer,
    )
    from vlarl_rllib.models.openvla.auto import (
        OpenVLAConfig as OpenVLAConfig,
    )
    from vlarl_rllib.models.openvla.auto import (
        OpenVLAForActionPrediction as OpenVLAForActionPrediction,
    )
    from vlarl_rllib.models.openvla.auto import (
        OpenVLAOutput as OpenVLAOutput,
    )
    from vlarl_rllib.models.openvla.auto import (
        OpenVLAProcessor as OpenVLAProcessor,
    )
    from vlarl_rllib.models.openvla.auto import (
        PrismaticImageProcessor as PrismaticImageProcessor,
    )
    from vlarl_rllib.models.openvla.auto import (
        PrismaticVisionBackbone as PrismaticVisionBackbone,
    )
    from vlarl_rllib.models.openvla.auto import (
        build_prompt as build_prompt,
    )
    from vlarl_rllib.models.openvla.auto import (
        normalize_pixels as normalize_pixels,
    )

__all__ = [
    "NUM_ACTION_TOKENS",
    "ActionPrediction",
    "ActionTokenizer",
    "OpenVLAConfig",
    "OpenVLAForActionPrediction",
    "OpenVLAOutput",
    "OpenVLAProcessor",
    "PrismaticImageProcessor",
    "PrismaticVisionBackbone",
    "build_prompt",
    "normalize_pixels",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vlarl_rllib.models.openvla import auto

    return getattr(auto, name)
