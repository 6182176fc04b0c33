"""The engine's thread with a model that is a few lines of Python: batching, order of updates, and failure."""

import threading
import time
from concurrent.futures import Future

import numpy as np
import pytest

from vlarl_rllib.engines.protocol import EngineError, check_requests
from vlarl_rllib.engines.step_loop import Sampled, StepLoop
from vlarl_rllib.models.family import ActionFormat
from vlarl_rllib.types import INITIAL_VERSION, SampleRequest, WeightManifest

ACTIONS = ActionFormat(1, 7, range(100, 356))
IMAGE = np.zeros((4, 4, 3), np.uint8)
SECONDS = 10


def request(seed: int = 0) -> SampleRequest:
    return SampleRequest(IMAGE, "push", seed, 1.0)


def manifest(version: int) -> WeightManifest:
    return WeightManifest(version, "shared_memory", "/nowhere", (), 0, 0)


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

    def load(self, manifest):
        self.loads_while_running.append(len(self.running))


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
    # The first step may have begun with the first request alone.
    assert max(stepper.batch_sizes) >= 5


def test_an_update_lets_earlier_requests_finish_and_later_ones_wait(loop, stepper):
    stepper.gate.clear()
    before = [loop.sample([request()]) for _ in range(3)]
    update = loop.update(manifest(4))
    after = [loop.sample([request()]) for _ in range(3)]
    stepper.gate.set()
    assert update.result(SECONDS) == 4
    assert {future.result(SECONDS)[0].policy_version for future in before} == {INITIAL_VERSION}
    assert {future.result(SECONDS)[0].policy_version for future in after} == {4}
    assert stepper.loads_while_running == [0]
    assert loop.probe().result(SECONDS) == 4


def test_it_knows_how_long_requests_took_and_how_many_wait(loop, stepper):
    """What `engines.telemetry` tells of it."""
    stepper.gate.clear()
    before = loop.sample([request(), request()])
    loop.update(manifest(1))
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
    waiting: list[Future] = [loop.sample([request(), request()]), loop.update(manifest(1)), loop.sample([request()])]
    stepper.gate.set()
    for future in waiting:
        with pytest.raises(EngineError, match=r"^RuntimeError: Tensor on device meta$"):
            future.result(SECONDS)
    for call in (lambda: loop.sample([request()]), lambda: loop.update(manifest(1)), loop.probe):
        with pytest.raises(EngineError, match="Tensor on device meta"):
            call()


def test_a_failed_update_is_the_end_of_the_engine(loop, stepper):
    def fails(manifest):
        raise OSError("half loaded")

    stepper.load = fails
    with pytest.raises(EngineError, match="half loaded"):
        loop.update(manifest(1)).result(SECONDS)
    with pytest.raises(EngineError, match="half loaded"):
        loop.sample([request()])


@pytest.mark.parametrize("tokens", [[101] * 6, [101] * 6 + [99], [101] * 6 + [356]])
def test_malformed_replies_become_errors_never_actions(loop, stepper, tokens):
    stepper.tokens = lambda seed: tokens
    with pytest.raises(EngineError, match=r"sampled (6 tokens|id 99|id 356)"):
        loop.sample([request()]).result(SECONDS)


def test_log_probs_must_be_numbers_below_zero(loop, stepper):
    stepper.step = lambda: [Sampled(id_, [100] * 7, [float("nan")] * 7) for id_ in stepper.running]
    with pytest.raises(EngineError, match="log-probability nan"):
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
