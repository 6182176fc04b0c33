"""One test for every transport that this machine can run: from a learner through `WeightSync` and `EnginePool` to
engines, all of them real Ray actors, some of which die."""

import os
import pickle
import re
import select
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from tests.weights.probe_transport import NUM_BUCKETS, PICKLED, ProbeEngine, ProbeLearner
from vlarl_rllib.engines.pool import EnginePool
from vlarl_rllib.engines.protocol import EngineError, EngineSpec
from vlarl_rllib.settings.transports import nixl_is_installed
from vlarl_rllib.types import HALF_LOADED, SampleRequest
from vlarl_rllib.weights.protocol import GoneError
from vlarl_rllib.weights.ray_transports import tensor_transport_options
from vlarl_rllib.weights.sync import WeightSync

SECONDS = 120
DAMAGED = "tests.weights.probe_transport:DamagingTransport"
REQUEST = SampleRequest(np.zeros((4, 4, 3), np.uint8), "push", 0, 1.0)


class Learners:
    """A group of one rank, as `WeightSync` sees it."""

    def __init__(self, transport: str, **arguments: Any) -> None:
        options = {"num_cpus": 0, "num_gpus": 0.25 if transport == "cuda_ipc" else 0}
        options |= tensor_transport_options(0, transport)
        self.rank = ray.remote(ProbeLearner).options(**options).remote(**arguments)

    def call(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        return [ray.get(getattr(self.rank, method).remote(*args, **kwargs), timeout=SECONDS)]


@pytest.fixture(scope="module", params=["object_store", "nixl", "cuda_ipc"])
def transport(request: pytest.FixtureRequest) -> str:
    """Each in turn."""
    if request.param == "nixl" and not nixl_is_installed():
        pytest.skip("nixl is not installed")
    if request.param == "cuda_ipc" and not torch.cuda.is_available():
        pytest.skip("cuda_ipc needs a GPU")
    return str(request.param)


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a named pipe keeps the next engine that loads; see `ProbeStepper`."""
    return tmp_path_factory.mktemp("trap") / "pipe"


@pytest.fixture(scope="module")
def pool(ray_session: None, trap: Path, transport: str) -> Iterator[EnginePool]:
    spec = EngineSpec(
        str(trap), "openvla", "float32", gpus=0, max_batch=1, enforce_eager=True, mix_calls=True, seed=0,
        transport=transport,
    )  # fmt: skip
    options = [{"num_cpus": 0, "num_gpus": 0.25 if transport == "cuda_ipc" else 0}]
    pool = EnginePool(
        spec, 1, actor_options=options, start_timeout_seconds=SECONDS, engine_class=ProbeEngine, max_failures=100
    )
    yield pool
    pool.shutdown()


@pytest.fixture(scope="module")
def all_learners(pool: EnginePool, transport: str) -> Iterator[list[Learners]]:
    """Three, which start while the engine does: one that lives, one that dies in the middle of a push, and one more."""
    made = [Learners(transport), Learners(transport, dies_at=3), Learners(transport)]
    pool.wait_until_ready()
    yield made
    for learners in made:
        ray.kill(learners.rank)


@pytest.fixture
def learners(all_learners: list[Learners]) -> Learners:
    return all_learners[0]


def state_of(pool: EnginePool) -> tuple[int, list[float]]:
    """The version and the weights in the one engine."""
    (handle,) = pool.handles
    status = ray.get(handle.ping.remote(), timeout=SECONDS)  # behind whatever its thread is at
    return status.policy_version, ray.get(handle.values.remote(), timeout=SECONDS)


def num_loaded(pool: EnginePool) -> int:
    return ray.get(pool.handles[0].num_loaded.remote(), timeout=SECONDS)


def kill_engine(pool: EnginePool) -> None:
    (pid,) = pool.pids
    os.kill(pid, signal.SIGKILL)


def test_versions_arrive_and_outlive_the_engines_that_read_them(pool, learners, trap, transport):
    sync, pid = WeightSync(learners, pool, version=0, transport=transport), learners.call("pid")
    learners.call("learn", 10.0)
    manifest = sync.push()
    assert (manifest.transport, manifest.whole, manifest.frozen) == (transport, True, {"layers.0.proj.weight"})
    assert (len(manifest.tensors), manifest.num_bytes, manifest.snapshot_bytes) == (NUM_BUCKETS, 4 * 2**20, 0)
    assert state_of(pool) == (1, [0.0, 11.0, 12.0, 13.0])
    # What training does not change does not travel twice.
    before = num_loaded(pool)
    learners.call("learn", 20.0)
    assert sync.push().num_bytes == 3 * 2**20 and num_loaded(pool) == before + 3
    assert state_of(pool) == (2, [0.0, 21.0, 22.0, 23.0])

    # It dies between two pushes: the one in its place gets the same version, all of it, published once more.
    kill_engine(pool)
    sync.make_engines_current()
    assert pool.num_restarts == 1 and state_of(pool) == (2, [0.0, 21.0, 22.0, 23.0])

    # It dies with one bucket of four loaded: the learner lives, and the next engine gets the version from the start.
    learners.call("learn", 30.0)
    os.mkfifo(trap)
    pipe = os.open(trap, os.O_RDONLY | os.O_NONBLOCK)
    with ThreadPoolExecutor(1) as thread:
        pushed = thread.submit(sync.push)
        assert select.select([pipe], [], [], SECONDS)[0]
        kill_engine(pool)
        assert pushed.result(SECONDS).version == 3
    os.close(pipe)
    assert pool.num_restarts == 2 and state_of(pool) == (3, [0.0, 31.0, 32.0, 33.0])
    assert learners.call("pid") == pid


def test_a_kept_version_is_read_without_the_learners(pool, learners, transport):
    sync = WeightSync(learners, pool, version=10, transport=transport, keep=True)
    learners.call("learn", 40.0)
    manifest = sync.push()
    assert (manifest.whole, manifest.snapshot_bytes) == (True, 4 * 2**20)
    learners.call("learn", 50.0)
    kill_engine(pool)
    sync.make_engines_current()
    assert state_of(pool) == (11, [0.0, 41.0, 42.0, 43.0])  # not what the learners have by now
    manifest = sync.push()
    assert (manifest.whole, manifest.num_bytes, manifest.snapshot_bytes) == (False, 3 * 2**20, 4 * 2**20)
    assert state_of(pool) == (12, [0.0, 51.0, 52.0, 53.0])


def test_weights_that_do_not_fit_are_refused_before_the_engine_is_touched(pool, learners, transport):
    before, restarts = state_of(pool), pool.num_restarts
    for wrong, message in (
        ({"side": 511}, r"wrong shape layers\.0\.proj\.weight \[511, 512\] instead of \[512, 512\]"),
        ({"names": "blocks"}, r"missing layers\.0.*unexpected blocks\.0"),
    ):
        learners.call("become", **wrong)
        with pytest.raises(ValueError, match=message):
            WeightSync(learners, pool, version=20, transport=transport).push()
    learners.call("become")
    assert (state_of(pool), pool.num_restarts) == (before, restarts)


def test_a_learner_that_dies_in_the_middle_leaves_an_engine_that_samples_nothing(pool, all_learners, transport):
    (handle,), restarts = pool.handles, pool.num_restarts
    learners, mortal, _ = all_learners
    mortal.call("learn", 60.0)
    with pytest.raises(RayActorError):
        WeightSync(mortal, pool, version=30, transport=transport).push()
    assert state_of(pool)[0] == HALF_LOADED
    with pytest.raises(RayTaskError) as refused:
        ray.get(handle.sample.remote([REQUEST]), timeout=SECONDS)
    assert isinstance(refused.value.cause, EngineError) and "weights of two versions" in str(refused.value)
    # The engine is well: a whole version makes it sample again.
    sync = WeightSync(learners, pool, version=40, transport=transport)
    learners.call("learn", 70.0)
    sync.push()
    assert state_of(pool) == (41, [0.0, 71.0, 72.0, 73.0]) and pool.handles == [handle]
    assert ray.get(handle.sample.remote([REQUEST]), timeout=SECONDS)[0].policy_version == 41
    assert pool.num_restarts == restarts


def test_a_kept_version_that_died_with_its_learner_is_published_anew(pool, all_learners, transport):
    learners, _, mortal = all_learners
    sync = WeightSync(mortal, pool, version=50, transport=transport, keep=True)
    sync.push()
    os.kill(mortal.call("pid")[0], signal.SIGKILL)
    kill_engine(pool)
    with pytest.raises(RayActorError):  # nobody can publish
        sync.make_engines_current()
    lost, mortal.rank = mortal.rank, learners.rank
    sync.make_engines_current()
    assert state_of(pool)[0] == sync.version > 51
    mortal.rank = lost


def test_a_transport_of_somebody_elses_is_as_good(pool, learners):
    """The one in docs/extending.md."""
    learners.call("learn", 75.0)
    assert WeightSync(learners, pool, version=55, transport=PICKLED).push().transport == PICKLED
    assert state_of(pool) == (56, [0.0, 76.0, 77.0, 78.0])


def test_damage_is_noticed_before_it_reaches_the_model(pool, learners):
    sync, restarts = WeightSync(learners, pool, version=60, transport=DAMAGED), pool.num_restarts
    learners.call("learn", 80.0)
    sync.push()  # the second bucket is damaged the first time
    assert state_of(pool) == (61, [0.0, 81.0, 82.0, 83.0]) and pool.num_restarts == restarts


def test_the_error_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(GoneError("it was freed")))
    assert re.fullmatch("the weights are gone: it was freed", str(error))
