"""The pool with engines that are a few lines of Python, in real Ray actors: start, push, death, hanging, giving up."""

import os
import signal
import time
from dataclasses import replace

import pytest
import ray

from vlarl_rllib.engines.pool import EnginePool
from vlarl_rllib.types import WeightManifest

WORKER_START_SECONDS = 60


def manifest(version: int) -> WeightManifest:
    return WeightManifest(version, "shared_memory", "/nowhere", (), 0, 0)


def fake_engine_class():
    """A class of this function, so that Ray ships it by value."""
    from vlarl_rllib.engines.protocol import EngineStatus

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

        async def load_weights(self, manifest):
            if manifest.version == 13:
                raise ValueError("weights do not fit the policy")
            self.version = manifest.version
            return self.version

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


def test_engines_are_kept_well_and_current(make_pool):
    pool = make_pool(2, max_failures=2)
    pool.wait_until_ready()
    assert pool.ensure_current(None) == 0
    assert pool.load_weights(manifest(1)) == 0
    assert [status.policy_version for status in pool.statuses()] == [1, 1]
    first = pids(pool)

    with pytest.raises(ValueError, match="do not fit"):
        pool.load_weights(manifest(13))
    assert pids(pool) == first and pool.num_restarts == 0

    # One dies and one hangs between the calls: both are replaced, and current before they are handed out.
    os.kill(first[0], signal.SIGKILL)
    ray.get(pool.handles[1].set_num_decisions.remote(-1))
    assert pool.ensure_current(manifest(2)) == 2
    assert [status.policy_version for status in pool.statuses()] == [2, 2]
    assert not set(pids(pool)) & set(first)
    assert wait_for(lambda: not any(map(is_alive, first)))

    # One has missed a version; one dies just before a push.
    assert pool.ensure_current(manifest(3)) == 0
    os.kill(pids(pool)[0], signal.SIGKILL)
    assert pool.load_weights(manifest(4)) == 1
    assert [status.policy_version for status in pool.statuses()] == [4, 4]
    assert pool.num_restarts == 3

    # That one started well, but as it never samples an action it has not recovered: its next death ends the run.
    ray.get(pool.handles[0].set_num_decisions.remote(0))
    assert pool.ensure_current(manifest(4)) == 0
    os.kill(pids(pool)[0], signal.SIGKILL)
    with pytest.raises(RuntimeError, match="engine-0 failed 2 times in a row, at last with: "):
        pool.ensure_current(manifest(4))

    left = pool.statuses()[1].pid
    pool.shutdown()
    pool.shutdown()
    assert pool.handles == []
    assert wait_for(lambda: not is_alive(left))


def test_a_start_that_cannot_work_says_why(make_pool, spec):
    pool = make_pool(1, max_failures=1, spec=replace(spec, model_path="broken"))
    with pytest.raises(RuntimeError, match=r"failed 1 times in a row, at last with: .*no such checkpoint: broken"):
        pool.wait_until_ready()
    assert pool.handles == []
