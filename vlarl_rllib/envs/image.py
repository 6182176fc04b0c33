"""OpenVLA's observation path for LIBERO without TensorFlow: from the rendered frame to the image that the policy sees.

The published OpenVLA LIBERO evaluation (openvla/openvla, `experiments/robot/{libero,}/*_utils.py`) sends every frame
through TensorFlow: rotate by 180 degrees, JPEG round trip (the training data were stored as JPEG), Lanczos-3 resize to
224, centre crop of 90 % of the area. A checkpoint scores what it was published with only on images made the same way,
so each stage below follows TensorFlow's arithmetic in float32: over 6.0 M subpixels the whole path differs from
TensorFlow 2.15 in 82, each by one level.

Letters: H = side of the raw square image, S = side of the policy's image, both in pixels.
"""

from __future__ import annotations

import io
import math
import threading
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

RESIZED_SIDE = 224
"""Side after the Lanczos resize, in pixels (`resize_image(img, (224, 224))` in OpenVLA's LIBERO evaluation)."""
JPEG_QUALITY = 95
"""Default quality of `tf.io.encode_jpeg`; its chroma subsampling (4:2:0) is Pillow's default too."""
CROP_AREA = 0.9
"""Share of the area that the centre crop keeps: OpenVLA is trained on random crops of this scale."""
LANCZOS_RADIUS = 3.0

_THREAD = threading.local()


def observation_image(raw: np.ndarray, *, center_crop: bool, image_size: int) -> np.ndarray:
    """Turn a rendered frame into the policy's image.

    Args:
        raw: [H, H, 3] uint8 RGB as robosuite renders it (rows run from bottom to top). OpenVLA's evaluation uses H =
            256.
        center_crop: take the central 90 % of the area, as for every OpenVLA checkpoint trained with image augmentation.
        image_size: S. Other sizes than 224 get one more bicubic resize, the one that the policy's image processor would
            do.

    Returns:
        [S, S, 3] uint8 RGB, contiguous.

    Raises:
        ValueError: `raw` is not a square uint8 RGB image.
    """
    if raw.ndim != 3 or raw.shape[0] != raw.shape[1] or raw.shape[2] != 3 or raw.dtype != np.uint8:
        raise ValueError(f"raw is {raw.dtype} {raw.shape}; the observation path takes a square [H, H, 3] uint8 image")
    image = resize_lanczos(jpeg_round_trip(raw), RESIZED_SIDE)
    if center_crop:
        image = crop_center(image)
    if image_size != RESIZED_SIDE:
        resized = Image.fromarray(image).resize((image_size, image_size), Image.Resampling.BICUBIC)
        image = np.array(resized, dtype=np.uint8)
    return image


def jpeg_round_trip(raw: np.ndarray) -> np.ndarray:
    """Rotate [H, H, 3] uint8 by 180 degrees, then encode and decode it exactly as TensorFlow does.

    The rotation makes robosuite's frame upright, and mirrored left to right as OpenVLA's LIBERO training images are.
    TensorFlow encodes with the accurate DCT, which is Pillow's, and decodes with the fast integer DCT and smooth chroma
    upsampling, which Pillow cannot
    select: decoding with Pillow instead changes most subpixels, some by more than ten levels.
    """
    buffer = io.BytesIO()
    Image.fromarray(raw).transpose(Image.Transpose.ROTATE_180).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return simplejpeg.decode_jpeg(buffer.getvalue(), colorspace="RGB", fastdct=True, fastupsample=False)


def resize_lanczos(image: np.ndarray, side: int) -> np.ndarray:
    """Resize square [H, H, 3] uint8 to [side, side, 3] uint8 like `tf.image.resize(..., "lanczos3", antialias=True)`.

    Separable: all rows, then all columns, in float32 without rounding in between; at the end round half to even and
        clip.
    """
    source = len(image)
    rows = _resample_first_axis("rows", image.reshape(source, -1), side)
    by_column = _scratch("by_column", (source, side, 3))
    _transpose_pixels(rows.reshape(side, source, 3), out=by_column)
    values = _resample_first_axis("columns", by_column.reshape(source, -1), side)
    np.rint(values, out=values)
    np.clip(values, 0.0, 255.0, out=values)
    resized = np.empty((side, side, 3), dtype=np.uint8)
    _transpose_pixels(values.astype(np.uint8).reshape(side, side, 3), out=resized)
    return resized


def _transpose_pixels(image: np.ndarray, out: np.ndarray) -> None:
    """Write contiguous [A, B, 3] into contiguous [B, A, 3]; a pixel moves as one opaque item, twice as fast."""
    pixel = np.dtype((np.void, 3 * image.itemsize))
    np.copyto(out.view(pixel)[..., 0], image.view(pixel)[..., 0].T)


def _resample_first_axis(name: str, values: np.ndarray, target: int) -> np.ndarray:
    """[source, N] -> [target, N] float32 scratch: the product with `lanczos_weights`, block by block."""
    blocks, padding = _lanczos_blocks(len(values), target)
    num_blocks, num_rows, num_taps = blocks.shape
    stride = len(values) // num_blocks
    padded = _scratch(name + "_padded", ((num_blocks - 1) * stride + num_taps, values.shape[1]))
    padded[padding : padding + len(values)] = values
    windows = np.lib.stride_tricks.sliding_window_view(padded, num_taps, axis=0)[::stride].swapaxes(1, 2)
    out = _scratch(name, (num_blocks, num_rows, values.shape[1]))
    return np.matmul(blocks, windows, out=out).reshape(target, -1)


