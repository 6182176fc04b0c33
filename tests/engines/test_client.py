"""Samplers as a rollout loop sees them: one queue, every request answered exactly once."""

import queue
import threading
from collections import Counter
from concurrent.futures import Future

import numpy as np
import pytest
from engine_helpers import make_requests
from ray.exceptions import RayActorError

from vlarl_rllib.engines.client import LocalSampler, RemoteSampler
from vlarl_rllib.engines.protocol import EngineError
from vlarl_rllib.engines.torch_engine import TorchEngine
from vlarl_rllib.types import INITIAL_VERSION, SampleReply, SampleRequest

SECONDS = 30
REQUEST = SampleRequest(np.zeros((28, 28, 3), np.uint8), "push", 0, 1.0)


class FakeEngine:
    """Looks like an actor handle; calls stay open until the test answers them."""

    def __init__(self) -> None:
        self.sample = self
        self.calls: list[tuple[list[SampleRequest], Future]] = []

    def remote(self, requests):
        self.calls.append((requests, Future()))
        return FakeRef(self.calls[-1][1])

    @property
    def num_requests(self) -> int:
        return sum(len(requests) for requests, _ in self.calls)

    def answer(self, index: int = 0) -> None:
        requests, future = self.calls[index]
        future.set_result([SampleReply(np.full(7, r.seed), np.zeros(7), 1) for r in requests])

    def fail(self, error: Exception, index: int = 0) -> None:
        self.calls[index][1].set_exception(error)


class FakeRef:
    def __init__(self, future: Future) -> None:
        self._future = future

    def future(self) -> Future:
        return self._future


@pytest.fixture
def completions() -> queue.SimpleQueue:
    return queue.SimpleQueue()


def drain(completions: queue.SimpleQueue) -> dict:
    """Completions by key, each of which must have come once."""
    items = [completions.get_nowait() for _ in range(completions.qsize())]
    assert all(count == 1 for count in Counter(key for key, _ in items).values())
    return dict(items)


def test_requests_go_to_the_least_loaded_engine(completions):
    engines = [FakeEngine(), FakeEngine()]
    sampler = RemoteSampler(completions, engines)
    for key in range(5):
        sampler.submit(key, REQUEST)
    assert sorted(engine.num_requests for engine in engines) == [2, 3]
    busy, idle = sorted(engines, key=lambda engine: -engine.num_requests)
    for index in range(2):
        idle.answer(index)
    for key in range(5, 7):
        sampler.submit(key, REQUEST)
    assert (busy.num_requests, idle.num_requests) == (3, 4)
    assert len(drain(completions)) == 2 and sampler.num_outstanding == 5


def test_many_requests_travel_in_one_call_per_engine(completions):
    engines = [FakeEngine(), FakeEngine()]
    sampler = RemoteSampler(completions, engines)
    sampler.submit_many([(f"slot{seed}", SampleRequest(REQUEST.image, "push", seed, 1.0)) for seed in range(8)])
    assert [[len(requests) for requests, _ in engine.calls] for engine in engines] == [[4], [4]]
    for engine in engines:
        engine.answer()
    assert {key: reply.tokens[0] for key, reply in drain(completions).items()} == {f"slot{i}": i for i in range(8)}


def test_who_shares_a_call_does_not_depend_on_what_is_in_flight(completions):
    engines = [FakeEngine(), FakeEngine()]
    sampler = RemoteSampler(completions, engines)
    requests = [(seed, SampleRequest(REQUEST.image, "push", seed, 1.0)) for seed in range(4)]
    for _ in range(3):
        sampler.submit("other", REQUEST)
    for _ in range(2):
        sampler.submit_many(requests)
    shares = [
        sorted(request.seed for request in call) for engine in engines for call, _ in engine.calls if len(call) > 1
    ]
    assert sorted(shares) == [[0, 2], [0, 2], [1, 3], [1, 3]]


def test_a_lost_engine_completes_all_it_owes_and_gets_no_more(completions):
    lost, well = FakeEngine(), FakeEngine()
    sampler = RemoteSampler(completions, [lost, well])
    for key in range(6):
        sampler.submit(key, REQUEST)
    lost.fail(RayActorError(), 1)
    outcomes = drain(completions)
    assert len(outcomes) == 3 and all(isinstance(error, EngineError) for error in outcomes.values())
    lost.answer(0)  # comes too late to count
    lost.fail(EngineError("later still"), 2)
    assert drain(completions) == {}
    sampler.submit(6, REQUEST)
    assert (lost.num_requests, well.num_requests, sampler.num_engines) == (3, 4, 1)
    for index in range(4):
        well.answer(index)
    assert len(drain(completions)) == 4 and sampler.num_outstanding == 0


