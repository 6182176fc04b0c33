"""Checkpoint directories of a run: complete or absent, verified before use, the newest few kept, each one
self-contained.

    checkpoints/iteration_000005/{learners/, algorithm.json, facts.json, files.json}      of vlarl train
                step_001000/{learners/, data.json, files.json}                            of vlarl sft

`files.json`, written last, has the size and SHA-256 of every other file. Tune copies what a trial saves; for a 7B
policy that would be tens of GB a copy. So a run's checkpoints lie in its own directory and Tune's checkpoint is a
pointer to one.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from vlarl_rllib.errors import SettingsError
from vlarl_rllib.process.storage import URI, Place, StoragePath, place_of
from vlarl_rllib.runs.sealing import (
    FILES_FILE,
    OLDER,
    DamagedCheckpointError,
    is_sealed,
    put_in_place,
    read_object,
    remove,
    verify,
)
from vlarl_rllib.settings import Settings

logger = logging.getLogger(__name__)

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
        pointers: Tune's directory of the trial, where Tune decides what is kept: a checkpoint that a pointer there
            names stays.
    """

    def __init__(self, root: Place, keep: int, unit: Unit = "iteration", *, pointers: Path | None = None) -> None:
        self.root, self._keep, self._unit, self._pointers = root, keep, unit, pointers
        self._name = re.compile(rf"{unit}_\d{{6,}}(_\d+)?$")
        self.written: Place | None = None
        """The one that this store wrote last."""

    @contextmanager
    def writing(self, number: int) -> Iterator[Place]:
        """A directory to write into; sealed, on the disk and renamed to its final name at the end, removed where
        writing fails."""
        self._sweep()
        final = self._free_name(f"{self._unit}_{number:06d}")
        with put_in_place(final) as partial:
            yield partial
        self.written = final
        self._sweep()
        self._drop_old(number)

    def _free_name(self, name: str) -> Place:
        """`name`, with a number behind it where one of Tune's pointers leads to another checkpoint of that name."""
        taken = {path.name for path in self._pointed_to()}
        repeats = (f"{name}_{repeat}" for repeat in range(1, len(taken) + 1))
        return self.root / next(free for free in (name, *repeats) if free not in taken)

    def _drop_old(self, number: int) -> None:
        """Remove all but the newest.

        What counts further than `number` is damaged: the run went on from an older one.
        """
        there = self.list()
        kept = {path for path in there if number_of(path) <= number}
        kept = set(sorted(kept, key=_place)[-self._keep :]) | self._pointed_to()
        for path in there:
            if path not in kept:
                remove(path)

    def _pointed_to(self) -> set[Place]:
        """What Tune's pointers lead to, but for those that a full disk has cut."""
        found: set[Place] = set()
        for file in self._pointers.glob(f"checkpoint_*/{POINTER_FILE}") if self._pointers else ():
            with suppress(DamagedCheckpointError):
                if target := read_pointer(file.parent):
                    found.add(self.root / target.name)
        return found

    def _sweep(self) -> None:
        """Remove what a killed process left half written or half removed."""
        if isinstance(self.root, StoragePath):
            for unfinished in (path for path in self._named() if not is_sealed(path)):
                remove(unfinished)
            return
        for left in (*self.root.glob(f".{self._unit}_*.partial"), *self.root.glob(f".{self._unit}_*.replaced")):
            remove(left)

    def list(self) -> list[Place]:
        """Checkpoints, oldest first; whether they are as they were written, only `verify` tells."""
        found = self._named()
        return [path for path in found if is_sealed(path)] if isinstance(self.root, StoragePath) else [*found]

    def _named(self) -> Sequence[Place]:
        """Directories that are called like a checkpoint, oldest first."""
        if not self.root.is_dir():
            return []
        return sorted(
            (path for path in self.root.iterdir() if self._name.match(path.name) and path.is_dir()), key=_place
        )

    def newest(self, passed_over: Callable[[str], None] | None = None, *, contents: bool = True) -> Place | None:
        """The newest checkpoint that verifies, None where there is none.

        Args:
            passed_over: is told of each newer one, in one line, what is damaged.
            contents: see `verify`.
        """
        for checkpoint in reversed(self.list()):
            try:
                verify(checkpoint, contents=contents)
            except DamagedCheckpointError as error:
                if passed_over is not None:
                    passed_over(str(error))
            else:
                return checkpoint
        return None

    @staticmethod
    def write_pointer(directory: Path, checkpoint: Place | None, final: Path | None = None) -> None:
        """Leave a pointer to `checkpoint` in `directory`; None says that there is none yet.

        It is relative, so that a run may be moved as a whole; absolute where nobody knows from where to count.

        Args:
            final: where `directory` is going to be moved to; None = nobody knows.
        """
        target = str(checkpoint.resolve()) if checkpoint else None
        if target is not None and final is not None and isinstance(checkpoint, Path):
            target = os.path.relpath(target, final.resolve())
        (directory / POINTER_FILE).write_text(json.dumps({"checkpoint": target}))

    @staticmethod
    def points_nowhere(directory: Place) -> bool:
        """Whether `directory` holds the pointer of a run that had no checkpoint yet."""
        return (directory / POINTER_FILE).is_file() and read_pointer(directory) is None

    @staticmethod
    def resolve(directory: Place) -> Place:
        """The checkpoint behind a pointer, or `directory` itself; verified.

        Raises:
            FileNotFoundError: there is no checkpoint.
            DamagedCheckpointError: it is not as it was written.
        """
        target = directory
        if (directory / POINTER_FILE).is_file():
            target = read_pointer(directory) or directory
        if not (target / FACTS_FILE).is_file() and not (target / FILES_FILE).is_file():
            raise FileNotFoundError(
                f"{target}: no checkpoint here; give a directory like runs/NAME/checkpoints/iteration_000005"
            )
        verify(target)
        return target

    @staticmethod
    def write_facts(
        directory: Place,
        *,
        iteration: int,
        policy_version: int,
        settings: dict[str, Any],
        models: dict[str, str],
        algorithm: dict[str, Any],
    ) -> None:
        """What is not the learners': counters, settings, and what the Algorithm keeps: RLlib's running metrics, the
        curriculum's record.

        Args:
            models: fingerprints of the models that the run began with, by the settings' key.
        """
        (directory / ALGORITHM_FILE).write_text(json.dumps(algorithm, default=_plain_number))
        facts = {"iteration": iteration, "policy_version": policy_version, "settings": settings, "models": models}
        (directory / FACTS_FILE).write_text(json.dumps(facts, indent=2))

    @staticmethod
    def read_algorithm(directory: Place) -> dict[str, Any]:
        """What the Algorithm kept. Raises DamagedCheckpointError."""
        return read_object(directory / ALGORITHM_FILE, {"metrics": dict, "successes": list, "rates": dict})

    @staticmethod
    def read_facts(directory: Place) -> dict[str, Any]:
        """`iteration`, `policy_version`, `settings`, `models`. Raises DamagedCheckpointError."""
        required = {"iteration": int, "policy_version": int, "settings": dict, "models": dict}
        facts = read_object(directory / FACTS_FILE, required)
        for name in ("iteration", "policy_version"):
            if facts[name] < 0 or isinstance(facts[name], bool):
                raise DamagedCheckpointError(f"{directory / FACTS_FILE}: {name} is {facts[name]!r}; {OLDER}")
        try:
            Settings.from_dict(facts["settings"])
        except SettingsError as error:
            raise DamagedCheckpointError(f"{directory / FACTS_FILE}: {error}; {OLDER}") from None
        return facts


