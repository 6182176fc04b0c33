"""The engine's thread with a model that is a few lines of Python: batching, order of updates, and failure."""

import threading
import time
from concurrent.futures import Future

import numpy as np
import pytest

from vlarl_rllib.engines.protocol import EngineError, check_requests
from vlarl_rllib.engines.step_loop import WAIT_SHARE, Sampled, StepLoop
from vlarl_rllib.models.family import ActionFormat
from vlarl_rllib.types import HALF_LOADED, INITIAL_VERSION, SampleRequest, WeightBucket
from vlarl_rllib.weights.protocol import TransferError

ACTIONS = ActionFormat(1, 7, range(100, 356))
IMAGE = np.zeros((4, 4, 3), np.uint8)
SECONDS = 10


def request(seed: int = 0) -> SampleRequest:
    return SampleRequest(IMAGE, "push", seed, 1.0)


BUCKET = WeightBucket(0, (), None, frozen=False)


def fetch(bucket: WeightBucket) -> dict:
    """A bucket with a handle is damaged."""
    if bucket.handle:
        raise TransferError(bucket.handle)
    return {}


def update(loop: StepLoop, version: int) -> Future[int]:
    """A version in one bucket."""
    coming = loop.update(version, fetch)
    coming.feed(BUCKET)
    return coming.end()


class FakeStepper:
    """Finishes a request two steps after its admission; its tokens are all `100 + seed`."""

    device, library = "fake", "fake 1.0"

    def __init__(self) -> None:
        self.running: dict[str, list[int]] = {}
        self.batch_sizes: list[int] = []
        self.loads_while_running: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.breaks: Exception | None = None
        self.tokens = lambda seed: [100 + seed] * 7

    def add(self, request_id, request):
        self.running[request_id] = [request.seed, 2]

    def step(self):
        assert self.gate.wait(SECONDS)
        if self.breaks is not None:
            raise self.breaks
        self.batch_sizes.append(len(self.running))
        done = []
        for request_id, state in list(self.running.items()):
            state[1] -= 1
            if state[1] == 0:
                del self.running[request_id]
                tokens = self.tokens(state[0])
                done.append(Sampled(request_id, tokens, [-1.0] * len(tokens)))
        return done

    def begin_load(self):
        self.loads_while_running.append(len(self.running))

    def load(self, tensors): ...

    def end_load(self): ...


@pytest.fixture
def stepper():
    return FakeStepper()


@pytest.fixture
def loop(stepper):
    return StepLoop(lambda: stepper, ACTIONS)


def test_replies_come_in_the_order_of_the_requests(loop):
    replies = loop.sample([request(5), request(3), request(9)]).result(SECONDS)
    assert [reply.tokens.tolist() for reply in replies] == [[105] * 7, [103] * 7, [109] * 7]
    assert replies[0].tokens.dtype == np.int64 and replies[0].log_probs.dtype == np.float32
    assert {reply.policy_version for reply in replies} == {INITIAL_VERSION}
    assert loop.sample([]).result(SECONDS) == []
    assert loop.num_decisions == 3 and loop.busy_seconds > 0


def test_requests_of_different_callers_share_a_batch(loop, stepper):
    stepper.gate.clear()
    futures = [loop.sample([request(seed)]) for seed in range(6)]
    stepper.gate.set()
    for seed, future in enumerate(futures):
        assert future.result(SECONDS)[0].tokens[0] == 100 + seed
    # The first batch is of those that were there when the model was idle, the second of all others; two steps each.
    assert len(stepper.batch_sizes) <= 4 and sum(stepper.batch_sizes) == 2 * 6


def test_what_comes_while_a_batch_runs_makes_the_next_one(loop, stepper):
    stepper.gate.clear()
    first = loop.sample([request(0), request(1)])
    while loop.num_in_flight < 2:
        time.sleep(0.001)
    later = [loop.sample([request(seed)]) for seed in (2, 3, 4)]
    stepper.gate.set()
    for future in (first, *later):
        future.result(SECONDS)
    assert stepper.batch_sizes == [2, 2, 3, 3]


