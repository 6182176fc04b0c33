"""Checkpoint directories of a run: complete or absent, the newest few kept, each one self-contained.

    checkpoints/iteration_000005/{learners/, algorithm.json, facts.json}

Tune copies what a trial saves; for a 7B policy that would be tens of GB a copy. So a run's checkpoints lie in its own directory and
Tune's checkpoint is a pointer to one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FACTS_FILE = "facts.json"
ALGORITHM_FILE = "algorithm.json"
POINTER_FILE = "pointer.json"
_NAME = re.compile(r"iteration_(\d{6,})$")


class CheckpointStore:
    """The `checkpoints/` directory of one run.

    Args:
        root: the directory; made when the first checkpoint is written.
        keep: how many of the newest to keep.
    """

    def __init__(self, root: Path, keep: int) -> None:
        self.root, self._keep = root, keep

    @contextmanager
    def writing(self, iteration: int) -> Iterator[Path]:
        """A directory to write into; on the disk and renamed to its final name at the end, removed where writing fails."""
        self._sweep()
        final = self.root / f"iteration_{iteration:06d}"
        partial = self.root / f".{final.name}.partial"
        partial.mkdir(parents=True)
        try:
            yield partial
            _fsync_tree(partial)
            if final.exists():  # an iteration that was played again
                final.rename(self.root / f".{final.name}.replaced")
            partial.rename(final)
            _fsync(self.root)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._sweep()
        for old in self.list()[: -self._keep]:
            shutil.rmtree(old)

    def _sweep(self) -> None:
        """Remove what a killed process left half written or half removed."""
        for left in (*self.root.glob(".iteration_*.partial"), *self.root.glob(".iteration_*.replaced")):
            shutil.rmtree(left)

    def list(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        if not self.root.is_dir():
            return []
        return sorted((path for path in self.root.iterdir() if _NAME.match(path.name)), key=lambda path: int(path.name.split("_")[1]))

    def newest(self) -> Path | None:
        """The newest complete checkpoint, None before the first."""
        complete = self.list()
        return complete[-1] if complete else None

    @staticmethod
    def write_pointer(directory: Path, checkpoint: Path | None) -> None:
        """Leave a pointer to `checkpoint` in `directory`; None says that there is none yet."""
        (directory / POINTER_FILE).write_text(json.dumps({"checkpoint": str(checkpoint.resolve()) if checkpoint else None}))

    @staticmethod
    def points_nowhere(directory: Path) -> bool:
        """Whether `directory` holds the pointer of a run that had no checkpoint yet."""
        pointer = directory / POINTER_FILE
        return pointer.is_file() and json.loads(pointer.read_text())["checkpoint"] is None

    @staticmethod
    def resolve(directory: Path) -> Path:
        """The checkpoint behind a pointer, or `directory` itself.

        Raises:
            FileNotFoundError: where there is no complete checkpoint.
        """
        pointer = directory / POINTER_FILE
        target = Path(json.loads(pointer.read_text())["checkpoint"] or directory) if pointer.is_file() else directory
        if not (target / FACTS_FILE).is_file():
            raise FileNotFoundError(
                f"{target}: no complete checkpoint here ({FACTS_FILE} is missing); give a directory like runs/NAME/checkpoints/iteration_000005"
            )
        return target

    @staticmethod
    def write_facts(directory: Path, *, iteration: int, policy_version: int, settings: dict[str, Any], algorithm: dict[str, Any]) -> None:
        """What is not the learners': counters, settings, and what the Algorithm keeps: RLlib's running metrics, the curriculum's record.

        Written last: `facts.json` says that all is there.
        """
        (directory / ALGORITHM_FILE).write_text(json.dumps(algorithm, default=_plain_number))
        facts = {"iteration": iteration, "policy_version": policy_version, "settings": settings}
        (directory / FACTS_FILE).write_text(json.dumps(facts, indent=2))

    @staticmethod
    def read_algorithm(directory: Path) -> dict[str, Any]:
        """What the Algorithm kept."""
        return json.loads((directory / ALGORITHM_FILE).read_text())

    @staticmethod
    def read_facts(directory: Path) -> dict[str, Any]:
        return json.loads((directory / FACTS_FILE).read_text())


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that a reader, or the survivor of a crash, sees the old text or the new."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    _fsync(partial)
    partial.replace(path)


def _plain_number(value: Any) -> float | int:
    """A numpy number as JSON knows it."""
    return value.item()


def _fsync_tree(directory: Path) -> None:
    """Wait until a directory and all below it are on the disk, so that a name never survives a power cut without its content."""
    for parent, _, files in os.walk(directory):
        for name in files:
            _fsync(Path(parent) / name)
        _fsync(Path(parent))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
