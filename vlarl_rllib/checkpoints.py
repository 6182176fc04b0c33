"""Checkpoint directories of a run: complete or absent, the newest few kept, each one self-contained.

    checkpoints/iteration_000005/{learners/, algorithm.json, facts.json}      of vlarl train
                step_001000/learners/                                         of vlarl sft

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
from typing import Any, Literal

FACTS_FILE = "facts.json"
ALGORITHM_FILE = "algorithm.json"
POINTER_FILE = "pointer.json"

Unit = Literal["iteration", "step"]
"""What a run counts: `vlarl train` iterations, `vlarl sft` optimiser steps."""


class CheckpointStore:
    """The `checkpoints/` directory of one run.

    Args:
        root: the directory; made when the first checkpoint is written.
        keep: how many of the newest to keep.
        unit: what their names count.
    """

    def __init__(self, root: Path, keep: int, unit: Unit = "iteration") -> None:
        self.root, self._keep, self._unit = root, keep, unit
        self._name = re.compile(rf"{unit}_(\d{{6,}})$")

    @contextmanager
    def writing(self, number: int) -> Iterator[Path]:
        """A directory to write into; on the disk and renamed to its final name at the end, removed where writing fails."""
        self._sweep()
        final = self.root / f"{self._unit}_{number:06d}"
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
        for left in (*self.root.glob(f".{self._unit}_*.partial"), *self.root.glob(f".{self._unit}_*.replaced")):
            shutil.rmtree(left)

    def list(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        if not self.root.is_dir():
            return []
        return sorted((path for path in self.root.iterdir() if self._name.match(path.name)), key=number_of)

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


def number_of(checkpoint: Path) -> int:
    """The iteration or step of a checkpoint in a store, by its name."""
    return int(checkpoint.name.split("_")[1])


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
