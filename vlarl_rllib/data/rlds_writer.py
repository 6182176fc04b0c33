"""Writing RLDS data sets in the published layout.

T = steps of an episode, H, W = size of a stored frame.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlarl_rllib.data.rlds import INCOMPLETE
from vlarl_rllib.data.tfds_process import JOINT_STATE_SIZE, STATE_SIZE, VERSION, TFDSProcess
from vlarl_rllib.models.family import PolicyFamily
from vlarl_rllib.models.files import STATISTICS_FILE

JPEG_QUALITY = 95
"""As TensorFlow encodes by default, and so the published data."""
EPISODES_AT_ONCE = 32
"""Written together: TensorFlow Datasets writes its metadata anew each time, half of the work for single ones."""
NO_OP_NORM = 1e-4
"""Below it the arm's six numbers count as standing still (moojink/rlds_dataset_builder, regeneration of LIBERO's data).
"""


@dataclass(frozen=True)
class Demonstration:
    """One episode."""

    images: Sequence[np.ndarray]
    """T frames [H, W, 3] uint8, as the policy sees them before its own resize."""
    actions: np.ndarray
    """[T, 7] float32, the environment's own: gripper -1 = open, +1 = close."""
    instruction: str
    states: np.ndarray | None = None
    """[T, 8] float32: position, axis-angle, two gripper joints; None = zeros."""
    joint_states: np.ndarray | None = None
    """[T, 7] float32; None = zeros."""
    wrist_images: Sequence[np.ndarray] | None = None
    """T frames of a second camera at the gripper, of the size of `images`."""
    origin: str = ""
    """Where it comes from, for `episode_metadata/file_path`."""

    def without_no_ops(self) -> Demonstration:
        """Without steps that neither move the arm nor the gripper: a policy that imitates them gets stuck in them."""
        kept: list[int] = []
        for step, action in enumerate(self.actions):
            still = np.linalg.norm(action[:6]) < NO_OP_NORM
            if not (still and (not kept or action[6] == self.actions[kept[-1]][6])):
                kept.append(step)
        chosen: dict[str, Any] = {
            name: [getattr(self, name)[step] for step in kept]
            for name in ("images", "wrist_images")
            if getattr(self, name)
        }
        chosen |= {
            name: getattr(self, name)[kept]
            for name in ("actions", "states", "joint_states")
            if getattr(self, name) is not None
        }
        return replace(self, **chosen)


class RLDSWriter:
    """Writes one data set, episode by episode, beside what the caller does.

    with RLDSWriter(directory, "tabletop", load_family("openvla")) as writer:
        writer.add(demonstration)

    Frames of all episodes must be of one size, and all or none have `wrist_images`.

    Args:
        directory: the data set goes into `directory/<name>/1.0.0`, which is there when all is written.
        name: lower case with underscores.
        family: of the policies whose action statistics are written beside the episodes.

    Raises:
        FileExistsError: there is a data set of that name, or one that was not finished.
    """

    def __init__(self, directory: str | Path, name: str, family: PolicyFamily) -> None:
        self.path = Path(directory) / name / VERSION
        self._partial = self.path.with_name(VERSION + INCOMPLETE)
        for path in (self.path, self._partial):
            if path.exists():
                raise FileExistsError(f"{path} exists; give another directory, or remove it")
        self._partial.mkdir(parents=True)
        self._family = family
        self._process = TFDSProcess("write", self._partial, name)
        self._thread = ThreadPoolExecutor(1, "rlds")
        self._writing: Future[None] | None = None
        self._waiting: list[dict[str, Any]] = []
        self._actions: list[np.ndarray] = []

    def add(self, demonstration: Demonstration) -> None:
        """Append an episode.

        Raises:
            ValueError: it has no steps, numbers of frames, actions and states differ, or a number is not finite.
            ValueError, ImportError, OSError, RuntimeError: an earlier one could not be written.
        """
        length = len(demonstration.actions)
        if length == 0 or len(demonstration.images) != length:
            raise ValueError(
                f"a demonstration has {len(demonstration.images)} frames and {length} actions; both must be the "
                "same and above 0"
            )
        for name, values, size in (
            ("actions", demonstration.actions, 7),
            ("states", demonstration.states, STATE_SIZE),
            ("joint states", demonstration.joint_states, JOINT_STATE_SIZE),
        ):
            if values is not None and (values.shape != (length, size) or not np.isfinite(values).all()):
                raise ValueError(
                    f"a demonstration's {name} have shape {values.shape}; they must be ({length}, {size}), and finite"
                )
        for image in (*demonstration.images, *(demonstration.wrist_images or ())):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(
                    f"a demonstration's frames are {image.dtype} {list(image.shape)}; they must be uint8 [H, W, 3]"
                )
        self._waiting.append(_example(demonstration))  # as JPEG: raw frames of a lot would be gigabytes
        self._actions.append(np.array(demonstration.actions, dtype=np.float32))
        if len(self._waiting) >= EPISODES_AT_ONCE:
            self._hand_over()

    def _hand_over(self) -> None:
        """Begin to write what waits, once what came before is written."""
        if self._writing is not None:
            self._writing.result()
        self._writing = self._thread.submit(self._write, self._waiting)
        self._waiting = []

    def _write(self, examples: list[dict[str, Any]]) -> None:
        self._process.send(examples)
        self._process.receive()

    def close(self) -> None:
        """Finish the files and write `dataset_statistics.json`; without any episode nothing is left.

        Raises as `add`.
        """
        try:
            if not self._actions:
                self._discard()
                return
            if self._waiting:
                self._hand_over()
            if self._writing is not None:
                self._writing.result()
            self._process.send(None)
            self._process.receive()
        finally:
            self._thread.shutdown()
            self._process.close()
        if self._family.published_statistics:
            self._write_statistics()
        self._partial.rename(self.path)

    def _write_statistics(self) -> None:
        statistics = self._family.dataset_statistics(np.concatenate(self._actions), len(self._actions))
        (self._partial / STATISTICS_FILE).write_text(json.dumps({self.path.parent.name: statistics}, indent=2) + "\n")

    def _discard(self) -> None:
        self._process.close(patience_seconds=0.0)
        self._partial.rmdir()
        with suppress(OSError):  # other versions
            self.path.parent.rmdir()

    def __enter__(self) -> RLDSWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _example(demonstration: Demonstration) -> dict[str, Any]:
    length = len(demonstration.actions)
    states = demonstration.states if demonstration.states is not None else np.zeros((length, STATE_SIZE))
    joints = (
        demonstration.joint_states if demonstration.joint_states is not None else np.zeros((length, JOINT_STATE_SIZE))
    )
    steps = [
        {
            "observation": {
                "image": _jpeg(demonstration.images[step]),
                **({"wrist_image": _jpeg(demonstration.wrist_images[step])} if demonstration.wrist_images else {}),
                "state": states[step].astype(np.float32),
                "joint_state": joints[step].astype(np.float32),
            },
            "action": demonstration.actions[step].astype(np.float32),
            "discount": 1.0,
            "reward": float(step == length - 1),
            "is_first": step == 0,
            "is_last": step == length - 1,
            "is_terminal": step == length - 1,
            "language_instruction": demonstration.instruction,
        }
        for step in range(length)
    ]
    return {"steps": steps, "episode_metadata": {"file_path": demonstration.origin}}


def _jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
