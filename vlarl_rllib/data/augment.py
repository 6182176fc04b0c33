"""Image augmentation of OpenVLA's fine-tuning, in torch on whole batches, on whatever device they are.

Five operations in a fixed order, each with numbers of its own for every image; between two of them values are clipped
to [0, 1] (openvla/openvla, `image_augment_kwargs` of its RLDS pipeline, which uses TensorFlow's operations). B = batch,
S = side in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CROP_AREA = 0.9
"""Share of the area that a crop keeps; its side is sqrt(0.9)."""
MAX_BRIGHTNESS, MAX_HUE = 0.2, 0.05
CONTRAST = SATURATION = (0.8, 1.2)


@dataclass(frozen=True)
class AugmentationDraw:
    """What is drawn for each image, all [B] float32."""

    offset: Tensor
    """In [0, 1]: of the crop along both axes.

    Upstream draws them from equal seeds, so its crops lie on the diagonal.
    """
    brightness: Tensor
    """Added."""
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    """Turns of the colour circle."""

    def to(self, device: torch.device) -> AugmentationDraw:
        """On a GPU all in one copy, for which nobody waits."""
        if device.type == "cpu":
            return self
        drawn = torch.stack([self.offset, self.brightness, self.contrast, self.saturation, self.hue])
        return AugmentationDraw(*drawn.pin_memory().to(device, non_blocking=True))


def draw(batch: int, generator: torch.Generator) -> AugmentationDraw:
    """Independent draws for `batch` images; `generator` is the CPU's."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(batch, generator=generator) * (high - low) + low

    return AugmentationDraw(
        offset=uniform(0.0, 1.0),
        brightness=uniform(-MAX_BRIGHTNESS, MAX_BRIGHTNESS),
        contrast=uniform(*CONTRAST),
        saturation=uniform(*SATURATION),
        hue=uniform(-MAX_HUE, MAX_HUE),
    )


def augment(images: Tensor, chosen: AugmentationDraw) -> Tensor:
    """[B, 3, S, S] uint8 RGB -> the same, augmented."""
    drawn = chosen.to(images.device)
    pixels = crop(images.float() / 255.0, drawn.offset).clamp(0.0, 1.0)
    pixels = (pixels + drawn.brightness[:, None, None, None]).clamp(0.0, 1.0)
    pixels = adjust_contrast(pixels, drawn.contrast[:, None, None, None]).clamp(0.0, 1.0)
    hue, saturation, value = to_hsv(pixels)
    pixels = to_rgb(hue, (saturation * drawn.saturation[:, None, None]).clamp(0.0, 1.0), value).clamp(0.0, 1.0)
    hue, saturation, value = to_hsv(pixels)
    pixels = to_rgb((hue + drawn.hue[:, None, None]) % 1.0, saturation, value).clamp(0.0, 1.0)
    return (pixels * 255.5).to(torch.uint8)  # `tf.image.convert_image_dtype`


def crop(pixels: Tensor, offset: Tensor) -> Tensor:
    """Cut out a square of `CROP_AREA` at `offset` of the room there is, and stretch it back, bilinear
    (`tf.image.crop_and_resize`)."""
    side = CROP_AREA**0.5
    start = offset * (1.0 - side)
    steps = torch.linspace(0.0, 1.0, pixels.shape[-1], device=pixels.device)
    position = 2.0 * (start[:, None] + steps * side) - 1.0  # [B, S]; -1 and 1 are the centres of the outermost pixels
    rows, columns = position[:, :, None].expand(-1, -1, len(steps)), position[:, None, :].expand(-1, len(steps), -1)
    return F.grid_sample(pixels, torch.stack([columns, rows], dim=-1), mode="bilinear", align_corners=True)


def adjust_contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    """Away from, or towards, each channel's mean."""
    mean = pixels.mean((-2, -1), keepdim=True)
    return (pixels - mean) * factor + mean


def to_hsv(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, 3, S, S] RGB -> hue, saturation, value, each [B, S, S] in [0, 1]."""
    red, green, blue = pixels.unbind(1)
    value, spread = pixels.amax(1), pixels.amax(1) - pixels.amin(1)
    safe = torch.where(spread > 0, spread, 1.0)
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2.0, (red - green) / safe + 4.0),
    )
    hue = torch.where(spread > 0, (sector / 6.0) % 1.0, 0.0)
    return hue, torch.where(value > 0, spread / torch.where(value > 0, value, 1.0), 0.0), value


def to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Inverse of `to_hsv`."""
    turns = torch.stack([hue * 6.0 + shift for shift in (5.0, 3.0, 1.0)], dim=1) % 6.0
    weight = torch.minimum(turns, 4.0 - turns).clamp(0.0, 1.0)
    return value[:, None] - (value * saturation)[:, None] * weight
