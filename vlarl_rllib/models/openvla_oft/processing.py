"""From frames of one or two cameras, the robot's state and instructions to model inputs.

B = batch, n = cameras, S = image side in pixels, H, W = any frame size.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerFast

from vlarl_rllib.models.openvla.configuration import hub_options_of
from vlarl_rllib.models.openvla.processing import OpenVLAProcessor, PrismaticImageProcessor, load_tokenizer
from vlarl_rllib.models.openvla_oft.configuration import OpenVLAOFTConfig
from vlarl_rllib.models.openvla_oft.layout import OFTLayout
from vlarl_rllib.models.openvla_oft.proprio import PROPRIO_SIZE, normalize_proprio, proprio_statistics

COLORS = 3


class OpenVLAOFTProcessor(OpenVLAProcessor):
    """Image processor, tokenizer and statistics of one checkpoint; prompts and single frames are as OpenVLA's.

    Attributes:
        layout: says how many cameras there are, and whether the robot's state is looked at.
    """

    def __init__(
        self,
        image_processor: PrismaticImageProcessor,
        tokenizer: PreTrainedTokenizerFast,
        layout: OFTLayout,
        norm_stats: Mapping[str, Any],
    ) -> None:
        """`norm_stats` by data set, of the states."""
        super().__init__(image_processor, tokenizer)
        self.layout, self._norm_stats = layout, norm_stats

    @classmethod
    def from_pretrained(cls, checkpoint: str | Path, **kwargs: Any) -> "OpenVLAOFTProcessor":
        """Read all parts from a directory or Hub id; keywords that are fields of `OFTLayout`, such as `num_images` and
        `proprio`, win over the checkpoint's config. Raises FileNotFoundError where a file is absent."""
        hub_options = hub_options_of(kwargs)
        config = OpenVLAOFTConfig.from_pretrained(checkpoint, **kwargs)
        return cls(
            PrismaticImageProcessor.from_pretrained(checkpoint, **hub_options),
            load_tokenizer(checkpoint, **hub_options),
            config.layout,
            config.norm_stats or {},
        )

    def resize(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The frames of all cameras [H, W, 3 n] uint8 at the model's size: [S, S, 3 n] uint8."""
        cameras = np.split(image, self.layout.num_images, axis=2)
        return np.concatenate([super(OpenVLAOFTProcessor, self).resize(frame) for frame in cameras], axis=2)

    def raw_inputs(
        self, images: Sequence[NDArray[np.uint8]], instructions: Sequence[str], proprio: ArrayLike | None = None
    ) -> dict[str, Tensor]:
        """Inputs with raw frames [H, W, 3 n] uint8, the wrist camera's behind the main one's, which the model
        normalises itself, and with states [B, 8] that are normalised already."""
        cameras = [np.split(image, self.layout.num_images, axis=2) for image in images]
        main, *wrist = zip(*cameras, strict=True)
        inputs = self._inputs(main, instructions, wrist[0] if wrist else None, raw_images=True)
        return dict(inputs) | self._state(proprio)

    def __call__(  # type: ignore[override]
        self,
        images: Sequence[NDArray[np.uint8] | Image.Image],
        instructions: Sequence[str],
        wrist_images: Sequence[NDArray[np.uint8] | Image.Image] | None = None,
        proprio: ArrayLike | None = None,
        unnorm_key: str | None = None,
        raw_images: bool = False,
    ) -> BatchFeature:
        """Model inputs of B observations and their instructions.

        Args:
            images: B frames of the main camera, uint8 [H, W, 3] RGB or PIL.
            instructions: B instructions.
            wrist_images: B frames of the wrist camera, where the layout has two images.
            proprio: raw states [B, 8], where the layout has them; they are normalised here.
            unnorm_key: data set whose statistics normalise the states.
            raw_images: leave pixels raw, for the model to normalise on its own device.

        Returns:
            input_ids [B, L] int64, right-padded; attention_mask [B, L] int64; pixel_values [B, 6 n, S, S] float32, or
            [B, 3 n, S, S] uint8 with `raw_images`; proprio [B, 8] float32 where the layout has it.

        Raises:
            ValueError: counts differ or are zero, a frame is not RGB uint8, frames or states are missing or too many,
                or `unnorm_key` has no statistics of states.
        """
        if proprio is not None:
            proprio = normalize_proprio(proprio, self.proprio_statistics(unnorm_key))
        inputs = self._inputs(images, instructions, wrist_images, raw_images)
        return BatchFeature(dict(inputs) | self._state(proprio))

    def proprio_statistics(self, unnorm_key: str | None) -> dict[str, Any]:
        """Of the states of a data set; None picks the only one. Raises ValueError for an unknown or ambiguous key."""
        only = next(iter(self._norm_stats)) if len(self._norm_stats) == 1 else ""
        return proprio_statistics(self._norm_stats, unnorm_key or only, "norm_stats")

    def _inputs(
        self,
        images: Sequence[NDArray[np.uint8] | Image.Image],
        instructions: Sequence[str],
        wrist_images: Sequence[NDArray[np.uint8] | Image.Image] | None,
        raw_images: bool,
    ) -> BatchFeature:
        inputs = super().__call__(images, instructions, raw_images)
        given = 1 if wrist_images is None else 2
        if given != self.layout.num_images:
            raise ValueError(
                f"{given} image(s) of each observation for a model of {self.layout.num_images}; give wrist_images "
                "exactly where its num_images is 2"
            )
        if wrist_images is not None:
            wrist = super().__call__(wrist_images, instructions, raw_images)["pixel_values"]
            inputs["pixel_values"] = torch.cat([inputs["pixel_values"], wrist], dim=1)
        return inputs

    def _state(self, proprio: ArrayLike | None) -> dict[str, Tensor]:
        """Of normalised states."""
        if (proprio is not None) != self.layout.proprio:
            raise ValueError(
                f"proprio is {'missing' if proprio is None else 'given'}, and the model's layout says proprio="
                f"{self.layout.proprio}; give {PROPRIO_SIZE} numbers of each observation where it is true, else none"
            )
        return {} if proprio is None else {"proprio": torch.as_tensor(np.asarray(proprio, dtype=np.float32))}
