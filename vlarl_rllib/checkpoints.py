"""Checkpoint directories of a run: complete or absent, verified before use, the newest few kept, each one self-contained.

    checkpoints/iteration_000005/{learners/, algorithm.json, facts.json, files.json}      of vlarl train
                step_001000/{learners/, data.json, files.json}                            of vlarl sft

`files.json`, written last, has the size and SHA-256 of every other file. Tune copies what a trial saves; for a 7B policy that would be
tens of GB a copy. So a run's checkpoints lie in its own directory and Tune's checkpoint is a pointer to one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from vlarl_rllib.errors import SettingsError
from vlarl_rllib.json_files import read_json_object

logger = logging.getLogger(__name__)

FACTS_FILE = "facts.json"
ALGORITHM_FILE = "algorithm.json"
FILES_FILE = "files.json"
POINTER_FILE = "pointer.json"

Unit = Literal["iteration", "step"]
"""What a run counts: `vlarl train` iterations, `vlarl sft` optimiser steps."""


class DamagedCheckpointError(SettingsError):
    """A checkpoint is not as it was written; the text says which file, in one line."""


class CheckpointStore:
    """The `checkpoints/` directory of one run.

    Args:
        root: the directory; made when the first checkpoint is written.
        keep: how many of the newest to keep.
        unit: what their names count.
        pointers: Tune's directory of the trial, where Tune decides what is kept: a checkpoint that a pointer there names stays.
    """

    def __init__(self, root: Path, keep: int, unit: Unit = "iteration", *, pointers: Path | None = None) -> None:
        self.root, self._keep, self._unit, self._pointers = root, keep, unit, pointers
        self._name = re.compile(rf"{unit}_\d{{6,}}(_\d+)?$")
        self.written: Path | None = None
        """The one that this store wrote last."""

    @contextmanager
    def writing(self, number: int) -> Iterator[Path]:
        """A directory to write into; sealed, on the disk and renamed to its final name at the end, removed where writing fails."""
        self._sweep()
        final = self._free_name(f"{self._unit}_{number:06d}")
        with _put_in_place(final) as partial:
            yield partial
        self.written = final
        self._sweep()
        self._drop_old(number)

    def _free_name(self, name: str) -> Path:
        """`name`, with a number behind it where one of Tune's pointers leads to another checkpoint of that name."""
        taken = {path.name for path in self._pointed_to()}
        repeats = (f"{name}_{repeat}" for repeat in range(1, len(taken) + 1))
        return self.root / next(free for free in (name, *repeats) if free not in taken)

    def _drop_old(self, number: int) -> None:
        """Remove all but the newest. What counts further than `number` is damaged: the run went on from an older one."""
        there = self.list()
        kept = {path for path in there if number_of(path) <= number}
        kept = set(sorted(kept, key=_place)[-self._keep :]) | self._pointed_to()
        for path in there:
            if path not in kept:
                _remove(path)

    def _pointed_to(self) -> set[Path]:
        """What Tune's pointers lead to, but for those that a full disk has cut."""
        found = set()
        for file in self._pointers.glob(f"checkpoint_*/{POINTER_FILE}") if self._pointers else ():
            with suppress(DamagedCheckpointError):
                if target := read_pointer(file.parent):
                    found.add(self.root / target.name)
        return found

    def _sweep(self) -> None:
        """Remove what a killed process left half written or half removed."""
        for left in (*self.root.glob(f".{self._unit}_*.partial"), *self.root.glob(f".{self._unit}_*.replaced")):
            _remove(left)

    def list(self) -> list[Path]:
        """Checkpoints, oldest first; whether they are as they were written, only `verify` tells."""
        if not self.root.is_dir():
            return []
        return sorted((path for path in self.root.iterdir() if self._name.match(path.name) and path.is_dir()), key=_place)

    def newest(self, passed_over: Callable[[str], None] | None = None, *, contents: bool = True) -> Path | None:
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
    def write_pointer(directory: Path, checkpoint: Path | None, final: Path | None = None) -> None:
        """Leave a pointer to `checkpoint` in `directory`; None says that there is none yet.

        It is relative, so that a run may be moved as a whole; absolute where nobody knows from where to count.

        Args:
            final: where `directory` is going to be moved to; None = nobody knows.
        """
        target = str(checkpoint.resolve()) if checkpoint else None
        if target is not None and final is not None:
            target = os.path.relpath(target, final.resolve())
        (directory / POINTER_FILE).write_text(json.dumps({"checkpoint": target}))

    @staticmethod
    def points_nowhere(directory: Path) -> bool:
        """Whether `directory` holds the pointer of a run that had no checkpoint yet."""
        return (directory / POINTER_FILE).is_file() and read_pointer(directory) is None

    @staticmethod
    def resolve(directory: Path) -> Path:
        """The checkpoint behind a pointer, or `directory` itself; verified.

        Raises:
            FileNotFoundError: there is no checkpoint.
            DamagedCheckpointError: it is not as it was written.
        """
        target = directory
        if (directory / POINTER_FILE).is_file():
            target = read_pointer(directory) or directory
        if not (target / FACTS_FILE).is_file() and not (target / FILES_FILE).is_file():
            raise FileNotFoundError(f"{target}: no checkpoint here; give a directory like runs/NAME/checkpoints/iteration_000005")
        verify(target)
        return target

    @staticmethod
    def write_facts(
        directory: Path, *, iteration: int, policy_version: int, settings: dict[str, Any], models: dict[str, str], algorithm: dict[str, Any]
    ) -> None:
        """What is not the learners': counters, settings, and what the Algorithm keeps: RLlib's running metrics, the curriculum's record.

        Args:
            models: fingerprints of the models that the run began with, by the settings' key.
        """
        (directory / ALGORITHM_FILE).write_text(json.dumps(algorithm, default=_plain_number))
        facts = {"iteration": iteration, "policy_version": policy_version, "settings": settings, "models": models}
        (directory / FACTS_FILE).write_text(json.dumps(facts, indent=2))

    @staticmethod
    def read_algorithm(directory: Path) -> dict[str, Any]:
        """What the Algorithm kept. Raises DamagedCheckpointError."""
        return _read_object(directory / ALGORITHM_FILE, {"metrics": dict, "successes": list, "rates": dict})

    @staticmethod
    def read_facts(directory: Path) -> dict[str, Any]:
        """`iteration`, `policy_version`, `settings`, `models`. Raises DamagedCheckpointError."""
        return _read_object(directory / FACTS_FILE, {"iteration": int, "policy_version": int, "settings": dict, "models": dict})


