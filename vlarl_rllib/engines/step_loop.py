"""The thread that owns a model which generates step by step, batch by batch, for all callers.

A batch is what waits once the model is idle: joining one that runs would cut prompts into many small passes. A few
requests wait a moment for others; with `mix_calls` off each call is a batch of its own. A weight update waits for what
was submitted before it and holds back what was submitted after it, so that every decision comes from one version; where
it breaks off, the model samples nothing before a whole version has arrived. After the first exception of the model
nobody waits any more.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from vlarl_rllib.engines.protocol import EngineError, as_engine_error, checked_reply
from vlarl_rllib.engines.weight_update import WeightUpdate
from vlarl_rllib.models.family import ActionFormat
from vlarl_rllib.types import HALF_LOADED, INITIAL_VERSION, SampleReply, SampleRequest, WeightBucket

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

MAX_LATENCIES = 10_000
"""How many are kept for whoever reads them."""
WAIT_SHARE = 0.1
"""Of the time that the last batch took: how long a few requests wait for others to share the next one with."""
NO_WHOLE_VERSION = "the engine's last weight update broke off, so it holds weights of two versions"


@dataclass(frozen=True, slots=True)
class Sampled:
    """One finished request."""

    request_id: str
    token_ids: list[int]
    log_probs: list[float]
    value: float | None = None
    """Where it is asked for."""


class Stepper(Protocol):
    """The model, driven by one thread. Any exception means that it is beyond use."""

    device: str
    library: str

    def add(self, request_id: str, request: SampleRequest) -> None: ...

    def step(self) -> Sequence[Sampled]: ...

    def begin_load(self) -> None:
        """Prepare for `load`; nothing is in flight."""
        ...

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Replace some weights; nothing of `tensors` is read once this returns."""
        ...

    def end_load(self) -> None:
        """Be ready to sample; weights that did not come are as before."""
        ...


@dataclass(slots=True, eq=False)
class _Call:
    """Requests of one caller; the future gets all replies together."""

    requests: Sequence[SampleRequest]
    since: float = field(default_factory=time.perf_counter)
    future: Future[list[SampleReply]] = field(default_factory=Future)
    replies: dict[int, SampleReply] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Probe:
    future: Future[int] = field(default_factory=Future)


