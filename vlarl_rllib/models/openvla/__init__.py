"""OpenVLA without remote code: configuration, model, processor and action tokenizer.

The names below are looked up on first use, which imports torch and transformers and registers them with transformers'
Auto classes (`auto.py`); `family.py` and what it needs load neither.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlarl_rllib.models.openvla.actions import NUM_ACTION_TOKENS, ActionTokenizer
    from vlarl_rllib.models.openvla.configuration import OpenVLAConfig
    from vlarl_rllib.models.openvla.modeling import ActionPrediction, OpenVLAForActionPrediction, OpenVLAOutput
    from vlarl_rllib.models.openvla.processing import OpenVLAProcessor, PrismaticImageProcessor, build_prompt
    from vlarl_rllib.models.openvla.vision import PrismaticVisionBackbone, normalize_pixels

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