def test_few_requests_wait_a_moment_for_others_and_enough_do_not(stepper):
    loop = StepLoop(lambda: stepper, ACTIONS, enough=3)
    loop.sample([request(0)]).result(SECONDS)  # no batch yet to measure by: no wait
    loop._batch_seconds = 4.0 / WAIT_SHARE
    lone, began = loop.sample([request(1)]), time.monotonic()
    others = loop.sample([request(2), request(3)])
    for future in (lone, others):
        future.result(SECONDS)
    assert time.monotonic() - began < 2.0
    assert stepper.batch_sizes == [1, 1, 3, 3]
    loop._batch_seconds = 0.05 / WAIT_SHARE
    began = time.monotonic()
    loop.sample([request(4)]).result(SECONDS)
    assert time.monotonic() - began >= 0.05
    assert stepper.batch_sizes[4:] == [1, 1]
    assert loop._batch_seconds < 0.05 / WAIT_SHARE, "as long as that batch took"


def test_a_call_by_itself_does_not_wait(stepper):
    loop = StepLoop(lambda: stepper, ACTIONS, mix_calls=False, enough=3)
    loop._batch_seconds = 60.0 / WAIT_SHARE
    stepper.gate.clear()
    futures = [loop.sample([request(seed)]) for seed in range(3)]
    stepper.gate.set()
    for future in futures:
        future.result(SECONDS)
    assert stepper.batch_sizes == [1] * 6


def test_an_update_lets_earlier_requests_finish_and_later_ones_wait(loop, stepper):
    stepper.gate.clear()
    before = [loop.sample([request()]) for _ in range(3)]
    done = update(loop, 4)
    after = [loop.sample([request()]) for _ in range(3)]
    stepper.gate.set()
    assert done.result(SECONDS) == 4
    assert {future.result(SECONDS)[0].policy_version for future in before} == {INITIAL_VERSION}
    assert {future.result(SECONDS)[0].policy_version for future in after} == {4}
    assert stepper.loads_while_running == [0]
    assert loop.probe().result(SECONDS) == 4


def test_it_knows_how_long_requests_took_and_how_many_wait(loop, stepper):
    """What `engines.telemetry` tells of it."""
    stepper.gate.clear()
    before = loop.sample([request(), request()])
    update(loop, 1)
    behind = loop.sample([request()])
    time.sleep(0.2)
    assert (loop.num_in_flight, loop.num_waiting) == (2, 1)
    stepper.gate.set()
    before.result(SECONDS), behind.result(SECONDS)
    assert len(loop.latencies) == 3 and min(loop.latencies) >= 0.2
    assert (loop.num_in_flight, loop.num_waiting) == (0, 0)


def test_after_an_exception_nobody_waits(loop, stepper):
    stepper.gate.clear()
    stepper.breaks = RuntimeError("Tensor on device meta\nand a hundred more lines")
    waiting: list[Future] = [loop.sample([request(), request()]), update(loop, 1), loop.sample([request()])]
    stepper.gate.set()
    for future in waiting:
        with pytest.raises(EngineError, match=r"^RuntimeError: Tensor on device meta$"):
            future.result(SECONDS)
    for call in (lambda: loop.sample([request()]), lambda: loop.update(1, fetch), loop.probe):
        with pytest.raises(EngineError, match="Tensor on device meta"):
            call()


def test_a_failed_load_is_the_end_of_the_engine(loop, stepper):
    def fails(tensors):
        raise OSError("half loaded")

    stepper.load = fails
    coming = loop.update(1, fetch)
    for future in (coming.feed(BUCKET), coming.feed(BUCKET), coming.end()):
        with pytest.raises(EngineError, match="half loaded"):
            future.result(SECONDS)
    with pytest.raises(EngineError, match="half loaded"):
        loop.sample([request()])


