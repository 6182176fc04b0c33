"""Directories that are complete or absent: written aside, sealed with sizes and digests, renamed, verified.

Behind a URI, where nothing can be renamed, they are written in place, and are not there before they are sealed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vlarl_rllib.errors import SettingsError
from vlarl_rllib.process.json_files import read_json_object
from vlarl_rllib.process.own_files import is_inside
from vlarl_rllib.process.storage import FileFacts, Place, StoragePath, seen

logger = logging.getLogger(__name__)

FILES_FILE = "files.json"
SHARDS_FILE = ".shards.json"
WEIGHTS_FOLDER = "learners"
OLDER = "give or keep an older one"


class DamagedCheckpointError(SettingsError):
    """A checkpoint is not as it was written; the text says which file, in one line."""


def note_shards(directory: Place, written: Sequence[Mapping[str, FileFacts]]) -> None:
    """Tell `seal` what others, on other machines perhaps, have written into `directory / WEIGHTS_FOLDER`, each of them
    one mapping: it is complete when all of that is seen."""
    together = {f"{WEIGHTS_FOLDER}/{name}": facts for part in written for name, facts in part.items()}
    (directory / SHARDS_FILE).write_text(json.dumps(together))


def seal(directory: Place, name: str = "") -> None:
    """Write `files.json`: the size and SHA-256 of every file below `directory`, which is then complete. What
    `note_shards` has told is not read again.

    Args:
        name: of the directory once it is renamed; this process need not verify it. "" = it is not renamed.

    Raises:
        OSError: a shard that another machine says to have written is not seen here.
    """
    shards = _take_shards(directory)
    for file, (num_bytes, _) in shards.items():
        if not seen(directory / file, num_bytes):
            raise OSError(
                f"{directory / file}: {num_bytes} bytes were written, and are not seen by whoever seals the "
                "checkpoint; the run's directory must be on storage that all nodes share"
            )
    files = _files_below(directory)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        digests = list(
            threads.map(lambda file: shards[file][1] if file in shards else file_digest(directory / file), files)
        )
    facts = {
        file: {"bytes": (directory / file).stat().st_size, "sha256": digest}
        for file, digest in zip(files, digests, strict=True)
    }
    (directory / FILES_FILE).write_text(json.dumps(facts, indent=2))
    if isinstance(directory, Path):
        _verified[name or directory.name] = _signature(directory)


def _take_shards(directory: Place) -> dict[str, FileFacts]:
    """What `note_shards` has written, which is removed."""
    file = directory / SHARDS_FILE
    if not file.is_file():
        return {}
    told = {name: FileFacts(*facts) for name, facts in json.loads(file.read_text()).items()}
    file.unlink()
    return told


@contextmanager
def replacing(directory: Place) -> Iterator[Place]:
    """A directory to write a checkpoint into, which takes the place of `directory` when it is whole.

    Raises:
        SettingsError: `directory` holds something else than one checkpoint.
    """
    directory = directory.resolve()
    if directory.is_dir() and set(_files_below(directory)) - set(_listed(directory)):
        raise SettingsError(f"{directory} holds something else than a checkpoint; give a new directory")
    with put_in_place(directory) as partial:
        yield partial
    if isinstance(directory, Path):
        remove(replaced(directory))


@contextmanager
def put_in_place(final: Place) -> Iterator[Place]:
    """A directory to write into; at the end sealed, on the disk and renamed.

    What was at `final` is renamed to `replaced(final)`. Behind a URI it is removed, and `final` itself written.
    """
    if isinstance(final, StoragePath):
        with _sealed_last(final):
            yield final
        return
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


@contextmanager
def _sealed_last(directory: StoragePath) -> Iterator[None]:
    (directory / FILES_FILE).unlink(missing_ok=True)  # from here on nobody takes it for whole
    try:
        directory.rmtree()
        directory.mkdir()
        yield
        seal(directory)
    except BaseException:
        with suppress(OSError):
            directory.rmtree()
        raise


def is_sealed(directory: Place) -> bool:
    """Whether it was written to its end."""
    return (directory / FILES_FILE).is_file()


def replaced(final: Path) -> Path:
    return final.with_name(f".{final.name}.{os.getpid()}.replaced")


def remove(directory: Place) -> None:
    """A directory that is not needed any more; where that fails it lies there, and nothing else is lost."""
    try:
        if isinstance(directory, StoragePath):
            (directory / FILES_FILE).unlink(missing_ok=True)
            directory.rmtree()
        else:
            shutil.rmtree(directory)
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("%s cannot be removed: %s", directory, error)


def _listed(directory: Place) -> dict[str, Any]:
    """What a checkpoint's `files.json` says; nothing where there is none."""
    return read_object(directory / FILES_FILE) if (directory / FILES_FILE).is_file() else {}


_verified: dict[str, tuple[tuple[str, int, int], ...]] = {}
"""By name of the directory, what its files looked like when this process last wrote or read all of them: they need not
be read again."""


def verify(directory: Place, *, contents: bool = True) -> None:
    """Read a checkpoint and compare it with its `files.json`; one that has not changed since this process last did so
    is not read again.

    Args:
        contents: False compares the files' sizes alone, for whoever has no time: the contents of a 7B policy take
            minutes. Behind a URI it is always the sizes alone: object stores write files whole, and check them.

    Raises:
        DamagedCheckpointError: a file is missing, cut, changed or cannot be read, or the checkpoint was not written to
            its end.
    """
    try:
        if isinstance(directory, StoragePath):
            _verify_sizes(directory)
        else:
            _verify(directory, contents)
    except OSError as error:
        raise DamagedCheckpointError(f"{directory} cannot be read ({error}); {OLDER}") from None


def _verify_sizes(directory: StoragePath) -> None:
    there = directory.sizes()
    if FILES_FILE not in there:
        raise DamagedCheckpointError(f"{directory} was not written to its end ({FILES_FILE} is missing); {OLDER}")
    for name, facts in _listed(directory).items():
        if not isinstance(facts, dict) or there.get(name) != facts.get("bytes"):
            raise DamagedCheckpointError(f"{directory} is damaged: {name} is not what was written; {OLDER}")


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


def read_object(file: Place, required: dict[str, type] | None = None) -> dict[str, Any]:
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


def _files_below(directory: Place) -> list[str]:
    if isinstance(directory, StoragePath):
        return sorted(name for name in directory.sizes() if name != FILES_FILE)
    return sorted(
        str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file() and path.name != FILES_FILE
    )


def _signature(directory: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of change of all files; the last ones are kept by a rename."""
    stats = ((name, (directory / name).stat()) for name in (*_files_below(directory), FILES_FILE))
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def file_digest(file: Place) -> str:
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
