"""A transport that no file of the package knows, named by `module:Class`, in place of the package's own: from a learner
through `WeightSync` and `EnginePool` to engines, all of them real Ray actors, some of which die."""

import os
import pickle
import re
import select
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from tests.weights.probe_transport import OBJECT_STORE, FakeEngine, FakeLearner
from vlarl_rllib.engines.pool import EnginePool
from vlarl_rllib.engines.protocol import EngineSpec
from vlarl_rllib.weights.protocol import VersionGoneError
from vlarl_rllib.weights.sync import WeightSync

SECONDS = 120


class Learners:
    """A group of one rank, as `WeightSync` sees it, and another rank that is ready to take its place."""

    def __init__(self) -> None:
        self.ranks = [ray.remote(FakeLearner).options(num_cpus=0).remote(OBJECT_STORE) for _ in range(2)]

    @property
    def rank(self) -> Any:
        return self.ranks[0]

    def lose(self) -> None:
        os.kill(self.call("pid")[0], signal.SIGKILL)

    def replace(self) -> None:
        del self.ranks[0]

    def publish_weights(self, version: int) -> Any:
        return ray.get(self.rank.publish_weights.remote(version), timeout=SECONDS)

    def call(self, method: str, *args: Any) -> list[Any]:
        return [ray.get(getattr(self.rank, method).remote(*args), timeout=SECONDS)]


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a named pipe keeps the next engine that loads; see `FakeEngine`."""
    return tmp_path_factory.mktemp("trap") / "pipe"


@pytest.fixture(scope="module")
def pool(ray_session: None, trap: Path) -> Iterator[EnginePool]:
    spec = EngineSpec(str(trap), "openvla", "float32", gpus=0, max_batch=1, enforce_eager=True, mix_calls=True, seed=0)
    pool = EnginePool(spec, 1, actor_options=[{"num_cpus": 0}], start_timeout_seconds=SECONDS, engine_class=FakeEngine)
    yield pool
    pool.shutdown()


@pytest.fixture(scope="module")
def learners(pool: EnginePool) -> Iterator[Learners]:
    """They start while the engine does."""
    learners = Learners()
    pool.wait_until_ready()
    yield learners
    for rank in learners.ranks:
        ray.kill(rank)


def weights_of(pool: EnginePool) -> tuple[int, list[float]]:
    """The version and the weights in the one engine."""
    (handle,) = pool.handles
    status = ray.get(handle.status.remote(), timeout=SECONDS)
    return status.policy_version, ray.get(handle.values.remote(), timeout=SECONDS)


def kill_engine(pool: EnginePool) -> None:
    (pid,) = pool.pids
    os.kill(pid, signal.SIGKILL)


def test_versions_arrive_and_outlive_the_engines_that_read_them(pool, learners, trap):
    sync, pid = WeightSync(learners, pool, version=0), learners.call("pid")
    learners.call("learn", 10.0)
    manifest = sync.push()
    assert manifest.transport == OBJECT_STORE and len(manifest.buckets) == 3
    assert (manifest.num_tensors, manifest.num_bytes) == (3, 3 * 2**20)
    assert weights_of(pool) == (1, [10.0, 11.0, 12.0])
    learners.call("learn", 20.0)
    sync.push()
    assert weights_of(pool) == (2, [20.0, 21.0, 22.0])

    # It dies between two pushes: the one in its place reads the same version, without the learner.
    kill_engine(pool)
    sync.make_engines_current()
    assert pool.num_restarts == 1 and weights_of(pool) == (2, [20.0, 21.0, 22.0])

    # It dies with one bucket of three loaded: the learner lives, and the next engine reads the version from the start.
    learners.call("learn", 30.0)
    os.mkfifo(trap)
    pipe = os.open(trap, os.O_RDONLY | os.O_NONBLOCK)
    with ThreadPoolExecutor(1) as thread:
        pushed = thread.submit(sync.push)
        assert select.select([pipe], [], [], SECONDS)[0]
        kill_engine(pool)
        assert pushed.result(SECONDS).version == 3
    os.close(pipe)
    assert pool.num_restarts == 2 and weights_of(pool) == (3, [30.0, 31.0, 32.0])
    assert learners.call("pid") == pid


def test_a_version_that_died_with_its_learner_says_so_and_is_published_anew(pool, learners):
    sync = WeightSync(learners, pool, version=10)
    learners.call("learn", 40.0)
    manifest = sync.push()
    assert pool.ensure_current(manifest) == 0
    learners.lose()
    kill_engine(pool)
    with pytest.raises(VersionGoneError) as gone:
        pool.ensure_current(manifest)
    assert re.fullmatch(
        r"weights version 11 is gone: it died with the learner that published it \(\w+Error\); publish the weights "
        "again, as a new version",
        str(gone.value),
    )
    assert weights_of(pool)[0] == -1  # the engine in the dead one's place is well, and has what it started with

    with pytest.raises(RayActorError):  # nobody can publish
        sync.make_engines_current()
    learners.replace()
    learners.call("learn", 50.0)
    sync.make_engines_current()
    assert weights_of(pool) == (sync.version, [50.0, 51.0, 52.0]) and sync.version > manifest.version


class Versions:
    """Learners and engines in one; the versions in `lost` die before anybody has loaded them."""

    def __init__(self, lost: set[int]) -> None:
        self.lost, self.loaded, self.retired = lost, 0, 0

    def publish_weights(self, version: int) -> Any:
        return version

    def load_weights(self, manifest: Any) -> None:
        if manifest in self.lost:
            raise VersionGoneError(manifest, "lost")
        self.loaded = manifest

    ensure_current = load_weights

    def call(self, method: str, before: int) -> list[None]:
        assert method == "retire_weights"
        self.retired = before
        return [None]


def test_a_version_that_is_lost_during_a_push_is_pushed_once_more():
    versions = Versions(lost={4})
    sync = WeightSync(versions, versions, version=3)
    assert (sync.push(), sync.version, versions.loaded, versions.retired) == (5, 5, 5, 5)
    versions.lost = {6, 7}
    with pytest.raises(VersionGoneError, match="version 7 is gone"):
        sync.push()
    assert (sync.manifest, versions.retired) == (5, 5)  # what engines have stays readable


def test_the_error_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(VersionGoneError(3, "it was retired")))
    assert (error.version, str(error)) == (3, str(VersionGoneError(3, "it was retired")))
