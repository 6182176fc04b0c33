"""Small OpenVLA-OFT models that are made from a seed: OpenVLA's, with one image and chunks of eight. Importing this
module loads no torch."""

import hashlib
from dataclasses import replace
from pathlib import Path

from vlarl_rllib.models.family import ActionFormat, PolicyFacts
from vlarl_rllib.models.openvla import presets
from vlarl_rllib.models.openvla.actions import NUM_ACTION_TOKENS
from vlarl_rllib.models.openvla_oft.layout import OFTLayout

PRESETS = {f"{name}-oft": presets.PRESETS[name] for name in ("tiny", "mini")}


def write_preset(preset_name: str, directory: Path, seed: int) -> None:
    """See `PolicyFamily.write_preset`."""
    from vlarl_rllib.models.openvla_oft import OpenVLAOFTForActionPrediction

    presets.write_preset(PRESETS[preset_name], directory, seed, OpenVLAOFTForActionPrediction)


def preset_facts(preset_name: str) -> PolicyFacts:
    """What `read_facts` would say of the written checkpoint."""
    facts = presets.preset_facts(PRESETS[preset_name])
    return replace(facts, actions=action_format(OFTLayout(), facts.actions.token_ids))


def action_format(layout: OFTLayout, token_ids: range) -> ActionFormat:
    """Of a decision: a chunk, from one pass."""
    return ActionFormat(layout.chunk, NUM_ACTION_TOKENS, token_ids, parallel=True, stop_token=layout.stop_token)


def preset_digest(preset_name: str) -> str:
    """Changes with what makes the preset."""
    of_sizes = presets.preset_digest(preset_name.removesuffix("-oft"))
    own = (Path(__file__).with_name(name).read_bytes() for name in ("presets.py", "layout.py", "configuration.py"))
    return hashlib.sha256(b"".join([of_sizes.encode(), *own])).hexdigest()[:12]