def _scratch(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 array of this thread, zero when new and kept for the next call of this shape.

    Fresh arrays of this size come from the operating system page by page, which took longer than the arithmetic on
    them.
    """
    array: np.ndarray | None = getattr(_THREAD, name, None)
    if array is None or array.shape != shape:
        array = np.zeros(shape, dtype=np.float32)
        setattr(_THREAD, name, array)
    return array


@lru_cache(maxsize=8)
def _lanczos_blocks(source: int, target: int) -> tuple[np.ndarray, int]:
    """The non-zero part of `lanczos_weights` as equal blocks: ([B, target / B, taps] float32, zero rows to put before
    the input).

    B = gcd(source, target): every block reads a window that starts source / B pixels after the one before (for 256 ->
    224, 32 blocks of 7 outputs from 15 inputs each, a tenth of the work of the dense product).
    """
    weights = lanczos_weights(source, target)
    num_blocks = math.gcd(source, target)
    rows, stride = target // num_blocks, source // num_blocks
    reach = math.ceil(LANCZOS_RADIUS * max(source / target, 1.0))
    num_taps = stride + 2 * reach
    padded = np.pad(weights, ((0, 0), (reach, reach)))
    blocks = [padded[b * rows : (b + 1) * rows, b * stride : b * stride + num_taps] for b in range(num_blocks)]
    return np.ascontiguousarray(np.stack(blocks)), reach


@lru_cache(maxsize=8)
def lanczos_weights(source: int, target: int) -> np.ndarray:
    """[target, source] float32 matrix of the Lanczos-3 filter with antialiasing (TensorFlow's `ScaleAndTranslate`
    kernel).

    Output pixel x is centred on `(x + 0.5) * source / target`; when it shrinks, the filter is widened by that factor.
    Taps outside the image are dropped and the others normalised to sum 1. Every step is float32, as in TensorFlow:
    float64 moves ten times more pixels.
    """
    half, radius = np.float32(0.5), np.float32(LANCZOS_RADIUS)
    step = np.float32(source / target)
    width = max(step, np.float32(1.0))
    centers = ((np.arange(target, dtype=np.float32) + half) * step)[:, None]
    taps = np.arange(source, dtype=np.float32)[None, :]
    inside = (taps >= np.ceil(centers - radius * width - half)) & (taps <= np.floor(centers + radius * width - half))
    distance = (taps + half - centers) * (np.float32(1.0) / width)
    weights = np.where(inside, lanczos_kernel(distance), np.float32(0.0))
    return weights * (np.float32(1.0) / weights.sum(axis=1, keepdims=True))


def lanczos_kernel(x: np.ndarray) -> np.ndarray:
    """Lanczos window of radius 3 at float32 distances `x`: 1 up to 1e-3, as in TensorFlow, and 0 beyond 3."""
    pi, radius = np.float32(np.pi), np.float32(LANCZOS_RADIUS)
    distance = np.abs(x)
    near = distance <= np.float32(1e-3)
    safe = np.where(near, np.float32(1.0), distance)
    value = radius * np.sin(pi * safe) * np.sin(pi * safe / radius) / (pi * pi * safe * safe)
    return np.where(distance > radius, np.float32(0.0), np.where(near, np.float32(1.0), value))


def crop_center(image: np.ndarray) -> np.ndarray:
    """Crop the central 90 % of the area of square [H, H, 3] uint8 and stretch it back to [H, H, 3] uint8.

    `tf.image.crop_and_resize` on values in [0, 1]: bilinear, corners aligned with the crop box of side sqrt(0.9). The
    conversion back is floor(x * 255.5), which is `tf.image.convert_image_dtype(..., tf.uint8)`.
    """
    side = len(image)
    rows, columns = _crop_positions(side)
    pixels = _scratch("pixels", (side, side * 3))
    np.multiply(image.reshape(side, -1), np.float32(1.0 / 255.0), out=pixels)
    cropped = _interpolate("crop_rows", _interpolate("crop_columns", pixels, columns, axis=1), rows, axis=0)
    np.clip(cropped, 0.0, 1.0, out=cropped)
    cropped *= np.float32(255.5)
    return cropped.astype(np.uint8).reshape(side, side, 3)


class _Positions(NamedTuple):
    """Where each output entry of an axis comes from: `fraction` of the way from source entry `low` to `high`."""

    low: np.ndarray
    high: np.ndarray
    fraction: np.ndarray
    """Float32, shaped to broadcast along the axis."""


def _interpolate(name: str, values: np.ndarray, positions: _Positions, axis: int) -> np.ndarray:
    """Linear interpolation of 2-D `values` along `axis`: a + (b - a) * fraction, in that order."""
    start, end = _scratch(name + "_start", values.shape), _scratch(name, values.shape)
    np.take(values, positions.low, axis=axis, out=start, mode="clip")
    np.take(values, positions.high, axis=axis, out=end, mode="clip")
    end -= start
    end *= positions.fraction
    end += start
    return end


@lru_cache(maxsize=8)
def _crop_positions(side: int) -> tuple[_Positions, _Positions]:
    """The crop's positions along both axes of a [side, side * 3] image, in TensorFlow's float32 arithmetic."""
    box = np.sqrt(np.float32(CROP_AREA))
    start = np.float32((np.float32(1.0) - box) / np.float32(2.0))
    end = np.float32(start + box)
    scale = np.float32((end - start) * np.float32(side - 1) / np.float32(side - 1))
    positions = start * np.float32(side - 1) + np.arange(side, dtype=np.float32) * scale
    low, high = np.floor(positions).astype(np.int64), np.ceil(positions).astype(np.int64)
    fraction = (positions - np.floor(positions)).astype(np.float32)
    channels = np.arange(3)
    rows = _Positions(low, high, fraction[:, None])
    columns = _Positions((low[:, None] * 3 + channels).ravel(), (high[:, None] * 3 + channels).ravel(), np.repeat(fraction, 3)[None, :])
    return rows, columns