def seal(directory: Path, name: str = "") -> None:
    """Write `files.json`: the size and SHA-256 of every file below `directory`, which is then complete.

    Args:
        name: of the directory once it is renamed; this process need not verify it. "" = it is not renamed.
    """
    files = _files_below(directory)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        digests = list(threads.map(lambda file: file_digest(directory / file), files))
    facts = {file: {"bytes": (directory / file).stat().st_size, "sha256": digest} for file, digest in zip(files, digests, strict=True)}
    (directory / FILES_FILE).write_text(json.dumps(facts, indent=2))
    _verified[name or directory.name] = _signature(directory)


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A directory to write a checkpoint into, which takes the place of `directory` when it is whole.

    Raises:
        SettingsError: `directory` holds something else than one checkpoint.
    """
    directory = directory.resolve()
    if directory.is_dir() and set(_files_below(directory)) - set(_listed(directory)):
        raise SettingsError(f"{directory} holds something else than a checkpoint; give a new directory")
    with _put_in_place(directory) as partial:
        yield partial
    _remove(_replaced(directory))


@contextmanager
def _put_in_place(final: Path) -> Iterator[Path]:
    """A directory to write into; at the end sealed, on the disk and renamed. What was at `final` is renamed to `_replaced(final)`."""
    partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        seal(partial, final.name)
        _fsync_tree(partial)
        if final.exists():
            final.rename(_replaced(final))
        partial.rename(final)
        _fsync(final.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _replaced(final: Path) -> Path:
    return final.with_name(f".{final.name}.{os.getpid()}.replaced")


def _remove(directory: Path) -> None:
    """A directory that is not needed any more; where that fails it lies there, and nothing else is lost."""
    try:
        shutil.rmtree(directory)
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("%s cannot be removed: %s", directory, error)


def _listed(directory: Path) -> dict[str, Any]:
    """What a checkpoint's `files.json` says; nothing where there is none."""
    return _read_object(directory / FILES_FILE) if (directory / FILES_FILE).is_file() else {}


