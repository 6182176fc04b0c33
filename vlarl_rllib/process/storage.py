"""Directories that every node of a cluster reaches by name: paths, and URIs such as s3:// of what pyarrow knows.

Object stores have no rename and no locks, and a directory of theirs is what its files' names begin with.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

URI = re.compile(r"([a-z][a-z0-9+.-]*)://")
VISIBLE_SECONDS = 10.0
"""Network file systems show a new file to other machines late: NFS remembers for up to 3 s what a directory held."""


class Stat(NamedTuple):
    st_size: int


class FileFacts(NamedTuple):
    """What a file is known by."""

    num_bytes: int
    sha256: str
    """In hex."""


def facts_of(content: bytes) -> FileFacts:
    return FileFacts(len(content), hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class StoragePath:
    """A file or directory behind a URI, with as much of pathlib's interface as runs need.

    Nothing is asked before it is needed. All calls raise OSError where the storage does not do as told.

    >>> StoragePath("s3://bucket/runs/mine?region=eu-central-1") / "checkpoints"
    """

    uri: str
    """With the options of its file system behind a question mark, such as `endpoint_override`."""
    _of: Any = field(default=None, compare=False, repr=False)
    """File system of the one that this was made from."""

    @cached_property
    def _found(self) -> tuple[Any, str]:
        if self._of is not None:
            return self._of, self._plain_path
        from pyarrow.fs import FileSystem

        try:
            return FileSystem.from_uri(self.uri)
        except (ValueError, KeyError) as error:  # pyarrow's for a scheme or an option that it has not
            raise OSError(f"{self}: {' '.join(str(error).split())}") from None

    @property
    def files(self) -> Any:
        """pyarrow's file system."""
        return self._found[0]

    @property
    def path(self) -> str:
        """In that file system."""
        return self._found[1]

    @property
    def _plain_path(self) -> str:
        return URI.sub("", self._base)

    @property
    def _base(self) -> str:
        return self.uri.partition("?")[0].rstrip("/")

    @property
    def _options(self) -> str:
        return "".join(self.uri.partition("?")[1:])

    def _at(self, base: str) -> StoragePath:
        return StoragePath(base + self._options, self.files)

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> StoragePath:
        return self._at(f"{self._base}/{name}")

    @property
    def name(self) -> str:
        return self._base.rpartition("/")[2]

    @property
    def parent(self) -> StoragePath:
        return self._at(self._base.rpartition("/")[0])

    def with_name(self, name: str) -> StoragePath:
        return self.parent / name

    def resolve(self) -> StoragePath:
        return self

    absolute = resolve

    def _info(self) -> Any:
        return self.files.get_file_info(self.path)

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        return bool(self._info().is_file)

    def is_dir(self) -> bool:
        """Whether it is there and can hold files; object stores know it by the files."""
        from pyarrow.fs import FileType

        return bool(self._info().type == FileType.Directory)

    def stat(self) -> Stat:
        if not (info := self._info()).is_file:
            raise FileNotFoundError(f"{self} is not there")
        return Stat(info.size)

    def iterdir(self) -> Iterator[StoragePath]:
        from pyarrow.fs import FileSelector

        for info in self.files.get_file_info(FileSelector(self.path, allow_not_found=True)):
            yield self / info.base_name

    def sizes(self) -> dict[str, int]:
        """Bytes of every file below, by its name from here."""
        from pyarrow.fs import FileSelector

        found = self.files.get_file_info(FileSelector(self.path, allow_not_found=True, recursive=True))
        return {info.path.removeprefix(f"{self.path}/"): info.size for info in found if info.is_file}

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        self.files.create_dir(self.path, recursive=True)

    def open(self, mode: Literal["rb", "wb"]) -> Any:
        """A stream of pyarrow's; what is written is there when it is closed, as a whole."""
        return self.files.open_input_file(self.path) if mode == "rb" else self.files.open_output_stream(self.path)

    def read_bytes(self) -> bytes:
        with self.open("rb") as stream:
            return bytes(stream.read())

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, content: bytes) -> None:
        with self.open("wb") as stream:
            stream.write(content)

    def write_text(self, content: str) -> None:
        self.write_bytes(content.encode())

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self.files.delete_file(self.path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def move(self, target: StoragePath) -> None:
        """A file, which object stores copy."""
        self.files.move(self.path, target.path)

    def rmtree(self) -> None:
        """A directory with all below; nothing where there is none."""
        if self.is_dir():
            self.files.delete_dir(self.path)


Place = Path | StoragePath


def place_of(text: str | Path | StoragePath) -> Place:
    """A path, or what a URI stands for; `file://` is a path."""
    if isinstance(text, StoragePath):
        return text
    if not URI.match(str(text)):
        return Path(text)
    return Path(str(text).removeprefix("file://")) if str(text).startswith("file:///") else StoragePath(str(text))


def seen(file: Place, size: int) -> bool:
    """Whether a file that another machine has written is there in this size, or comes within `VISIBLE_SECONDS`."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while True:
        try:
            if file.stat().st_size == size:
                return True
        except FileNotFoundError:
            pass
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.2)