def test_without_an_engine_requests_fail_at_once_until_one_is_attached(completions):
    sampler = RemoteSampler(completions)
    sampler.submit_many([(0, REQUEST), (1, REQUEST)])
    assert all(isinstance(error, EngineError) for error in drain(completions).values())
    engine = FakeEngine()
    sampler.attach([engine])
    sampler.submit(2, REQUEST)
    engine.answer()
    assert isinstance(drain(completions)[2], SampleReply)


def test_attaching_keeps_loads_and_lets_old_calls_complete(completions):
    old, kept, new = FakeEngine(), FakeEngine(), FakeEngine()
    sampler = RemoteSampler(completions, [old, kept])
    for key in range(4):
        sampler.submit(key, REQUEST)
    sampler.attach([kept, new])
    for key in range(4, 6):
        sampler.submit(key, REQUEST)
    assert (old.num_requests, kept.num_requests, new.num_requests) == (2, 2, 2)
    for index in range(2):
        old.answer(index)
    assert all(isinstance(reply, SampleReply) for reply in drain(completions).values())


def test_a_malformed_request_costs_no_engine(completions):
    engine = FakeEngine()
    sampler = RemoteSampler(completions, [engine])
    sampler.submit("bad", REQUEST)
    engine.fail(ValueError("image is float32"))
    assert isinstance(drain(completions)["bad"], ValueError)
    assert sampler.num_engines == 1


def test_closing_completes_everything(completions):
    engine = FakeEngine()
    sampler = RemoteSampler(completions, [engine])
    sampler.submit(0, REQUEST)
    sampler.close()
    assert isinstance(drain(completions)[0], EngineError)
    engine.answer()
    assert drain(completions) == {}


def test_the_local_sampler_answers_from_a_thread_in_batches(completions, spec, make_oracle):
    oracle = make_oracle()
    sampler = LocalSampler(TorchEngine(spec), completions)
    requests = make_requests(11, temperatures=(1.0, 0.0, 0.7))
    sampler.submit_many(list(enumerate(requests)))
    sampler.submit("bad", SampleRequest(np.zeros((5, 5, 3), np.uint8), "push", 0, 1.0))
    outcomes = dict(completions.get(timeout=SECONDS) for _ in range(12))
    assert isinstance(outcomes.pop("bad"), ValueError)
    replies = [outcomes[key] for key in range(11)]
    assert oracle.log_prob_error(requests, replies) <= 1e-4
    assert {reply.policy_version for reply in replies} == {INITIAL_VERSION}

    manifest = oracle.keep(seed=5)
    assert sampler.load_weights(manifest) == sampler.policy_version == manifest.version
    sampler.submit("new", requests[0])
    key, reply = completions.get(timeout=SECONDS)
    assert (key, reply.policy_version) == ("new", manifest.version)
    assert oracle.log_prob_error(requests[:1], [reply]) <= 1e-4
    sampler.close()
    sampler.submit("late", requests[0])
    assert isinstance(completions.get(timeout=SECONDS)[1], EngineError)


def test_a_failing_local_engine_is_reported_not_waited_for(completions):
    class Broken:
        max_batch, mix_calls, policy_version = 2, True, 0
        entered = threading.Event()

        def check(self, requests):
            pass

        def sample(self, requests):
            self.entered.set()
            raise RuntimeError("out of memory\nmore")

    sampler = LocalSampler(Broken(), completions)
    sampler.submit_many([(key, REQUEST) for key in range(5)])
    for _ in range(5):
        _, error = completions.get(timeout=SECONDS)
        assert isinstance(error, EngineError) and str(error) == "RuntimeError: out of memory"
    sampler.close()


@pytest.mark.parametrize(("mix_calls", "batches"), [(False, [2, 1, 3]), (True, [2, 4])])
def test_the_local_sampler_mixes_calls_only_where_it_may(completions, mix_calls, batches):
    class Slow:
        max_batch, policy_version = 4, 0
        submitted = threading.Event()

        def __init__(self):
            self.mix_calls, self.sizes = mix_calls, []

        def check(self, requests):
            pass

        def sample(self, requests):
            assert self.submitted.wait(SECONDS)
            self.sizes.append(len(requests))
            return [SampleReply(np.zeros(7), np.zeros(7), 1)] * len(requests)

    engine = Slow()
    sampler = LocalSampler(engine, completions)
    sampler.submit_many([(key, REQUEST) for key in range(2)])
    while sampler._waiting:  # until the first call is in the model
        threading.Event().wait(0.01)
    sampler.submit(2, REQUEST)
    sampler.submit_many([(key, REQUEST) for key in range(3, 6)])
    assert sampler.num_outstanding == 6
    engine.submitted.set()
    assert [completions.get(timeout=SECONDS)[0] for _ in range(6)] == list(range(6))
    assert engine.sizes == batches
    sampler.close()
