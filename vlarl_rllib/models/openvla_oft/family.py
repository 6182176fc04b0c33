"""OpenVLA-OFT as a policy family: a chunk of actions a decision, all of its tokens from one pass.

Importing this loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from vlarl_rllib.models.family import PolicyFacts
from vlarl_rllib.models.files import read_config
from vlarl_rllib.models.openvla.family import LORA_TARGETS, PUBLISHED_TARGETS, OpenVLAFamily
from vlarl_rllib.models.openvla_oft import presets
from vlarl_rllib.models.openvla_oft.component_files import ACTION_HEAD, PROPRIO_PROJECTOR, component_file
from vlarl_rllib.models.openvla_oft.layout import CONFIG_KEY, OFTLayout, layout_of_config, read_options
from vlarl_rllib.models.openvla_oft.proprio import PROPRIO_SIZE
from vlarl_rllib.settings.published import published_model

if TYPE_CHECKING:
    from torch import nn

    from vlarl_rllib.models.flops import PolicyFlops
    from vlarl_rllib.models.openvla_oft import OpenVLAOFTConfig, OpenVLAOFTProcessor

COMPONENTS = {"proprio": PROPRIO_PROJECTOR, "l1_head": ACTION_HEAD}
"""By field of the layout, the part that it needs."""
CAMERAS = ("main", "wrist")


class OpenVLAOFTFamily(OpenVLAFamily):
    """See `models.family.PolicyFamily`. Its options are fields of `OFTLayout`.

    The layout is what the options say, else what this package's own config.json or the table of published checkpoints
    says, else what the files beside a checkpoint's weights tell, else the default.
    """

    name = "openvla_oft"
    has_model_type = False
    vllm_model = None
    lora_targets = LORA_TARGETS | {
        # By whole names: the published ones are also those of the parts that are trained whole beside adapters.
        "published": rf"(vision_backbone|projector|language_model)\.(.+\.)?({'|'.join(PUBLISHED_TARGETS)})"
    }
    never_quantized = (*OpenVLAFamily.never_quantized, *COMPONENTS.values())
    auto_map = None  # published code is plain OpenVLA's, and would load it without a word

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        """Raises ValueError for an option that is no field of the layout, or an impossible value."""
        self._options = dict(options or {})
        OFTLayout().with_options(self._options)

    def with_options(self, options: Mapping[str, str]) -> OpenVLAOFTFamily:
        return OpenVLAOFTFamily(self._options | read_options(options))

    def claims(self, checkpoint: str, config: Mapping[str, Any]) -> bool:
        return bool(config.get(CONFIG_KEY) or self._published(checkpoint) is not None or self._files(checkpoint))

    def doubt(self, checkpoint: str) -> str | None:
        config, _ = read_config(checkpoint)
        entries = super().read_facts(checkpoint).norm_stats.values()
        if self.claims(checkpoint, config) or any(map(_has_states, entries)):
            return None
        return (
            f"model.family: nothing in {checkpoint} says that it is OpenVLA-OFT; a plain OpenVLA loads as one and "
            "fails every task until it is fine-tuned as one: leave the family out, unless you know better"
        )

    def layout(self, checkpoint: str) -> OFTLayout:
        """Of a checkpoint's sequences.

        Raises:
            FileNotFoundError: no `config.json`.
            ValueError: it is damaged, or a file beside the weights contradicts the options.
        """
        config, file = read_config(checkpoint)
        files = self._files(checkpoint)
        try:
            known = layout_of_config(config)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        if known is None:
            told = {"num_images": len(CAMERAS)} if "proprio" in files else {}
            known = OFTLayout().with_options(self._published(checkpoint) or told | dict.fromkeys(files, True))
        layout = known.with_options(self._options)
        for option, path in files.items():
            if not getattr(layout, option):
                raise ValueError(
                    f"{checkpoint} was trained with {path.name}, so model.oft.{option} is true; leave it out"
                )
        return layout

    def read_facts(self, checkpoint: str) -> PolicyFacts:
        facts, layout = super().read_facts(checkpoint), self.layout(checkpoint)
        return replace(
            facts,
            actions=presets.action_format(layout, facts.actions.token_ids),
            cameras=CAMERAS[: layout.num_images],
            state_size=PROPRIO_SIZE if layout.proprio else 0,
            regresses=layout.l1_head,
        )

    def describe(self, checkpoint: str) -> str:
        layout = self.layout(checkpoint)
        sees = f"{layout.num_images} image(s){' and the state' if layout.proprio else ''}"
        gives = f"{layout.chunk} {'regressed actions' if layout.l1_head else 'actions of tokens'} a pass"
        return f"{super().describe(checkpoint)}; {sees}, {gives}, {'a' if layout.stop_token else 'no'} stop token"

    def cache_bytes(self, checkpoint: str | None, dtype: str) -> int:
        return 0

    def count_flops(self, checkpoint: str, prompt_tokens: int) -> PolicyFlops:
        from vlarl_rllib.models.openvla_oft.flops import count_flops

        return count_flops(self.load_config(checkpoint), prompt_tokens)

    def preset_facts(self) -> Mapping[str, PolicyFacts]:
        return {name: presets.preset_facts(name) for name in presets.PRESETS}

    def preset_digest(self, preset: str) -> str:
        return presets.preset_digest(preset)

    def write_preset(self, preset: str, directory: Path, seed: int) -> None:
        presets.write_preset(preset, directory, seed)

    def load_config(self, checkpoint: str) -> OpenVLAOFTConfig:
        from vlarl_rllib.models.openvla_oft import OpenVLAOFTConfig

        config: OpenVLAOFTConfig = OpenVLAOFTConfig.from_pretrained(checkpoint, **self.layout(checkpoint).to_dict())
        return config

    def load(self, checkpoint: str, **options: Any) -> Any:
        from vlarl_rllib.models.openvla_oft import OpenVLAOFTForActionPrediction

        return OpenVLAOFTForActionPrediction.from_pretrained(checkpoint, **self.layout(checkpoint).to_dict(), **options)

    def without_memory(self, checkpoint: str) -> nn.Module:
        import torch

        from vlarl_rllib.models.openvla_oft import OpenVLAOFTForActionPrediction

        with torch.device("meta"):
            return OpenVLAOFTForActionPrediction(self.load_config(checkpoint))

    def processor(self, checkpoint: str) -> OpenVLAOFTProcessor:
        from vlarl_rllib.models.openvla_oft import OpenVLAOFTProcessor

        return OpenVLAOFTProcessor.from_pretrained(checkpoint, **self.layout(checkpoint).to_dict())

    def _published(self, checkpoint: str) -> dict[str, Any] | None:
        """Options of a published checkpoint; None for any other."""
        published = published_model(checkpoint)
        name, _, options = published.family.partition("?") if published else ("", "", "")
        return read_options(dict(parse_qsl(options))) if name == self.name else None

    @staticmethod
    def _files(checkpoint: str) -> dict[str, Path]:
        """Files of a directory's own parts, by field of the layout. What a hub id has is not asked for."""
        if not Path(checkpoint).is_dir():
            return {}
        found = {option: component_file(checkpoint, part) for option, part in COMPONENTS.items()}
        return {option: file for option, file in found.items() if file is not None}


def _has_states(entry: Any) -> bool:
    """Whether statistics are of demonstrations with the robot's state, as OpenVLA-OFT's training writes them."""
    states = entry.get("proprio") if isinstance(entry, Mapping) else None
    quantiles = states.get("q01") if isinstance(states, Mapping) else None
    return isinstance(quantiles, list) and len(quantiles) == PROPRIO_SIZE


FAMILY = OpenVLAOFTFamily()
