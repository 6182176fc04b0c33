"""Directories that are complete or absent: written aside, sealed with sizes and digests, renamed, verified."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlarl_rllib.errors import SettingsError
from vlarl_rllib.process.json_files import read_json_object
from vlarl_rllib.process.own_files import is_inside

logger = logging.getLogger(__name__)

FILES_FILE = "files.json"
WEIGHTS_FOLDER = "learners"
OLDER = "give or keep an older one"


class DamagedCheckpointError(SettingsError):
    """A checkpoint is not as it was written; the text says which file, in one line."""


def seal(directory: Path, name: str = "") -> None:
    """Write `files.json`: the size and SHA-256 of every file below `directory`, which is then complete.

    Args:
        name: of the directory once it is renamed; this process need not verify it. "" = it is not renamed.
    """
    files = _files_below(directory)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        digests = list(threads.map(lambda file: file_digest(directory / file), files))
    facts = {
        file: {"bytes": (directory / file).stat().st_size, "sha256": digest}
        for file, digest in zip(files, digests, strict=True)
    }
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
    with put_in_place(directory) as partial:
        yield partial
    remove(replaced(directory))


@contextmanager
def put_in_place(final: Path) -> Iterator[Path]:
    """A directory to write into; at the end sealed, on the disk and renamed.

    What was at `final` is renamed to `replaced(final)`.
    """
    partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        seal(partial, final.name)
        fsync_tree(partial)
        if final.exists():
            final.rename(replaced(final))
        partial.rename(final)
        _fsync(final.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def replaced(final: Path) -> Path:
    return final.with_name(f".{final.name}.{os.getpid()}.replaced")


def remove(directory: Path) -> None:
    """A directory that is not needed any more; where that fails it lies there, and nothing else is lost."""
    try:
        shutil.rmtree(directory)
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("%s cannot be removed: %s", directory, error)


def _listed(directory: Path) -> dict[str, Any]:
    """What a checkpoint's `files.json` says; nothing where there is none."""
    return read_object(directory / FILES_FILE) if (directory / FILES_FILE).is_file() else {}


_verified: dict[str, tuple[tuple[str, int, int], ...]] = {}
"""By name of the directory, what its files looked like when this process last wrote or read all of them: they need not
be read again."""


def verify(directory: Path, *, contents: bool = True) -> None:
    """Read a checkpoint and compare it with its `files.json`; one that has not changed since this process last did so
    is not read again.

    Args:
        contents: False compares the files' sizes alone, for whoever has no time: the contents of a 7B policy take
            minutes.

    Raises:
        DamagedCheckpointError: a file is missing, cut, changed or cannot be read, or the checkpoint was not written to
            its end.
    """
    try:
        _verify(directory, contents)
    except OSError as error:
        raise DamagedCheckpointError(f"{directory} cannot be read ({error}); {OLDER}") from None


def _verify(directory: Path, contents: bool) -> None:
    if not (directory / FILES_FILE).is_file():
        raise DamagedCheckpointError(f"{directory} was not written to its end ({FILES_FILE} is missing); {OLDER}")
    signature = _signature(directory)
    if _verified.get(directory.name) == signature:
        return
    files = _listed(directory)
    if not any(name.startswith(f"{WEIGHTS_FOLDER}/") for name in files):
        raise DamagedCheckpointError(f"{directory} is damaged: {FILES_FILE} lists no weights; {OLDER}")
    for name, facts in files.items():
        path = directory / name
        if ".." in Path(name).parts or not path.is_file() or not isinstance(facts, dict):
            raise DamagedCheckpointError(f"{directory} is damaged: {name} is missing; {OLDER}")
        if not is_inside(path, directory):
            raise DamagedCheckpointError(f"{directory}: {name} is a link that leads out of it; {OLDER}")
        if path.stat().st_size != facts.get("bytes"):
            raise DamagedCheckpointError(
                f"{directory} is damaged: {name} has {path.stat().st_size} bytes of {facts.get('bytes')}; {OLDER}"
            )
    if not contents:
        return
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for name, digest in zip(files, threads.map(lambda name: file_digest(directory / name), files), strict=True):
            if digest != files[name].get("sha256"):
                raise DamagedCheckpointError(f"{directory} is damaged: {name} is not what was written; {OLDER}")
    _verified[directory.name] = signature


def read_object(file: Path, required: dict[str, type] | None = None) -> dict[str, Any]:
    """A JSON object with these keys of these types."""
    try:
        values = read_json_object(file, "give or keep an older checkpoint")
    except ValueError as error:
        raise DamagedCheckpointError(str(error)) from None
    for key, kind in (required or {}).items():
        if not isinstance(values.get(key), kind):
            raise DamagedCheckpointError(
                f"{file}: {key} is {values.get(key)!r:.40}, must be {kind.__name__}; give or keep an older checkpoint"
            )
    return values


def _files_below(directory: Path) -> list[str]:
    return sorted(
        str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file() and path.name != FILES_FILE
    )


def _signature(directory: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of change of all files; the last ones are kept by a rename."""
    stats = ((name, (directory / name).stat()) for name in (*_files_below(directory), FILES_FILE))
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def file_digest(file: Path) -> str:
    """SHA-256 in hex."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def fsync_tree(directory: Path) -> None:
    """Wait until a directory and all below it are on the disk, so that a name never survives a power cut without its
    content."""
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
