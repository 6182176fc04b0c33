"""The pool with engines that are a few lines of Python, in real Ray actors: start, push, death, hanging, giving up."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import ray

from vlarl_rllib.engines.pool import EnginePool, _Member
from vlarl_rllib.types import INITIAL_VERSION, Site, WeightBucket, WeightManifest
from vlarl_rllib.weights.sync import LoadedWeights, WeightSync

WORKER_START_SECONDS = 60


class Learners:
    """They publish one bucket of nothing, as any version."""

    def call(self, method: str, *args, **kwargs):
        return [getattr(self, method)(*args, **kwargs)]

    def place(self):
        return Site()

    def begin_publishing(self, version, transport, *, whole, keep):
        self.left = [WeightBucket(0, (), version, frozen=False)]
        return WeightManifest(version, transport, (), frozenset(), "", whole)

    def next_bucket(self, done):
        return self.left.pop() if self.left else None

    def end_publishing(self): ...


def fake_engine_class():
    """A class of this function, so that Ray ships it by value."""
    from vlarl_rllib.engines.protocol import EngineStatus
    from vlarl_rllib.types import HALF_LOADED
    from vlarl_rllib.weights.protocol import TransferError

    class FakeEngine:
        def __init__(self, spec, name):
            self.name, self.version, self.num_decisions = name, -1, 1
            if spec.model_path == "broken":
                raise OSError("no such checkpoint: broken")

        async def status(self):
            return EngineStatus(self.version, os.getpid(), "fake", "fake 1.0", 1, self.num_decisions, 0.0)

        async def ping(self):
            if self.num_decisions < 0:
                await asyncio.sleep(3600)
            return await self.status()

        async def begin_update(self, manifest):
            if manifest.version == 13:
                raise ValueError("weights do not fit the policy")

        async def feed(self, bucket):
            self.coming = bucket.handle
            if bucket.handle == 14 and self.version == 1:
                self.version = HALF_LOADED
                raise TransferError("it was damaged")

        async def end_update(self):
            self.version = self.coming

        async def abort_update(self, why): ...

        async def set_num_decisions(self, num_decisions):
            self.num_decisions = num_decisions

    import asyncio

    return FakeEngine


@pytest.fixture
def make_pool(starting_engine, spec):
    """Makes pools of fakes; meanwhile the real engine of other tests starts."""
    pools = []

    def make(num: int, **options) -> EnginePool:
        options = {"start_timeout_seconds": WORKER_START_SECONDS, "ping_timeout_seconds": 5} | options
        model_spec = options.pop("spec", spec)
        pool = EnginePool(
            model_spec, num, actor_options=[{"num_cpus": 0}] * num, engine_class=fake_engine_class(), **options
        )
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pool.shutdown()


def pids(pool: EnginePool) -> list[int]:
    return [status.pid for status in pool.statuses()]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def make_all_current(sync: WeightSync, pool: EnginePool, num: int) -> None:
    """Until so many run."""

    def all_are_there() -> bool:
        sync.make_engines_current()
        return len(pool.handles) == num

    assert wait_for(all_are_there, WORKER_START_SECONDS)


def test_engines_are_kept_well_and_current(make_pool):
    pool = make_pool(2, max_failures=2)
    pool.wait_until_ready()
    LoadedWeights(pool).make_engines_current()
    assert pool.num_restarts == 0 and pool.outdated(INITIAL_VERSION) == []
    sync = WeightSync(Learners(), pool, version=0, transport="object_store")
    sync.push()
    assert [status.policy_version for status in pool.statuses()] == [1, 1]
    first = pids(pool)

    with pytest.raises(ValueError, match="do not fit"):
        sync.push(above=12)
    assert pids(pool) == first and pool.num_restarts == 0
    sync.push(above=13)  # it does not arrive the first time, which costs no engine
    assert [status.policy_version for status in pool.statuses()] == [14, 14]
    assert pids(pool) == first and pool.num_restarts == 0

    sync.make_engines_current()  # who has sampled since has recovered

    # One dies and one hangs between the calls: both are replaced, and current before they are handed out.
    os.kill(first[0], signal.SIGKILL)
    ray.get(pool.handles[1].set_num_decisions.remote(-1))
    sync.make_engines_current()
    assert pool.handles, "the pool waits for one of them"
    make_all_current(sync, pool, 2)
    assert pool.num_restarts == 2
    assert [status.policy_version for status in pool.statuses()] == [14, 14]
    assert not set(pids(pool)) & set(first)
    assert wait_for(lambda: not any(map(is_alive, first)))

    # One dies just before a push.
    sync.make_engines_current()
    dead, lives = pids(pool)
    os.kill(dead, signal.SIGKILL)
    sync.push()
    assert lives in pids(pool), "the other one serves meanwhile"
    make_all_current(sync, pool, 2)
    assert [status.policy_version for status in pool.statuses()] == [15, 15]
    assert pool.num_restarts == 3

    # One starts well, but as it never samples an action it has not recovered: its next death ends the run.
    os.kill(pids(pool)[0], signal.SIGKILL)
    sync.make_engines_current()
    ray.get(pool._members[0].handle.set_num_decisions.remote(0))
    make_all_current(sync, pool, 2)
    os.kill(pids(pool)[0], signal.SIGKILL)
    with pytest.raises(RuntimeError, match="engine-0 failed 2 times in a row, at last with: "):
        sync.make_engines_current()

    left = pool.statuses()[1].pid
    pool.shutdown()
    pool.shutdown()
    assert pool.handles == []
    assert wait_for(lambda: not is_alive(left))


def test_an_engine_whose_node_died_is_missed_until_a_node_takes_its_place(make_pool, monkeypatch):
    """The other one serves; where it is the only one, the pool waits."""
    lost: set[int] = set()
    monkeypatch.setattr("vlarl_rllib.engines.pool.lost_bundles", lambda: lost)
    monkeypatch.setattr("vlarl_rllib.engines.pool.LOOK_SECONDS", 0.1)
    monkeypatch.setattr(_Member, "bundle", property(lambda member: 4 + member.index))
    pool = make_pool(2)
    pool.wait_until_ready()
    sync = WeightSync(Learners(), pool, version=0, transport="object_store")
    sync.push()
    first, second = pids(pool)
    lost.add(4)
    os.kill(first, signal.SIGKILL)
    for _ in range(3):
        sync.make_engines_current()
        assert pids(pool) == [second]
    sync.push()
    assert pids(pool) == [second]

    lost.add(5)
    os.kill(second, signal.SIGKILL)
    with ThreadPoolExecutor(1) as thread:
        current = thread.submit(sync.make_engines_current)
        with pytest.raises(TimeoutError):
            current.result(1.5)
        lost.remove(5)
        current.result(WORKER_START_SECONDS)
    assert [status.policy_version for status in pool.statuses()] == [2]
    lost.remove(4)
    make_all_current(sync, pool, 2)
    assert [status.policy_version for status in pool.statuses()] == [2, 2] and pool.num_restarts == 2


def test_a_start_that_cannot_work_says_why(make_pool, spec):
    pool = make_pool(1, max_failures=1, spec=replace(spec, model_path="broken"))
    with pytest.raises(RuntimeError, match=r"failed 1 times in a row, at last with: .*no such checkpoint: broken"):
        pool.wait_until_ready()
    assert pool.handles == []
