"""Everything of the package at once, and its registration with transformers' AutoConfig, AutoProcessor and
AutoModelForImageTextToText under `model_type: "openvla"`.

The package's `__all__` says which of these names are for others.
"""
# ruff: noqa: F401

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from vlarl_rllib.models.openvla.actions import NUM_ACTION_TOKENS, ActionTokenizer
from vlarl_rllib.models.openvla.configuration import OpenVLAConfig
from vlarl_rllib.models.openvla.modeling import ActionPrediction, OpenVLAForActionPrediction, OpenVLAOutput
from vlarl_rllib.models.openvla.processing import (
    OpenVLAProcessor,
    PrismaticImageProcessor,
    PrismaticProcessor,
    build_prompt,
)
from vlarl_rllib.models.openvla.vision import PrismaticVisionBackbone, normalize_pixels

AutoConfig.register(OpenVLAConfig.model_type, OpenVLAConfig, exist_ok=True)
AutoModelForImageTextToText.register(OpenVLAConfig, OpenVLAForActionPrediction, exist_ok=True)
AutoProcessor.register(OpenVLAConfig, PrismaticProcessor, exist_ok=True)