_verified: dict[str, tuple[tuple[str, int, int], ...]] = {}
"""By name of the directory, what its files looked like when this process last wrote or read all of them: they need not be read again."""


def verify(directory: Path, *, contents: bool = True) -> None:
    """Read a checkpoint and compare it with its `files.json`; one that has not changed since this process last did so is not read again.

    Args:
        contents: False compares the files' sizes alone, for whoever has no time: the contents of a 7B policy take minutes.

    Raises:
        DamagedCheckpointError: a file is missing, cut, changed or cannot be read, or the checkpoint was not written to its end.
    """
    try:
        _verify(directory, contents)
    except OSError as error:
        raise DamagedCheckpointError(f"{directory} cannot be read ({error}); {OLDER}") from None


OLDER = "give or keep an older one"


def _verify(directory: Path, contents: bool) -> None:
    if not (directory / FILES_FILE).is_file():
        raise DamagedCheckpointError(f"{directory} was not written to its end ({FILES_FILE} is missing); {OLDER}")
    signature = _signature(directory)
    if _verified.get(directory.name) == signature:
        return
    files = _listed(directory)
    for name, facts in files.items():
        path = directory / name
        if ".." in Path(name).parts or not path.is_file() or not isinstance(facts, dict):
            raise DamagedCheckpointError(f"{directory} is damaged: {name} is missing; {OLDER}")
        if path.stat().st_size != facts.get("bytes"):
            raise DamagedCheckpointError(f"{directory} is damaged: {name} has {path.stat().st_size} bytes of {facts.get('bytes')}; {OLDER}")
    if not contents:
        return
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for name, digest in zip(files, threads.map(lambda name: file_digest(directory / name), files), strict=True):
            if digest != files[name].get("sha256"):
                raise DamagedCheckpointError(f"{directory} is damaged: {name} is not what was written; {OLDER}")
    _verified[directory.name] = signature


def read_pointer(directory: Path) -> Path | None:
    """Where the pointer in `directory` leads; None where the run had no checkpoint yet. Raises DamagedCheckpointError where it is damaged."""
    target = _read_object(directory / POINTER_FILE).get("checkpoint")
    if target is not None and not isinstance(target, str):
        raise DamagedCheckpointError(f"{directory / POINTER_FILE} is damaged; give the checkpoint itself")
    return Path(os.path.normpath(directory.resolve() / target)) if target else None


def _read_object(file: Path, required: dict[str, type] | None = None) -> dict[str, Any]:
    """A JSON object with these keys of these types."""
    try:
        values = read_json_object(file, "give or keep an older checkpoint")
    except ValueError as error:
        raise DamagedCheckpointError(str(error)) from None
    for key, kind in (required or {}).items():
        if not isinstance(values.get(key), kind):
            raise DamagedCheckpointError(f"{file}: {key} is {values.get(key)!r:.40}, must be {kind.__name__}; give or keep an older checkpoint")
    return values


def _files_below(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file() and path.name != FILES_FILE)


def _signature(directory: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of change of all files; the last ones are kept by a rename."""
    stats = ((name, (directory / name).stat()) for name in (*_files_below(directory), FILES_FILE))
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def file_digest(file: Path) -> str:
    """SHA-256 in hex."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def number_of(checkpoint: Path) -> int:
    """The iteration or step of a checkpoint in a store, by its name."""
    return _place(checkpoint)[0]


def _place(checkpoint: Path) -> tuple[int, ...]:
    """Its number, and behind it the number of its repeat where it has one; checkpoints are sorted by this."""
    return tuple(int(part) for part in checkpoint.name.split("_")[1:])


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
