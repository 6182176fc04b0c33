"""Weights as safetensors files in shared memory: for engines on the learner's own node.

/dev/shm/vlarl-<run_id>-<pid>-<random>/
    owner.lock                       held by the publisher for as long as its process lives
    v000012/bucket_0000.safetensors  a full version; it is `v000012.partial` until its last bucket is written
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vlarl_rllib.settings.transports import DEFAULT_TRANSPORT
from vlarl_rllib.types import WeightManifest
from vlarl_rllib.weights.buckets import pack_buckets
from vlarl_rllib.weights.protocol import NamedTensors, Shapes, WeightTransport

if TYPE_CHECKING:
    from vlarl_rllib.settings import WeightSettings

logger = logging.getLogger(__name__)

DEFAULT_ROOT = "/dev/shm"
DIRECTORY_PREFIX = "vlarl-"
LOCK_FILE = "owner.lock"
VERSIONS_AT_ONCE = 2
"""The last version stays readable while the next is written."""
HASH_BLOCK_BYTES = 2**22


class SharedMemoryPublisher:
    """Writes versions of the weights and owns them; what a dead publisher left under `root` goes first.

    Extra memory beside the files is one bucket. A process that ends normally leaves nothing; one that is killed leaves
    its directory to the next publisher's `reap_stale`.

    Args:
        run_id: tells runs apart in a directory listing; letters, digits, `.`, `_` and `-`.
        bucket_bytes: about the size of a file.
        root: a file system in memory that the engines see under the same path.
        checksum: put a SHA-256 of each bucket in the manifest.
        version_bytes: size of one version, if known, to learn now rather than later that there is no room.
        transport: what manifests say, for readers to find `SharedMemoryTransport`.

    Raises:
        ValueError: a `run_id` that is no file name.
        OSError: no room for two versions of `version_bytes`.
    """

    def __init__(
        self,
        *,
        run_id: str,
        bucket_bytes: int,
        root: str | Path = DEFAULT_ROOT,
        checksum: bool = False,
        version_bytes: int = 0,
        transport: str = DEFAULT_TRANSPORT,
    ) -> None:
        if not re.fullmatch(r"[\w.-]+", run_id):
            raise ValueError(f"run_id={run_id!r} must consist of letters, digits, '.', '_' and '-'")
        self._root = Path(root)
        reap_stale(self._root)
        _require_space(self._root, VERSIONS_AT_ONCE * version_bytes)
        self._bucket_bytes = bucket_bytes
        self._checksum = checksum
        self._transport = transport
        self._last_version: int | None = None
        self.directory, lock = _create_owned(self._root, f"{DIRECTORY_PREFIX}{run_id}-{os.getpid()}")
        self._finalizer = weakref.finalize(self, _remove_owned, self.directory, lock, os.getpid())

    def publish(self, version: int, tensors: NamedTensors) -> WeightManifest:
        """See `WeightPublisher.publish`."""
        if self._last_version is not None and version <= self._last_version:
            raise ValueError(f"version={version} must be above the last published one, {self._last_version}")
        target = self.directory / f"v{version:06d}"
        partial = target.with_name(f"{target.name}.partial")
        partial.mkdir()
        try:
            manifest = self._write(version, tensors, partial, target)
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._last_version = version
        return manifest

    def retire(self, before: int) -> None:
        """See `WeightPublisher.retire`. An engine that still reads such a version keeps its open file."""
        for path in self.directory.glob("v*"):
            if path.name.removeprefix("v").isdigit() and int(path.name.removeprefix("v")) < before:
                shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """See `WeightPublisher.close`."""
        self._finalizer()

    def _write(self, version: int, tensors: NamedTensors, partial: Path, target: Path) -> WeightManifest:
        names: list[str] = []
        checksums: list[str] = []
        num_tensors = num_bytes = 0
        for bucket in pack_buckets(tensors, self._bucket_bytes):
            bucket_bytes = sum(tensor.nbytes for tensor in bucket.values())
            _require_space(self._root, bucket_bytes)
            path = partial / f"bucket_{len(names):04d}.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in bucket.items()}, path)
            names.append(path.name)
            if self._checksum:
                checksums.append(_sha256(path))
            num_tensors += len(bucket)
            num_bytes += bucket_bytes
        if not names:
            raise ValueError(f"version {version} has no tensors; publish all of the policy's weights")
        return WeightManifest(
            version=version,
            transport=self._transport,
            location=str(target),
            buckets=tuple(names),
            num_tensors=num_tensors,
            num_bytes=num_bytes,
            checksums=tuple(checksums) if self._checksum else None,
        )


class SharedMemoryReader:
    """Maps the buckets into memory; nothing is copied before the engine itself copies."""

    def verify(self, manifest: WeightManifest) -> Shapes:
        """See `WeightReader.verify`."""
        shapes: Shapes = {}
        for index, path in enumerate(_paths(manifest)):
            with _still_there(manifest):
                if manifest.checksums is not None and _sha256(path) != manifest.checksums[index]:
                    raise ValueError(
                        f"SHA-256 of {path} differs from the manifest's; publish version {manifest.version} again"
                    )
                with safe_open(path, framework="pt") as bucket:
                    shapes |= {name: tuple(bucket.get_slice(name).get_shape()) for name in bucket.keys()}  # noqa: SIM118
        if len(shapes) != manifest.num_tensors:
            raise ValueError(
                f"{manifest.location} holds {len(shapes)} tensors, its manifest says {manifest.num_tensors}"
            )
        return shapes

    def buckets(self, manifest: WeightManifest) -> Iterator[dict[str, torch.Tensor]]:
        """See `WeightReader.buckets`."""
        for path in _paths(manifest):
            with _still_there(manifest):
                bucket = load_file(path)
            yield bucket


def _paths(manifest: WeightManifest) -> list[Path]:
    return [Path(manifest.location) / name for name in manifest.buckets]


@contextmanager
def _still_there(manifest: WeightManifest) -> Iterator[None]:
    """Around reading a file of the version: where there is none, the version is gone."""
    try:
        yield
    except FileNotFoundError as error:
        raise SharedMemoryTransport.version_gone(
            manifest.version, f"this machine has no {manifest.location}"
        ) from error


class SharedMemoryTransport(WeightTransport):
    """Files in /dev/shm. Engines are on the learner's own machine."""

    outlives_publisher = True
    lends_tensors = False
    on_host = True

    def make_publisher(self, settings: WeightSettings) -> SharedMemoryPublisher:
        """See `WeightTransport.make_publisher`."""
        return SharedMemoryPublisher(
            run_id="run",
            bucket_bytes=settings.bucket_mb * 2**20,
            checksum=settings.checksum,
            transport=self.name,
        )

    def make_reader(self) -> SharedMemoryReader:
        """See `WeightTransport.make_reader`."""
        return SharedMemoryReader()

    def sweep(self) -> None:
        """See `WeightTransport.sweep`."""
        reap_stale()


