"""OpenVLA-OFT's configuration: OpenVLA's, and the layout of a sequence."""

from pathlib import Path
from typing import Any

from vlarl_rllib.models.openvla.configuration import OpenVLAConfig
from vlarl_rllib.models.openvla_oft.layout import CONFIG_KEY, OFTLayout, layout_of_config


class OpenVLAOFTConfig(OpenVLAConfig):
    """Configuration of OpenVLA-OFT, readable from any published `config.json`, which says `model_type: openvla`."""

    oft: dict[str, Any] | None = None
    """`OFTLayout`'s fields; those that are absent are its defaults."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.oft = self.layout.to_dict()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """As `OpenVLAConfig.from_pretrained`; keywords that are fields of `OFTLayout` win over what the file says."""
        given = {name: kwargs.pop(name) for name in OFTLayout().to_dict() if name in kwargs}
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config.oft = config.layout.with_options(given).to_dict()
        return loaded

    @property
    def layout(self) -> OFTLayout:
        """Of a sequence. Raises ValueError for an impossible one."""
        return layout_of_config({CONFIG_KEY: self.oft}) or OFTLayout()
