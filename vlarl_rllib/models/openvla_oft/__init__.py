"""OpenVLA-OFT without remote code: configuration, model and processor.

The names below are looked up on first use, which imports torch and transformers; `family.py` and what it needs load
neither.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlarl_rllib.models.openvla_oft.configuration import OpenVLAOFTConfig
    from vlarl_rllib.models.openvla_oft.layout import OFTLayout
    from vlarl_rllib.models.openvla_oft.modeling import OpenVLAOFTForActionPrediction, OpenVLAOFTOutput
    from vlarl_rllib.models.openvla_oft.processing import OpenVLAOFTProcessor
    from vlarl_rllib.models.openvla_oft.proprio import normalize_proprio

MODULES = {
    "OFTLayout": "layout",
    "OpenVLAOFTConfig": "configuration",
    "OpenVLAOFTForActionPrediction": "modeling",
    "OpenVLAOFTOutput": "modeling",
    "OpenVLAOFTProcessor": "processing",
    "normalize_proprio": "proprio",
}
"""By name, the module that has it."""
__all__ = [
    "OFTLayout",
    "OpenVLAOFTConfig",
    "OpenVLAOFTForActionPrediction",
    "OpenVLAOFTOutput",
    "OpenVLAOFTProcessor",
    "normalize_proprio",
]


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
