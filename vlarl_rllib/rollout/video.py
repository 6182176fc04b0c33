"""Frames to MP4, through the ffmpeg that imageio-ffmpeg brings along."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlarl_rllib.process.lost_output import LOST
from vlarl_rllib.process.storage import Place
from vlarl_rllib.types import EpisodeResult

MIN_SIDE = 224
"""Smaller frames are enlarged by a whole factor, so that what a small policy sees can be seen by a person too."""


def can_encode() -> bool:
    """Whether imageio-ffmpeg is installed."""
    return importlib.util.find_spec("imageio_ffmpeg") is not None


def encode_mp4(frames: Sequence[np.ndarray], frames_per_second: float) -> bytes:
    """An H.264 MP4 of `frames`, each [S, S, 3] uint8.

    Raises:
        ImportError: imageio-ffmpeg is not installed.
        OSError, RuntimeError: ffmpeg cannot run, or fails.
    """
    import imageio_ffmpeg

    factor = max(1, -(-MIN_SIDE // frames[0].shape[0]))
    height, width = (side * factor for side in frames[0].shape[:2])
    with tempfile.TemporaryDirectory(prefix="vlarl-video-") as directory:
        file = Path(directory) / "episode.mp4"
        writer = imageio_ffmpeg.write_frames(
            str(file), (width, height), fps=frames_per_second, macro_block_size=2, quality=7
        )
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(frame.repeat(factor, axis=0).repeat(factor, axis=1)))
        writer.close()
        return file.read_bytes()


def keep_videos(directory: Place, after: int, results: Sequence[EpisodeResult]) -> None:
    """Write the films among the episodes of an evaluation behind `after` iterations; a full disk costs them, not the
    run."""
    for result in results:
        if result.video is None:
            continue
        outcome = "success" if result.success else "failure"
        film = (
            directory
            / f"iteration_{after:06d}_task_{result.task_id:02d}_start_{result.initial_state:03d}_{outcome}.mp4"
        )
        with LOST.counting(film.name):
            try:
                directory.mkdir(parents=True, exist_ok=True)
                film.write_bytes(result.video)
            except OSError:
                film.unlink(missing_ok=True)  # half a film does not play
                raise
