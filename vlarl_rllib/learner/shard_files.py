"""torch's sharded checkpoints on any storage that `process.storage` knows: each rank writes and reads it by itself."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader, FileSystemWriter

from vlarl_rllib.process.storage import FileFacts, Place

COPY_BYTES = 2**24
"""At once, when a shard is fetched."""


class ShardFiles(FileSystemBase):
    """One directory, as torch's writer and reader see a file system; paths are names in it.

    Args:
        directory: with the shards.
    """

    def __init__(self, directory: Place) -> None:
        self._directory = directory
        self.written: dict[str, FileFacts] = {}
        """By name, of what was written through this object."""

    def writer(self) -> FileSystemWriter:
        """Of local files it waits until they are on the disk; storage behind a URI does so by itself."""
        writer = FileSystemWriter("", sync_files=isinstance(self._directory, Path))
        writer.fs, writer.path = self, ""
        return writer

    def reader(self) -> FileSystemReader:
        reader = FileSystemReader("")
        reader.fs, reader.path = self, ""
        return reader

    # What torch asks of a file system

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        name = str(path)
        if mode == "rb":
            with (self._directory / name).open("rb") as stream, self._near(stream) as near:
                yield near
            return
        with (self._directory / name).open("wb") as stream:
            counting = _Counting(stream)
            yield counting
        self.written[name] = FileFacts(counting.num_bytes, counting.digest.hexdigest())

    @contextmanager
    def _near(self, stream: Any) -> Iterator[Any]:
        """The same, on this machine: torch reads a shard in many small pieces, each a request to the storage."""
        if isinstance(self._directory, Path):
            yield stream
            return
        with tempfile.TemporaryFile(prefix="vlarl-shard-") as scratch:
            shutil.copyfileobj(stream, scratch, COPY_BYTES)
            scratch.seek(0)
            yield scratch

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return suffix

    def init_path(self, path: str | os.PathLike[str]) -> str:
        return ""

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        old, new = self._directory / str(path), self._directory / str(new_path)
        if isinstance(old, Path):
            old.rename(str(new))
        else:
            new.write_bytes(old.read_bytes())
            old.unlink()
        self.written[str(new_path)] = self.written.pop(str(path))

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return (self._directory / str(path)).exists()

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        (self._directory / str(path)).unlink()


class _Counting:
    """A stream that is written from front to back, and what has gone through it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.digest, self.num_bytes = hashlib.sha256(), 0

    def write(self, content: Any) -> int:
        self._stream.write(content)
        self.digest.update(content)
        size = memoryview(content).nbytes
        self.num_bytes += size
        return size

    def tell(self) -> int:
        return self.num_bytes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
