"""What an RLDS data set holds, checked as it is read, and frames in the three forms that data sets keep them in: JPEG,
PNG and raw.

T = steps of an episode, H, W = size of a stored frame.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
"""First bytes of a file."""
AGAIN = "write the data set again"
StoredFrame = bytes | np.ndarray


def checked_episode(stored: dict[str, Any], where: str, size: tuple[int, int] | None) -> dict[str, Any]:
    """An episode as TensorFlow Datasets gives it, with its actions in float32 and its instruction as text.

    Args:
        stored: `image`, `action` and `instruction`.
        where: file and number of the episode, for errors.
        size: of the frames before it; None = of any size.

    Raises:
        ValueError: in one line, what was found and what was expected.
    """
    images, actions = stored["image"], np.asarray(stored["action"])
    if actions.shape != (len(images), 7) or actions.dtype.kind != "f":
        raise ValueError(
            f"{where}: steps/action is {actions.dtype} {list(actions.shape)}, must be float [{len(images)}, 7]; {AGAIN}"
        )
    if not len(images):
        raise ValueError(f"{where} has no steps, must have at least 1; {AGAIN} without that episode")
    with np.errstate(over="ignore"):  # what is too large for float32 is infinite then
        actions = actions.astype(np.float32)
    if not np.isfinite(actions).all():
        step, number = np.argwhere(~np.isfinite(actions))[0]
        found = actions[step, number]
        raise ValueError(
            f"{where}: steps/action of step {step} is {found} at number {number}, must be finite; {AGAIN} "
            "without that episode"
        )
    for step, image in enumerate(images):
        found_size = _checked_size(image, f"{where}: steps/observation/image of step {step}")
        size = size or found_size
        if found_size != size:
            found, expected = (" x ".join(map(str, sides)) for sides in (found_size, size))
            raise ValueError(
                f"{where}: steps/observation/image of step {step} is {found} pixels, must be {expected} as those "
                f"before; {AGAIN}"
            )
    return {"image": images, "action": actions, "instruction": _text(stored["instruction"], where)}


def frame_size(frame: StoredFrame) -> tuple[int, int]:
    """(H, W), from the file's first bytes. Raises ValueError for what is no frame."""
    if isinstance(frame, np.ndarray):
        return frame.shape[0], frame.shape[1]
    if frame.startswith(JPEG):
        height, width, *_ = simplejpeg.decode_jpeg_header(frame)
        return height, width
    with Image.open(io.BytesIO(frame), formats=("PNG",)) as picture:
        return picture.height, picture.width


def decoded(frame: StoredFrame) -> np.ndarray:
    """[H, W, 3] uint8. Raises ValueError, or PIL's OSError, for a file that is cut short."""
    if isinstance(frame, np.ndarray):
        return frame
    if frame.startswith(JPEG):  # as TensorFlow decodes by default: the fast integer DCT, smooth chroma
        return simplejpeg.decode_jpeg(frame, colorspace="RGB", fastdct=True, fastupsample=False)
    with Image.open(io.BytesIO(frame), formats=("PNG",)) as picture:
        return np.array(picture.convert("RGB"))


def _checked_size(frame: StoredFrame, where: str) -> tuple[int, int]:
    expected = f"must be a JPEG or PNG file of three colours, or [H, W, 3] uint8; {AGAIN}"
    if isinstance(frame, np.ndarray):
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise ValueError(f"{where} is {frame.dtype} {list(frame.shape)}, {expected}")
    elif not frame.startswith((PNG, JPEG)):
        raise ValueError(f"{where} begins with {frame[:8]!r}, {expected}")
    elif (
        frame.startswith(PNG) and frame[24:26] != b"\x08\x02"
    ):  # bits and kind of colours, in the header that comes first
        raise ValueError(f"{where} is a PNG file of another kind than 8-bit RGB, {expected}")
    try:
        return frame_size(frame)
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where} cannot be read ({error}), {expected}") from None


def _text(instruction: Any, where: str) -> str:
    try:
        text = bytes(instruction).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: steps/language_instruction is no UTF-8 ({error.reason}); {AGAIN}") from None
    if not text.strip():
        raise ValueError(
            f"{where}: steps/language_instruction is empty, must say what is to be done; {AGAIN} without that episode"
        )
    return text