class StepLoop:
    """Runs a stepper in its own thread, in which it is also built (CUDA's current device belongs to a thread).

    Args:
        build: makes the stepper.
        actions: what a reply must be.
        mix_calls: see `EngineSpec.mix_calls`.
        enough: so many requests need not wait for others.

    Raises:
        EngineError: `build` failed.
    """

    def __init__(
        self,
        build: Callable[[], Stepper],
        actions: ActionFormat,
        name: str = "engine",
        *,
        mix_calls: bool = True,
        enough: int = 1,
    ) -> None:
        self._actions = actions
        self._mix_calls, self._enough = mix_calls, enough
        self._batch_began = self._batch_seconds = 0.0
        self._inbox: deque[_Call | WeightUpdate | _Probe] = deque()
        self._wake = threading.Condition()
        self._starting: _Call | WeightUpdate | _Probe | None = None
        self._in_flight: dict[str, tuple[_Call, int]] = {}
        self._ids = itertools.count()
        self._open = WeightUpdate.closed()
        self._error: str | None = None
        self.policy_version = INITIAL_VERSION
        self.num_decisions = 0
        self.busy_seconds = self.load_seconds = 0.0
        self.latencies: deque[float] = deque(maxlen=MAX_LATENCIES)
        """Seconds from the arrival of each request to its reply, newest last; whoever reads them takes them out."""
        self.device = self.library = ""
        started: Future[None] = Future()
        threading.Thread(target=self._run, args=(build, started), name=f"{name}-loop", daemon=True).start()
        started.result()

    def sample(self, requests: Sequence[SampleRequest]) -> Future[list[SampleReply]]:
        """Queue checked requests. The future, and this call once the engine is dead, raise EngineError."""
        call = _Call(requests)
        if requests:
            self._submit(call)
        else:
            call.future.set_result([])
        return call.future

    def update(self, version: int, fetch: Callable[[WeightBucket], dict[str, Tensor]]) -> WeightUpdate:
        """Queue a weight update, which its caller then feeds and ends. An earlier one that is still open breaks off.

        Args:
            fetch: the tensors of a bucket; a `TransferError` of it breaks the update off.
        """
        self._open.abort("another update began")
        self._open = update = WeightUpdate(version, fetch)
        self._submit(update)
        return update

    def probe(self) -> Future[int]:
        """Version in use, answered by the thread itself between two steps: a hung model does not answer."""
        probe = _Probe()
        self._submit(probe)
        return probe.future

    @property
    def num_in_flight(self) -> int:
        """Requests in the model."""
        return len(self._in_flight)

    @property
    def num_waiting(self) -> int:
        """Requests that are not in the model yet."""
        with self._wake:
            return self._count_waiting()

    def _count_waiting(self) -> int:
        return sum(len(item.requests) for item in self._inbox if isinstance(item, _Call))

    def _submit(self, item: _Call | WeightUpdate | _Probe) -> None:
        with self._wake:
            if self._error is not None:
                raise EngineError(self._error)
            self._inbox.append(item)
            self._wake.notify()

    def _run(self, build: Callable[[], Stepper], started: Future[None]) -> None:
        try:
            stepper = build()
            self.device, self.library = stepper.device, stepper.library
            started.set_result(None)
            while True:
                self._admit(stepper)
                if self._in_flight:
                    self._step(stepper)
        except BaseException as error:  # the thread's boundary: whatever happened, nobody may wait for ever
            logger.exception("the engine failed and takes no more requests")
            self._fail(error, started)

    def _admit(self, stepper: Stepper) -> None:
        """Start what waits, in order, until there is a batch; block while there is nothing at all to do."""
        makes_batch = not self._in_flight
        if makes_batch:
            self._wait_for_batch()
            self._batch_began = time.perf_counter()
        while (item := self._next_item(makes_batch)) is not None:
            # A caller that went away has cancelled its future; from here on it can no longer do so.
            if not item.future.set_running_or_notify_cancel():
                continue
            self._starting = item
            self._start(stepper, item)
            self._starting = None

    def _wait_for_batch(self) -> None:
        with self._wake:
            while not self._inbox or (seconds := self._seconds_to_wait(self._inbox[0])) > 0:
                self._wake.wait(seconds if self._inbox else None)

    def _seconds_to_wait(self, first: _Call | WeightUpdate | _Probe) -> float:
        """How long the first in the inbox may still wait for others; it need not where this is 0 or less."""
        if not (self._mix_calls and isinstance(first, _Call)) or self._count_waiting() >= self._enough:
            return 0.0
        return first.since + WAIT_SHARE * self._batch_seconds - time.perf_counter()

    def _next_item(self, makes_batch: bool) -> _Call | WeightUpdate | _Probe | None:
        """What is to be started now, if anything."""
        with self._wake:
            first = self._inbox[0] if self._inbox else None
            joins = isinstance(first, _Call) and makes_batch and self._mix_calls
            if first is None or (self._in_flight and not (joins or isinstance(first, _Probe))):
                return None
            return self._inbox.popleft()

    def _start(self, stepper: Stepper, item: _Call | WeightUpdate | _Probe) -> None:
        if isinstance(item, _Call):
            if self.policy_version == HALF_LOADED:
                item.future.set_exception(EngineError(NO_WHOLE_VERSION))
                return
            begin = time.perf_counter()
            for index, request in enumerate(item.requests):
                request_id = str(next(self._ids))
                self._in_flight[request_id] = (item, index)
                stepper.add(request_id, request)
            self.busy_seconds += time.perf_counter() - begin
            return
        if isinstance(item, WeightUpdate):
            self.policy_version = item.apply(stepper, self.policy_version)
            item.tell()
            self.load_seconds += sum(item.seconds.values())
        else:
            item.future.set_result(self.policy_version)

    def _step(self, stepper: Stepper) -> None:
        begin = time.perf_counter()
        for sampled in stepper.step():
            self._deliver(sampled)
        now = time.perf_counter()
        self.busy_seconds += now - begin
        if not self._in_flight:
            self._batch_seconds = now - self._batch_began

    def _deliver(self, sampled: Sampled) -> None:
        reply = checked_reply(sampled.token_ids, sampled.log_probs, self._actions, self.policy_version, sampled.value)
        call, index = self._in_flight.pop(sampled.request_id)
        self.num_decisions += 1
        self.latencies.append(time.perf_counter() - call.since)
        call.replies[index] = reply
        if len(call.replies) == len(call.requests):
            call.future.set_result([call.replies[i] for i in range(len(call.requests))])

    def _fail(self, error: BaseException, started: Future[None]) -> None:
        failure = as_engine_error(error)
        with self._wake:
            self._error = str(failure)
            waiting = [*self._inbox, *(call for call, _ in self._in_flight.values())]
            if self._starting is not None:
                waiting.append(self._starting)
            self._inbox.clear()
            self._in_flight.clear()
        self._open.fail(failure)
        for future in (started, *(item.future for item in waiting)):
            # Calls of several requests occur several times; a cancelled future takes no exception.
            if not future.done() and (future.running() or future.set_running_or_notify_cancel()):
                future.set_exception(failure)