def test_an_update_that_breaks_off_leaves_nothing_to_sample_from(loop):
    damaged = WeightBucket(1, (), "a bit was lost", frozen=False)
    coming = loop.update(3, fetch)
    coming.feed(BUCKET).result(SECONDS)
    for future in (coming.feed(damaged), coming.feed(BUCKET), coming.end()):
        with pytest.raises(TransferError, match="a bit was lost"):
            future.result(SECONDS)
    assert loop.probe().result(SECONDS) == HALF_LOADED
    with pytest.raises(EngineError, match="weights of two versions"):
        loop.sample([request()]).result(SECONDS)
    # Also where its driver begins another one, or says that nothing more comes.
    for end in (lambda coming: coming.abort("the learner died"), lambda coming: loop.update(5, fetch).end()):
        coming = loop.update(4, fetch)
        coming.feed(BUCKET).result(SECONDS)
        end(coming)
        with pytest.raises(TransferError, match=r"update to version 4 broke off: (the learner died|another update)"):
            coming.future.result(SECONDS)
        with pytest.raises(TransferError, match="broke off"):
            coming.feed(BUCKET).result(SECONDS)
    assert update(loop, 6).result(SECONDS) == 6
    assert loop.sample([request()]).result(SECONDS)[0].policy_version == 6


def test_an_update_of_which_nothing_came_leaves_the_engine_as_it_was(loop):
    coming = loop.update(3, fetch)
    coming.abort("the learner died")
    with pytest.raises(TransferError, match="the learner died"):
        coming.future.result(SECONDS)
    assert loop.sample([request()]).result(SECONDS)[0].policy_version == INITIAL_VERSION


@pytest.mark.parametrize("tokens", [[101] * 6, [101] * 6 + [99], [101] * 6 + [356]])
def test_malformed_replies_become_errors_never_actions(loop, stepper, tokens):
    stepper.tokens = lambda seed: tokens
    with pytest.raises(EngineError, match=r"sampled (6 tokens|id 99|id 356)"):
        loop.sample([request()]).result(SECONDS)


def test_log_probs_must_be_numbers_below_zero(loop, stepper):
    stepper.step = lambda: [Sampled(id_, [100] * 7, [float("nan")] * 7) for id_ in stepper.running]
    with pytest.raises(EngineError, match="log-probability nan"):
        loop.sample([request()]).result(SECONDS)


def test_values_must_be_numbers(loop, stepper):
    stepper.step = lambda: [Sampled(id_, [100] * 7, [-1.0] * 7, float("inf")) for id_ in stepper.running]
    with pytest.raises(EngineError, match="value inf; the weights may not be finite"):
        loop.sample([request()]).result(SECONDS)


def test_a_caller_that_went_away_disturbs_nobody(loop, stepper):
    stepper.gate.clear()
    first = loop.sample([request()])
    gone, kept = loop.sample([request(1)]), loop.sample([request(2)])
    cancelled = gone.cancel()
    stepper.gate.set()
    assert first.result(SECONDS) and kept.result(SECONDS)
    assert cancelled == gone.cancelled()


def test_a_model_that_cannot_be_built_says_why():
    def build():
        raise ValueError("no such checkpoint")

    with pytest.raises(EngineError, match="ValueError: no such checkpoint"):
        StepLoop(build, ACTIONS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image": np.zeros((4, 4, 3), np.float32)}, r"float32 \[4, 4, 3\]; the policy takes uint8 \[4, 4, 3\]"),
        ({"image": np.zeros((3, 4, 4), np.uint8)}, r"uint8 \[3, 4, 4\]"),
        ({"image": np.zeros((5, 5, 3), np.uint8)}, r"uint8 \[5, 5, 3\]"),
        ({"instruction": " "}, "instruction=' ' must be a text"),
        ({"temperature": -1.0}, "temperature=-1.0 must be 0"),
        ({"temperature": 0.001}, "temperature=0.001 must be 0"),
        ({"temperature": float("nan")}, "temperature=nan must be 0"),
        ({"seed": -1}, "seed=-1 must be in"),
    ],
)
def test_malformed_requests_are_named(wrong, message):
    fields = {"image": IMAGE, "instruction": "push", "seed": 0, "temperature": 1.0} | wrong
    check_requests([request()], 4)
    with pytest.raises(ValueError, match=message):
        check_requests([request(), SampleRequest(**fields)], 4)