def read_pointer(directory: Place) -> Place | None:
    """Where the pointer in `directory` leads; None where the run had no checkpoint yet.

    Raises DamagedCheckpointError where it is damaged.
    """
    target = read_object(directory / POINTER_FILE).get("checkpoint")
    if target is not None and not isinstance(target, str):
        raise DamagedCheckpointError(f"{directory / POINTER_FILE} is damaged; give the checkpoint itself")
    if not target or URI.match(target):
        return place_of(target) if target else None
    return Path(os.path.normpath(str(directory.resolve() / target)))


def local(checkpoint: Place) -> Path:
    """A checkpoint on this machine's file systems. Raises `SettingsError` for one behind a URI."""
    if isinstance(checkpoint, StoragePath):
        raise SettingsError(f"{checkpoint}: only vlarl train reads checkpoints behind a URI; copy it to a directory")
    return checkpoint


def number_of(checkpoint: Place) -> int:
    """The iteration or step of a checkpoint in a store, by its name."""
    return _place(checkpoint)[0]


def _place(checkpoint: Place) -> tuple[int, ...]:
    """Its number, and behind it the number of its repeat where it has one; checkpoints are sorted by this."""
    return tuple(int(part) for part in checkpoint.name.split("_")[1:])


def _plain_number(value: Any) -> float | int:
    """A numpy number as JSON knows it."""
    return value.item()
