"""Augmentation against TensorFlow's own operations, and by hand."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vlarl_rllib.data.augment import AugmentationDraw, adjust_contrast, augment, crop, draw, to_hsv, to_rgb

SIDE = 24
REFERENCE = """
import os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import numpy as np, tensorflow as tf
given = dict(np.load(sys.argv[1]))
images, out = [], {}
for i, raw in enumerate(given["images"]):
    x = tf.convert_to_tensor(raw.astype(np.float32) / 255.0)
    side = np.float32(0.9 ** 0.5)
    start = given["offset"][i] * (1 - side)
    box = [[start, start, start + side, start + side]]
    x = tf.clip_by_value(tf.image.crop_and_resize(x[None], box, [0], x.shape[:2])[0], 0, 1)
    x = tf.clip_by_value(x + given["brightness"][i], 0, 1)
    x = tf.clip_by_value(tf.image.adjust_contrast(x, given["contrast"][i]), 0, 1)
    x = tf.clip_by_value(tf.image.adjust_saturation(x, given["saturation"][i]), 0, 1)
    x = tf.clip_by_value(tf.image.adjust_hue(x, given["hue"][i]), 0, 1)
    images.append(tf.image.convert_image_dtype(x, tf.uint8).numpy())
np.save(sys.argv[2], np.stack(images))
"""


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def test_the_whole_is_tensorflows(tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("the comparison needs the `data` extra")
    images, chosen = pictures(8), draw(8, torch.Generator().manual_seed(0))
    np.savez(tmp_path / "given.npz", images=images, **{name: value.numpy() for name, value in vars(chosen).items()})
    command = [sys.executable, "-c", REFERENCE, str(tmp_path / "given.npz"), str(tmp_path / "expected.npy")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = augment(torch.from_numpy(images).permute(0, 3, 1, 2), chosen).permute(0, 2, 3, 1).numpy()
    difference = np.abs(ours.astype(int) - np.load(tmp_path / "expected.npy"))
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_nothing_drawn_changes_nothing_but_the_crop() -> None:
    grey = torch.full((2, 3, SIDE, SIDE), 100, dtype=torch.uint8)
    zero, one = torch.zeros(2), torch.ones(2)
    assert torch.equal(augment(grey, AugmentationDraw(zero, zero, one, one, zero)), grey)


def test_a_crop_at_0_begins_in_the_corner_and_one_at_1_ends_in_it() -> None:
    ramp = torch.linspace(0.0, 1.0, SIDE).expand(1, 3, SIDE, SIDE)
    first, last = crop(ramp, torch.tensor([0.0])), crop(ramp, torch.tensor([1.0]))
    assert first[0, 0, 0, 0] == pytest.approx(0.0, abs=1e-6) and first[0, 0, 0, -1] == pytest.approx(0.9**0.5, abs=1e-5)
    assert last[0, 0, 0, 0] == pytest.approx(1 - 0.9**0.5, abs=1e-5) and last[0, 0, 0, -1] == pytest.approx(
        1.0, abs=1e-5
    )


def test_colours_by_hand() -> None:
    # Red, a half-saturated green, blue, grey.
    pixels = torch.tensor([[1.0, 0.0, 0.0], [0.25, 0.5, 0.25], [0.0, 0.0, 0.8], [0.4, 0.4, 0.4]]).T[None, :, :, None]
    hue, saturation, value = to_hsv(pixels)
    assert hue.flatten().tolist() == pytest.approx([0.0, 1 / 3, 2 / 3, 0.0])
    assert saturation.flatten().tolist() == pytest.approx([1.0, 0.5, 1.0, 0.0])
    assert value.flatten().tolist() == pytest.approx([1.0, 0.5, 0.8, 0.4])
    torch.testing.assert_close(to_rgb(hue, saturation, value), pixels)
    two = torch.tensor([0.2, 0.6]).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    assert adjust_contrast(two, torch.tensor(0.5)).flatten()[:2].tolist() == pytest.approx(
        [0.3, 0.5]
    )  # the mean is 0.4


def test_draws_are_within_their_bounds_and_repeat() -> None:
    chosen, again = (draw(1000, torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(vars(chosen).values(), vars(again).values(), strict=True))
    bounds = {
        "offset": (0, 1),
        "brightness": (-0.2, 0.2),
        "contrast": (0.8, 1.2),
        "saturation": (0.8, 1.2),
        "hue": (-0.05, 0.05),
    }
    for name, (low, high) in bounds.items():
        values = getattr(chosen, name)
        assert low <= values.min() < low + 0.05 * (high - low) and high - 0.05 * (high - low) < values.max() <= high
