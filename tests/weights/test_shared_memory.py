"""Publishing through files in shared memory: whole versions only, bounded life, nothing left behind."""

import multiprocessing
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vlarl_rllib.settings import WeightSettings
from vlarl_rllib.weights import find_transport, make_reader
from vlarl_rllib.weights.protocol import VersionGoneError
from vlarl_rllib.weights.shared_memory import SharedMemoryPublisher, SharedMemoryReader, reap_stale


def some_tensors(value: float = 0.0):
    return iter([(f"layers.{i}.proj.weight", torch.full((4, 4), value + i)) for i in range(5)])


@pytest.fixture
def publisher(tmp_path: Path):
    publisher = SharedMemoryPublisher(run_id="test", bucket_bytes=128, root=tmp_path, checksum=True)
    yield publisher
    publisher.close()


def read(manifest):
    return {
        name: tensor.clone() for bucket in SharedMemoryReader().buckets(manifest) for name, tensor in bucket.items()
    }


def test_a_version_is_read_as_it_was_written(publisher):
    manifest = publisher.publish(7, some_tensors())
    # 64 bytes a tensor, two to a bucket of 128
    assert (manifest.version, manifest.num_tensors, manifest.num_bytes, len(manifest.buckets)) == (7, 5, 320, 3)
    assert Path(manifest.location).name == "v000007"
    assert SharedMemoryReader().verify(manifest) == {f"layers.{i}.proj.weight": (4, 4) for i in range(5)}
    tensors = read(manifest)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in some_tensors())


def test_the_last_version_stays_until_it_is_retired(publisher):
    first = publisher.publish(1, some_tensors(1.0))
    second = publisher.publish(2, some_tensors(2.0))
    assert read(first)["layers.0.proj.weight"][0, 0] == 1.0
    publisher.retire(before=2)
    assert read(second)["layers.0.proj.weight"][0, 0] == 2.0
    for attempt in (SharedMemoryReader().verify, lambda manifest: list(SharedMemoryReader().buckets(manifest))):
        with pytest.raises(VersionGoneError, match="version 1 is gone: it was retired"):
            attempt(first)


def test_versions_must_rise(publisher):
    publisher.publish(3, some_tensors())
    for version in (3, 2):
        with pytest.raises(ValueError, match=f"version={version} must be above the last published one, 3"):
            publisher.publish(version, some_tensors())


def test_a_push_that_fails_leaves_no_trace(publisher):
    first = publisher.publish(1, some_tensors())

    def breaks():
        yield from some_tensors()
        raise RuntimeError("a rank died")

    for tensors, error in ((breaks(), RuntimeError), (iter([]), ValueError)):
        with pytest.raises(error):
            publisher.publish(2, tensors)
    assert sorted(path.name for path in publisher.directory.iterdir()) == ["owner.lock", "v000001"]
    assert SharedMemoryReader().verify(first)
    publisher.publish(2, some_tensors())


def test_damaged_or_incomplete_versions_are_refused(publisher):
    manifest = publisher.publish(1, some_tensors())
    with pytest.raises(ValueError, match="holds 5 tensors, its manifest says 6"):
        SharedMemoryReader().verify(replace(manifest, num_tensors=6))
    bucket = Path(manifest.location) / manifest.buckets[1]
    content = bytearray(bucket.read_bytes())
    content[-1] ^= 1
    bucket.write_bytes(content)
    with pytest.raises(ValueError, match="SHA-256"):
        SharedMemoryReader().verify(manifest)


def test_too_little_room_is_said_in_numbers(tmp_path: Path):
    with pytest.raises(
        OSError, match=r"weights need 2,000,000,000,000,000 bytes in .* and [\d,]+ are free; enlarge it"
    ):
        SharedMemoryPublisher(run_id="test", bucket_bytes=1, root=tmp_path, version_bytes=10**15)
    assert list(tmp_path.iterdir()) == []


def test_close_is_idempotent_and_removes_everything(tmp_path: Path):
    publisher = SharedMemoryPublisher(run_id="test", bucket_bytes=1, root=tmp_path)
    publisher.publish(1, some_tensors())
    publisher.close()
    publisher.close()
    assert list(tmp_path.iterdir()) == []


PUBLISH_AND_END = """
import sys, torch
from vlarl_rllib.weights.shared_memory import SharedMemoryPublisher
publisher = SharedMemoryPublisher(run_id="child", bucket_bytes=1, root=sys.argv[1])
publisher.publish(1, iter([("weight", torch.zeros(2))]))
assert publisher.directory.is_dir()
"""


def test_a_process_that_ends_normally_leaves_nothing(tmp_path: Path):
    subprocess.run([sys.executable, "-c", PUBLISH_AND_END, str(tmp_path)], check=True)
    assert list(tmp_path.iterdir()) == []


def _publish_and_wait(root: Path, published) -> None:
    publisher = SharedMemoryPublisher(run_id="child", bucket_bytes=1, root=root)
    publisher.publish(1, some_tensors())
    published.set()
    time.sleep(60)


def test_only_what_a_killed_process_left_is_reaped(tmp_path: Path):
    own = SharedMemoryPublisher(run_id="own", bucket_bytes=1, root=tmp_path)
    (tmp_path / "vlarl-not-a-publisher").mkdir()
    context = multiprocessing.get_context("fork")
    published = context.Event()
    child = context.Process(target=_publish_and_wait, args=(tmp_path, published))
    child.start()
    assert published.wait(30)
    assert reap_stale(tmp_path) == []
    child.kill()
    child.join()
    (abandoned,) = tmp_path.glob(f"vlarl-child-{child.pid}-*")
    assert reap_stale(tmp_path) == [abandoned]
    assert own.directory.is_dir() and (tmp_path / "vlarl-not-a-publisher").is_dir()
    own.close()


def test_one_process_may_hold_several_of_one_run(tmp_path: Path):
    first, second = (SharedMemoryPublisher(run_id="run", bucket_bytes=1, root=tmp_path) for _ in range(2))
    assert first.directory != second.directory and reap_stale(tmp_path) == []
    first.close()
    assert second.publish(1, some_tensors()).num_tensors and second.directory.is_dir()
    second.close()
    assert list(tmp_path.iterdir()) == []


def test_settings_choose_the_transport():
    settings = WeightSettings(transport="auto", bucket_mb=1, checksum=True)
    publisher = find_transport(settings.transport).make_publisher(settings)
    try:
        manifest = publisher.publish(1, some_tensors())
        assert manifest.checksums is not None
        assert len(make_reader(manifest.transport).verify(manifest)) == 5
    finally:
        publisher.close()
    with pytest.raises(ValueError, match="'carrier_pigeon': choose one of auto, shared_memory, or name a class"):
        make_reader("carrier_pigeon")
