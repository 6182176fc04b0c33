"""OpenVLA's observation path for LIBERO without TensorFlow: from the rendered frame to the image that the policy sees.

The published OpenVLA LIBERO evaluation (openvla/openvla, `experiments/robot/{libero,}/*_utils.py`) sends every frame
through TensorFlow: rotate by 180 degrees, JPEG round trip (the training data were stored as JPEG), Lanczos-3 resize to
224, centre crop of 90 % of the area. A checkpoint scores what it was published with only on images made the same way,
so each stage below follows TensorFlow's arithmetic in float32: over 9.0 M subpixels the whole path differs from
TensorFlow 2.21 in 61, each by one level.

Letters: H = side of the raw square image, S = side of the policy's image, both in pixels.
"""

from __future__ import annotations

import io
import threading
from functools import lru_cache

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
    compressed = jpeg_round_trip(raw)
    image = (
        _crop_by_column(_resize_by_column(compressed, RESIZED_SIDE))
        if center_crop
        else resize_lanczos(compressed, RESIZED_SIDE)
    )
    if image_size != RESIZED_SIDE:
        resized = Image.fromarray(image).resize((image_size, image_size), Image.Resampling.BICUBIC)
        image = np.array(resized, dtype=np.uint8)
    return image


def describe_path(image_size: int, *, center_crop: bool) -> str:
    """What `observation_image` does, in words."""
    steps = [
        "turned by 180 degrees",
        f"JPEG round trip as TensorFlow's (quality {JPEG_QUALITY})",
        f"Lanczos-3 to {RESIZED_SIDE} x {RESIZED_SIDE}",
        f"central {100 * CROP_AREA:g} % of the area" if center_crop else "no crop",
    ]
    if image_size != RESIZED_SIDE:
        steps.append(f"bicubic to {image_size} x {image_size}")
    return ", ".join(steps)


def jpeg_round_trip(raw: np.ndarray) -> np.ndarray:
    """Rotate [H, H, 3] uint8 by 180 degrees, then encode and decode it exactly as TensorFlow does.

    The rotation makes robosuite's frame upright, and mirrored left to right as OpenVLA's LIBERO training images are.
    TensorFlow encodes with the accurate DCT, which is Pillow's, and decodes with the fast integer DCT and smooth chroma
    upsampling, which Pillow cannot select: decoding with Pillow instead changes most subpixels, some by more than ten
    levels.
    """
    buffer = io.BytesIO()
    Image.fromarray(raw).transpose(Image.Transpose.ROTATE_180).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return simplejpeg.decode_jpeg(buffer.getvalue(), colorspace="RGB", fastdct=True, fastupsample=False)


def resize_lanczos(image: np.ndarray, side: int) -> np.ndarray:
    """Resize [H, W, 3] uint8 to [side, side, 3] uint8, whatever the aspect, like `tf.image.resize(..., "lanczos3",
    antialias=True)`.

    Separable: all rows, then all columns, in float32 without rounding in between; at the end round half to even and
    clip.
    """
    from vlarl_rllib.envs.image_kernels import transpose_pixels

    resized = np.empty((side, side, 3), dtype=np.uint8)
    transpose_pixels(_resize_by_column(image, side), resized)
    return resized


def crop_center(image: np.ndarray) -> np.ndarray:
    """Crop the central 90 % of the area of square [H, H, 3] uint8 and stretch it back to [H, H, 3] uint8.

    `tf.image.crop_and_resize` on values in [0, 1]: bilinear, corners aligned with the crop box of side sqrt(0.9). The
    conversion back is floor(x * 255.5), which is `tf.image.convert_image_dtype(..., tf.uint8)`.
    """
    from vlarl_rllib.envs.image_kernels import transpose_pixels

    levels = _scratch("levels", image.shape)
    transpose_pixels(np.ascontiguousarray(image), levels)
    return _crop_by_column(levels)


def _resize_by_column(image: np.ndarray, side: int) -> np.ndarray:
    """`resize_lanczos` as float32 scratch [side, side, 3] of whole numbers, indexed by column, row, channel.

    Both passes then run along contiguous memory, and so does the first one of `_crop_by_column`.
    """
    from vlarl_rllib.envs.image_kernels import resample_rows, transpose_pixels

    height, width = image.shape[:2]
    rows, columns = _scratch("rows", (side, width, 3)), _scratch("columns", (width, side, 3))
    levels = _scratch("levels", (side, side, 3))
    resample_rows(
        np.ascontiguousarray(image).reshape(height, -1), *_lanczos_filters(height, side), rows.reshape(side, -1)
    )
    transpose_pixels(rows, columns)
    resample_rows(columns.reshape(width, -1), *_lanczos_filters(width, side), levels.reshape(side, -1))
    np.rint(levels, out=levels)
    return np.clip(levels, 0.0, 255.0, out=levels)


def _crop_by_column(levels: np.ndarray) -> np.ndarray:
    """`crop_center` of whole numbers [S, S, 3] float32 indexed by column, row, channel; they are overwritten."""
    from vlarl_rllib.envs.image_kernels import interpolate_rows, transpose_pixels

    side = len(levels)
    positions = _crop_positions(side)
    columns, rows = _scratch("cropped_columns", levels.shape), _scratch("cropped_rows", levels.shape)
    levels *= np.float32(1.0 / 255.0)
    interpolate_rows(levels.reshape(side, -1), *positions, columns.reshape(side, -1))
    transpose_pixels(columns, rows)
    cropped = levels  # its memory is free now
    interpolate_rows(rows.reshape(side, -1), *positions, cropped.reshape(side, -1))
    np.clip(cropped, 0.0, 1.0, out=cropped)
    cropped *= np.float32(255.5)
    return cropped.astype(np.uint8)


def _scratch(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 array of this thread, kept for the next call of this shape.

    Fresh arrays of this size come from the operating system page by page, which took longer than the arithmetic on
    them.
    """
    array: np.ndarray | None = getattr(_THREAD, name, None)
    if array is None or array.shape != shape:
        array = np.empty(shape, dtype=np.float32)
        setattr(_THREAD, name, array)
    return array


@lru_cache(maxsize=8)
def _lanczos_filters(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """The non-zero part of `lanczos_weights`: ([target] int64 first source pixel, [target, taps] float32 weights)."""
    weights = lanczos_weights(source, target)
    used = weights != 0.0
    first, last = used.argmax(axis=1), source - 1 - used[:, ::-1].argmax(axis=1)
    num_taps = int((last - first).max()) + 1
    first = np.minimum(first, source - num_taps)
    return first, np.take_along_axis(weights, first[:, None] + np.arange(num_taps), axis=1)


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


@lru_cache(maxsize=8)
def _crop_positions(side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each output entry of an axis lies, in TensorFlow's float32 arithmetic.

    Returns [side] int64 source entry below and [side] int64 above it, and [side] float32 how far it is between them.
    """
    box = np.sqrt(np.float32(CROP_AREA))
    start = np.float32((np.float32(1.0) - box) / np.float32(2.0))
    end = np.float32(start + box)
    scale = np.float32((end - start) * np.float32(side - 1) / np.float32(side - 1))
    positions = start * np.float32(side - 1) + np.arange(side, dtype=np.float32) * scale
    low, high = np.floor(positions), np.ceil(positions)
    return low.astype(np.int64), high.astype(np.int64), (positions - low).astype(np.float32)
