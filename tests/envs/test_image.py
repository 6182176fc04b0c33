"""The observation path against TensorFlow's results, against slow loops, and on pictures whose outcome is known by
hand.
"""

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlarl_rllib.envs.image import (
    _lanczos_filters,
    crop_center,
    jpeg_round_trip,
    lanczos_weights,
    observation_image,
    resize_lanczos,
)


def picture(side: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with some noise, so that JPEG has something to do."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    waves = np.stack([np.sin(7 * x + 3 * y), np.cos(5 * y), np.sin(11 * x * y)], axis=-1)
    return np.clip(128 + 100 * waves + generator.normal(0, 10, (side, side, 3)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def golden(golden_folder: Callable[[str], Path]) -> dict[str, np.ndarray]:
    """One image after every stage, as TensorFlow 2.15 computes it."""
    with np.load(golden_folder("libero_image_path.npz") / "libero_image_path.npz") as arrays:
        return dict(arrays)


def differing(image: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    """(share of values that differ, largest difference)."""
    difference = np.abs(image.astype(int) - expected)
    return float((difference > 0).mean()), int(difference.max())


def test_jpeg_round_trip_is_tensorflows(golden: dict[str, np.ndarray]) -> None:
    np.testing.assert_array_equal(jpeg_round_trip(golden["im"][::-1, ::-1]), golden["j"])


def test_lanczos_is_tensorflows(golden: dict[str, np.ndarray]) -> None:
    share, largest = differing(resize_lanczos(golden["j"], 224), golden["l"])
    assert share <= 2e-5 and largest <= 1


def test_crop_is_tensorflows(golden: dict[str, np.ndarray]) -> None:
    np.testing.assert_array_equal(crop_center(golden["l"]), golden["c"])


def test_whole_path_is_tensorflows(golden: dict[str, np.ndarray]) -> None:
    image = observation_image(golden["im"][::-1, ::-1], center_crop=True, image_size=224)
    share, largest = differing(image, golden["c"])
    assert share <= 2e-5 and largest <= 1


def test_every_stage_is_the_installed_tensorflows(tmp_path: Path) -> None:
    """12 pictures; 60 had 61 of 9.0 M subpixels one level apart."""
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("tensorflow is not installed; it is in the `data` extra")
    frames = np.stack([image for seed in range(4) for image in some_pictures(256, seed)])
    np.save(tmp_path / "raw.npy", frames)
    program = Path(__file__).with_name("tensorflow_reference.py")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run([sys.executable, program, tmp_path / "raw.npy", tmp_path / "out.npz"], check=True, env=environment)
    with np.load(tmp_path / "out.npz") as stages:
        expected = dict(stages)
    compressed = np.stack([jpeg_round_trip(raw) for raw in frames])
    np.testing.assert_array_equal(compressed, expected["compressed"])
    resized = np.stack([resize_lanczos(image, 224) for image in compressed])
    cropped = np.stack([observation_image(raw, center_crop=True, image_size=224) for raw in frames])
    for image, stage in ((resized, "resized"), (cropped, "cropped")):
        share, largest = differing(image, expected[stage])
        assert share <= 2e-5 and largest <= 1
    np.testing.assert_array_equal(np.stack([crop_center(image) for image in expected["resized"]]), expected["cropped"])


def slow_lanczos_weights(source: int, target: int) -> np.ndarray:
    """The filter's definition, tap by tap in double precision."""
    weights = np.zeros((target, source))
    step = source / target
    width = max(step, 1.0)
    for x in range(target):
        center = (x + 0.5) * step
        for tap in range(source):
            t = (tap + 0.5 - center) / width
            if abs(t) < 3.0:
                weights[x, tap] = (
                    1.0 if t == 0 else math.sin(math.pi * t) * math.sin(math.pi * t / 3) * 3 / (math.pi * t) ** 2
                )
        weights[x] /= weights[x].sum()
    return weights


@pytest.mark.parametrize(("source", "target"), [(256, 224), (224, 224), (96, 224), (128, 50)])
def test_lanczos_weights_follow_the_definition(source: int, target: int) -> None:
    np.testing.assert_allclose(lanczos_weights(source, target), slow_lanczos_weights(source, target), atol=3e-5)


@pytest.mark.parametrize(("source", "target"), [(256, 224), (96, 224), (128, 50), (101, 224)])
def test_filters_hold_all_of_the_weights(source: int, target: int) -> None:
    first, weights = _lanczos_filters(source, target)
    dense = np.zeros((target, source), np.float32)
    for row, (start, taps) in enumerate(zip(first, weights, strict=True)):
        dense[row, start : start + len(taps)] = taps
    np.testing.assert_array_equal(dense, lanczos_weights(source, target))


def some_pictures(side: int, seed: int) -> list[np.ndarray]:
    """A smooth picture, noise, and flat blocks with sharp edges."""
    generator = np.random.default_rng(seed)
    noise = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
    blocks = np.kron(noise[: side // 16, : side // 16], np.ones((16, 16, 1), np.uint8))
    return [picture(side, seed), noise, blocks]


def resample_slowly(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """First axis of [H, W, 3], one tap after the other in float32."""
    total = np.zeros((len(weights), *values.shape[1:]), np.float32)
    for tap in range(len(values)):
        total += weights[:, tap, None, None] * values[tap].astype(np.float32)
    return total


@pytest.mark.parametrize(("source", "target"), [(256, 224), (128, 224), (224, 64)])
def test_resize_is_the_sum_in_order_to_the_last_bit(source: int, target: int) -> None:
    weights = lanczos_weights(source, target)
    for image in some_pictures(source, seed=3):
        columns = resample_slowly(image, weights).swapaxes(0, 1)
        expected = np.clip(np.rint(resample_slowly(columns, weights).swapaxes(0, 1)), 0, 255)
        np.testing.assert_array_equal(resize_lanczos(image, target), expected)


@pytest.mark.parametrize("shape", [(256, 128), (128, 256)])
def test_resize_of_another_aspect_stretches_each_axis(shape: tuple[int, int]) -> None:
    image = picture(256)[: shape[0], : shape[1]]
    tall, wide = (lanczos_weights(size, 64) for size in shape)
    columns = resample_slowly(image, tall).swapaxes(0, 1)
    expected = np.clip(np.rint(resample_slowly(columns, wide).swapaxes(0, 1)), 0, 255)
    np.testing.assert_array_equal(resize_lanczos(image, 64), expected)


def test_resize_is_close_to_double_precision() -> None:
    # 60 pictures had at most 5 of 150,528 subpixels on the other side of a half.
    weights = lanczos_weights(256, 224).astype(float)
    for seed in range(4):
        for image in some_pictures(256, seed):
            exact = np.einsum("yi,ijc,xj->yxc", weights, image.astype(float), weights, optimize=True)
            share, largest = differing(resize_lanczos(image, 224), np.clip(np.rint(exact), 0, 255))
            assert share <= 1e-4 and largest <= 1


def test_resize_to_the_same_size_changes_nothing() -> None:
    image = picture(224)
    np.testing.assert_array_equal(resize_lanczos(image, 224), image)


def test_crop_interpolates_between_the_four_neighbours() -> None:
    image = picture(224)
    cropped = crop_center(image)
    side = math.sqrt(0.9)
    for row, column in [(0, 0), (0, 223), (223, 0), (111, 112), (17, 200), (180, 3)]:
        y, x = ((1 - side) / 2 * 223 + index * side for index in (row, column))
        top, left = int(y), int(x)
        corners = image[top : top + 2, left : left + 2].astype(float) / 255
        along_x = corners[:, 0] + (corners[:, 1] - corners[:, 0]) * (x - left)
        value = along_x[0] + (along_x[1] - along_x[0]) * (y - top)
        assert np.abs(cropped[row, column] - np.floor(value * 255.5)).max() <= 1


def test_crop_is_the_formula_to_the_last_bit() -> None:
    """Columns first, then rows, in float32: a + (b - a) * fraction."""
    one, side = np.float32(1), np.sqrt(np.float32(0.9))
    start = (one - side) / np.float32(2)
    positions = start * np.float32(223) + np.arange(224, dtype=np.float32) * (
        (start + side - start) * np.float32(223) / np.float32(223)
    )
    low, high = np.floor(positions).astype(int), np.ceil(positions).astype(int)
    fraction = positions - np.floor(positions)
    for image in [image for seed in range(5) for image in some_pictures(224, seed)]:
        scaled = image * np.float32(1 / 255)
        across = scaled[:, low] + (scaled[:, high] - scaled[:, low]) * fraction[:, None]
        values = across[low] + (across[high] - across[low]) * fraction[:, None, None]
        expected = np.floor(np.clip(values, 0, 1) * np.float32(255.5)).astype(np.uint8)
        np.testing.assert_array_equal(crop_center(image), expected)


@pytest.mark.parametrize("side", [256, 128])
def test_the_path_is_its_stages_one_after_the_other(side: int) -> None:
    for raw in some_pictures(side, seed=9):
        resized = resize_lanczos(jpeg_round_trip(raw), 224)
        np.testing.assert_array_equal(observation_image(raw, center_crop=False, image_size=224), resized)
        np.testing.assert_array_equal(observation_image(raw, center_crop=True, image_size=224), crop_center(resized))


def test_crop_removes_the_border() -> None:
    # The box begins (1 - sqrt(0.9)) / 2 * 223 = 5.72 pixels inside: rows and columns 0 to 4 have no influence.
    image = np.full((224, 224, 3), 200, np.uint8)
    image[:5] = image[-5:] = image[:, :5] = image[:, -5:] = 0
    assert (crop_center(image) == 200).all()


def test_frame_is_turned_by_180_degrees() -> None:
    raw = np.zeros((256, 256, 3), np.uint8)
    raw[:128, :128] = 255  # OpenGL's lower left, so the lower right of the policy's image, which is mirrored
    image = observation_image(raw, center_crop=False, image_size=224)
    assert image[130:200, 130:200].mean() > 250
    assert max(image[20:90, 20:200].mean(), image[130:200, 20:90].mean()) < 5


def test_even_grey_stays_as_it_is() -> None:
    raw = np.full((256, 256, 3), 128, np.uint8)
    assert (observation_image(raw, center_crop=True, image_size=224) == 128).all()


def test_other_sizes_get_one_bicubic_resize() -> None:
    raw = picture(256)
    full = observation_image(raw, center_crop=True, image_size=224)
    small = observation_image(raw, center_crop=True, image_size=56)
    np.testing.assert_array_equal(small, np.asarray(Image.fromarray(full).resize((56, 56), Image.Resampling.BICUBIC)))


def test_earlier_images_are_not_overwritten() -> None:
    first = observation_image(picture(256, seed=1), center_crop=True, image_size=224)
    kept = first.copy()
    observation_image(picture(256, seed=2), center_crop=True, image_size=224)
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize(
    "raw", [np.zeros((256, 200, 3), np.uint8), np.zeros((256, 256), np.uint8), np.zeros((8, 8, 3))]
)
def test_other_arrays_are_refused(raw: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"square \[H, H, 3\] uint8"):
        observation_image(raw, center_crop=True, image_size=224)