def reap_stale(root: str | Path = DEFAULT_ROOT) -> list[Path]:
    """Remove the directories of publishers that no longer live, and return them.

    The kernel drops a process's lock when it ends, however it ends. So a lock tells the living from the dead also
    where a process id has been given to another process, or means nothing because the owner is in another container.
    """
    removed = []
    for directory in Path(root).glob(f"{DIRECTORY_PREFIX}*"):
        try:
            lock = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # not a publisher's directory, already gone, or another user's
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(directory, ignore_errors=True)
            removed.append(directory)
            logger.info("removed %s, left by a process that was killed", directory)
        finally:
            os.close(lock)
    return removed


def _create_owned(root: Path, name: str) -> tuple[Path, int]:
    """Make a directory `name-<random>` with its lock held; it appears under its name only once it is locked.

    A process id is not enough for a name: one process may hold several publishers, and other containers have the same
    ids.
    """
    hidden = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
    lock = os.open(hidden / LOCK_FILE, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return hidden.rename(root / hidden.name.removeprefix(".")), lock
    except OSError:
        os.close(lock)
        shutil.rmtree(hidden, ignore_errors=True)
        raise


def _remove_owned(directory: Path, lock: int, owner_pid: int) -> None:
    """At close, garbage collection or exit; a forked child inherits the finalizer but not the directory."""
    if os.getpid() != owner_pid:
        return
    shutil.rmtree(directory, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.close(lock)


def _require_space(root: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(root).free
    if needed_bytes > free_bytes:
        raise OSError(
            f"weights need {needed_bytes:,} bytes in {root} and {free_bytes:,} are free; "
            f"enlarge it (docker run --shm-size=..., or mount -o remount,size=... {root})"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
