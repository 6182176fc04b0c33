"""Files of a directory that somebody else may have made, such as a run that was sent: read and written inside of it
alone.

A symbolic link in it could name any file of its reader, to be shown in a report or written over.
"""

from __future__ import annotations

import os
from pathlib import Path

from vlarl_rllib.errors import SettingsError
from vlarl_rllib.process.storage import Place, StoragePath


def own_file(directory: Path, name: str, what: str) -> Path | None:
    """`directory/name`, None where there is none.

    Raises `SettingsError`, beginning with `what`, for a link out of it, or no regular file.
    """
    file = directory / name
    if not os.path.lexists(file):
        return None
    if not is_inside(file, directory):
        raise SettingsError(
            f"{what}: {file} is a link that leads out of {directory}, which is not followed; remove it, or copy "
            "the file there"
        )
    if not file.is_file():
        raise SettingsError(f"{what}: {file} is no regular file; remove it")
    return file


def own_folder(directory: Path, name: str, what: str) -> Path:
    """`directory/name`, there or not. Raises `SettingsError`, beginning with `what`, for a link out of it."""
    folder = directory / name
    if os.path.lexists(folder) and not is_inside(folder, directory):
        raise SettingsError(
            f"{what}: {folder} is a link that leads out of {directory}, which is not followed; remove it"
        )
    return folder


def refuse_links(directory: Path, what: str) -> None:
    """Raise `SettingsError`, beginning with `what`, where a link anywhere below `directory` leads out of it."""
    for parent, folders, files in os.walk(directory):
        for name in (*folders, *files):
            if os.path.islink(link := Path(parent, name)) and not is_inside(link, directory):
                raise SettingsError(
                    f"{what}: {link} is a link that leads out of {directory}, where a run would write through "
                    "it; remove it"
                )


def is_inside(path: Path, directory: Path) -> bool:
    """Whether `path`, links followed, lies below `directory`, links followed."""
    return path.resolve().is_relative_to(directory.resolve())


def replace_file(file: Place, content: str | bytes, mode: int = 0o666) -> None:
    """Put a new file in place of what is there, which a link would be too: whoever reads it sees the old content or the
    new."""
    if isinstance(file, StoragePath):
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
