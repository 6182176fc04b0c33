"""What a checkpoint of OpenVLA-OFT leaves unsaid: how its sequences are laid out. Importing this loads no torch.

Published ones have the class and the tensors of plain OpenVLA, so a wrong layout loads, runs and fails every task.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from vlarl_rllib.models.openvla.actions import NUM_ACTION_TOKENS

CONFIG_KEY = "oft"
"""Of config.json, in checkpoints that this package writes: an object with `OFTLayout`'s fields."""
MAX_IMAGES = 2
"""The main camera's, and the wrist's."""
MAX_CHUNK = 64


@dataclass(frozen=True, slots=True)
class OFTLayout:
    """`[BOS | patches of each image | proprio | rest of the prompt | K x 7 zero vectors | </s>]`."""

    num_images: int = 1
    """1 = the main camera's; 2 = the wrist camera's too, behind it."""
    proprio: bool = False
    """Whether one token of the robot's own state follows the patches."""
    chunk: int = 8
    """K, actions of one pass."""
    stop_token: bool = True
    """Whether `</s>` stands behind the zero vectors, as OpenVLA-OFT and SimpleVLA-RL train it; RLinf's own layout has
    none."""
    l1_head: bool = False
    """Whether an MLP regresses the actions, which then have no tokens and no probability."""

    def __post_init__(self) -> None:
        for name, (lowest, highest) in {"num_images": (1, MAX_IMAGES), "chunk": (1, MAX_CHUNK)}.items():
            value = getattr(self, name)
            if type(value) is not int or not lowest <= value <= highest:
                raise ValueError(f"{name} is {value!r}, must be a number from {lowest} to {highest}")
        for name in ("proprio", "stop_token", "l1_head"):
            if type(value := getattr(self, name)) is not bool:
                raise ValueError(f"{name} is {value!r}, must be true or false")

    @property
    def num_tokens(self) -> int:
        """A = 7 K"""
        return self.chunk * NUM_ACTION_TOKENS

    @property
    def num_targets(self) -> int:
        """Labels of supervised learning: the tokens, and the stop token where there is one."""
        return self.num_tokens + self.stop_token

    def with_options(self, options: Mapping[str, Any]) -> OFTLayout:
        """Another one with what `options` says. Raises ValueError for an unknown option or an impossible value."""
        known = [field.name for field in fields(self)]
        if unknown := sorted(set(options) - set(known)):
            raise ValueError(f"{unknown[0]!r} is no option of OpenVLA-OFT; choose from {', '.join(known)}")
        return replace(self, **options)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def layout_of_config(config: Mapping[str, Any]) -> OFTLayout | None:
    """Of a config.json that this package wrote; None for any other. Raises ValueError for a damaged one."""
    written = config.get(CONFIG_KEY)
    if written is None:
        return None
    if not isinstance(written, Mapping):
        raise ValueError(f"{CONFIG_KEY} is {type(written).__name__}, must be an object; copy the checkpoint again")
    return OFTLayout().with_options(written)


def read_options(texts: Mapping[str, str]) -> dict[str, Any]:
    """Options as they stand in a family's reference: numbers, true, false. Raises ValueError for anything else."""
    options = {}
    for name, text in texts.items():
        try:
            options[name] = json.loads(text)
        except ValueError:
            raise ValueError(f"{name} is {text!r}, must be a number, true or false") from None
    return options
