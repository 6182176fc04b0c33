"""The thread that owns a model which generates step by step: continuous batching over all callers.

Whatever waits is admitted before each step, or with `mix_calls` off once the model is idle. A weight update waits for
what was submitted before it and holds back what was submitted after it, so that every decision comes from one version.
After the first exception nobody waits any more.
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
from typing import Protocol

from vlarl_rllib.engines.protocol import EngineError, checked_reply
from vlarl_rllib.models.family import ActionFormat
from vlarl_rllib.types import INITIAL_VERSION, SampleReply, SampleRequest, WeightManifest

logger = logging.getLogger(__name__)

MAX_LATENCIES = 10_000
"""How many are kept for whoever reads them."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """One finished request."""

    request_id: str
    token_ids: list[int]
    log_probs: list[float]


class Stepper(Protocol):
    """The model, driven by one thread. Any exception means that it is beyond use."""

    device: str
    library: str

    def add(self, request_id: str, request: SampleRequest) -> None: ...

    def step(self) -> Sequence[Sampled]: ...

    def load(self, manifest: WeightManifest) -> None: ...


@dataclass(slots=True, eq=False)
class _Call:
    """Requests of one caller; the future gets all replies together."""

    requests: Sequence[SampleRequest]
    since: float = field(default_factory=time.perf_counter)
    future: Future[list[SampleReply]] = field(default_factory=Future)
    replies: dict[int, SampleReply] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Update:
    manifest: WeightManifest
    future: Future[int] = field(default_factory=Future)


@dataclass(slots=True, eq=False)
class _Probe:
    future: Future[int] = field(default_factory=Future)


class StepLoop:
    """Runs a stepper in its own thread, in which it is also built (CUDA's current device belongs to a thread).

    Args:
        build: makes the stepper.
        actions: what a reply must be.
        mix_calls: see `EngineSpec.mix_calls`.

    Raises:
        EngineError: `build` failed.
    """

    def __init__(
        self, build: Callable[[], Stepper], actions: ActionFormat, name: str = "engine", *, mix_calls: bool = True
    ) -> None:
        self._actions = actions
        self._waits_for_idle = (_Update,) if mix_calls else (_Update, _Call)
        self._inbox: deque[_Call | _Update | _Probe] = deque()
        self._wake = threading.Condition()
        self._starting: _Call | _Update | _Probe | None = None
        self._in_flight: dict[str, tuple[_Call, int]] = {}
        self._ids = itertools.count()
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

    def update(self, manifest: WeightManifest) -> Future[int]:
        """Queue a weight update; the future holds the version then in use."""
        update = _Update(manifest)
        self._submit(update)
        return update.future

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
            return sum(len(item.requests) for item in self._inbox if isinstance(item, _Call))

    def _submit(self, item: _Call | _Update | _Probe) -> None:
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
        """Take what waits, in order; block while there is nothing at all to do."""
        while True:
            with self._wake:
                while not self._inbox and not self._in_flight:
                    self._wake.wait()
                if not self._inbox or (isinstance(self._inbox[0], self._waits_for_idle) and self._in_flight):
                    return
                item = self._inbox.popleft()
            # A caller that went away has cancelled its future; from here on it can no longer do so.
            if not item.future.set_running_or_notify_cancel():
                continue
            self._starting = item
            self._start(stepper, item)
            self._starting = None

    def _start(self, stepper: Stepper, item: _Call | _Update | _Probe) -> None:
        if isinstance(item, _Call):
            begin = time.perf_counter()
            for index, request in enumerate(item.requests):
                request_id = str(next(self._ids))
                self._in_flight[request_id] = (item, index)
                stepper.add(request_id, request)
            self.busy_seconds += time.perf_counter() - begin
            return
        if isinstance(item, _Update):
            begin = time.perf_counter()
            stepper.load(item.manifest)
            self.load_seconds += time.perf_counter() - begin
            self.policy_version = item.manifest.version
        item.future.set_result(self.policy_version)

    def _step(self, stepper: Stepper) -> None:
        begin = time.perf_counter()
        for sampled in stepper.step():
            self._deliver(sampled)
        self.busy_seconds += time.perf_counter() - begin

    def _deliver(self, sampled: Sampled) -> None:
        reply = checked_reply(sampled.token_ids, sampled.log_probs, self._actions, self.policy_version)
        call, index = self._in_flight.pop(sampled.request_id)
        self.num_decisions += 1
        self.latencies.append(time.perf_counter() - call.since)
        call.replies[index] = reply
        if len(call.replies) == len(call.requests):
            call.future.set_result([call.replies[i] for i in range(len(call.requests))])

    def _fail(self, error: BaseException, started: Future[None]) -> None:
        failure = _engine_error(error)
        with self._wake:
            self._error = str(failure)
            waiting = [*self._inbox, *(call for call, _ in self._in_flight.values())]
            if self._starting is not None:
                waiting.append(self._starting)
            self._inbox.clear()
            self._in_flight.clear()
        for future in (started, *(item.future for item in waiting)):
            # Calls of several requests occur several times; a cancelled future takes no exception.
            if not future.done() and (future.running() or future.set_running_or_notify_cancel()):
                future.set_exception(failure)


def _engine_error(error: BaseException) -> EngineError:
    """One line that survives pickling, whatever vLLM raised."""
    if isinstance(error, EngineError):
        return error
    lines = str(error).strip().splitlines()
    return EngineError(f"{type(error).__name__}: {lines[0] if lines else 'no message'}")
