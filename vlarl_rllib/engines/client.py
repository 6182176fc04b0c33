"""How a rollout loop talks to engines without waiting for any of them.

    completions = queue.SimpleQueue()
    sampler = RemoteSampler(completions, pool.handles)
    sampler.submit(slot, request)
    slot, answer = completions.get()          # a SampleReply, or the exception that this request ended with

Every submitted request ends up on `completions` exactly once, whatever happens to its engine.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from ray.exceptions import RayTaskError

from vlarl_rllib.engines.protocol import EngineError
from vlarl_rllib.types import SampleReply, SampleRequest, WeightManifest

if TYPE_CHECKING:
    from vlarl_rllib.engines.torch_engine import TorchEngine

logger = logging.getLogger(__name__)

Completion = tuple[Hashable, SampleReply | Exception]
"""Key of a request, and its reply, `EngineError` (the engine is lost) or `ValueError` (the request is malformed)."""


class Completions(Protocol):
    """Where finished requests go: a `queue.SimpleQueue`, or anything with a thread-safe `put`."""

    def put(self, item: Completion, /) -> None: ...


class SamplerClient(Protocol):
    """What a rollout loop needs of engines."""

    def submit(self, key: Hashable, request: SampleRequest) -> None:
        """Ask for one decision; never blocks and never raises for an engine's sake."""
        ...

    def submit_many(self, items: Sequence[tuple[Hashable, SampleRequest]]) -> None:
        """The same for several requests at once, in one call per engine; they complete together."""
        ...

    @property
    def num_outstanding(self) -> int:
        """Requests that have not completed."""
        ...

    def close(self) -> None:
        """Take no more requests. Those that wait complete with `EngineError`."""
        ...


@dataclass(eq=False, slots=True)
class _EngineLoad:
    """One engine as this client sees it."""

    handle: Any
    num_in_flight: int = 0


@dataclass(eq=False, slots=True)
class _RemoteCall:
    engine: _EngineLoad
    keys: list[Hashable]
    ref: Any = field(default=None)
    """Held so that Ray keeps the result until the callback has run."""


class RemoteSampler:
    """Divides the requests of a call evenly among several engine actors (`EngineActor`), the least loaded one first.

    An engine that fails gets no more requests until `attach`. One that hangs is for `EnginePool.ensure_current` to find
    and kill, which completes what it owes.

    Args:
        completions: receives a `Completion` for every request.
        handles: Ray actor handles.
    """

    def __init__(self, completions: Completions, handles: Sequence[Any] = ()) -> None:
        self._completions = completions
        self._lock = threading.Lock()
        self._engines: list[_EngineLoad] = []
        self._calls: dict[int, _RemoteCall] = {}
        self._call_ids = itertools.count()
        self.attach(handles)

    def attach(self, handles: Sequence[Any]) -> None:
        """Use exactly these engines from now on; requests already sent to others still complete."""
        with self._lock:
            known = {id(call.engine): call.engine for call in self._calls.values()}
            known |= {id(engine): engine for engine in self._engines}
            by_handle = {engine.handle: engine for engine in known.values()}
            self._engines = [by_handle.get(handle, _EngineLoad(handle)) for handle in handles]

    @property
    def num_engines(self) -> int:
        """Engines in use: the attached ones less those that failed since."""
        return len(self._engines)

    @property
    def num_outstanding(self) -> int:
        """See `SamplerClient.num_outstanding`."""
        with self._lock:
            return sum(len(call.keys) for call in self._calls.values())

    def submit(self, key: Hashable, request: SampleRequest) -> None:
        """See `SamplerClient.submit`."""
        self.submit_many([(key, request)])

    def submit_many(self, items: Sequence[tuple[Hashable, SampleRequest]]) -> None:
        """See `SamplerClient.submit_many`. A malformed request ends the others of its call with ValueError too."""
        with self._lock:
            calls = self._assign(items)
        if not calls:
            self._complete([key for key, _ in items], EngineError("no engine is attached"))
        for call_id, (call, requests) in calls.items():
            try:
                call.ref = call.engine.handle.sample.remote(requests)
                call.ref.future().add_done_callback(partial(self._finish, call_id))
            except Exception as error:  # Ray itself is gone
                logger.exception("a request could not be sent to %r", call.engine.handle)
                self._lose([call.engine], _plain(error))

    def close(self) -> None:
        """See `SamplerClient.close`."""
        with self._lock:
            engines = [*self._engines, *(call.engine for call in self._calls.values())]
        self._lose(engines, EngineError("the sampler was closed"))

    def _assign(
        self, items: Sequence[tuple[Hashable, SampleRequest]]
    ) -> dict[int, tuple[_RemoteCall, list[SampleRequest]]]:
        """Spread the items over the engines so that loads even out; one call each. Empty where there is no engine."""
        shares: dict[_EngineLoad, list[tuple[Hashable, SampleRequest]]] = {}
        for item in items if self._engines else ():
            # Evenly within the call, whatever is in flight: so who shares a batch with whom does not depend on timing.
            engine = min(self._engines, key=lambda engine: (len(shares.get(engine, ())), engine.num_in_flight))
            engine.num_in_flight += 1
            shares.setdefault(engine, []).append(item)
        calls = {
            next(self._call_ids): (_RemoteCall(engine, [key for key, _ in share]), [request for _, request in share])
            for engine, share in shares.items()
        }
        self._calls |= {call_id: call for call_id, (call, _) in calls.items()}
        return calls

    def _finish(self, call_id: int, future: Future[list[SampleReply]]) -> None:
        """Runs in a thread of Ray's."""
        with self._lock:
            call = self._calls.pop(call_id, None)
            if call is None:
                return  # given up before
            call.engine.num_in_flight -= len(call.keys)
        error = future.exception()
        if error is None:
            for key, reply in zip(call.keys, future.result(), strict=True):
                self._completions.put((key, reply))
            return
        failure = _plain(error)
        self._complete(call.keys, failure)
        if not isinstance(failure, ValueError):
            self._lose([call.engine], failure)

    def _lose(self, engines: Sequence[_EngineLoad], failure: Exception) -> None:
        """Stop using these engines and complete what they still owe."""
        with self._lock:
            self._engines = [engine for engine in self._engines if engine not in engines]
            owed = [call_id for call_id, call in self._calls.items() if call.engine in engines]
            keys = [key for call_id in owed for key in self._calls.pop(call_id).keys]
        self._complete(keys, failure)

    def _complete(self, keys: Sequence[Hashable], failure: Exception) -> None:
        for key in keys:
            self._completions.put((key, failure))


class LocalSampler:
    """The same over an engine in this process: a thread batches what waits.

    Args:
        engine: used by this sampler alone from now on.
        completions: receives a `Completion` for every request.
    """

    def __init__(self, engine: TorchEngine, completions: Completions) -> None:
        self._completions = completions
        self._engine = engine
        self._engine_lock = threading.Lock()
        self._waiting: deque[list[tuple[Hashable, SampleRequest]]] = deque()
        """Call by call."""
        self._wake = threading.Condition()
        self._num_in_model = 0
        self._closed = False
        threading.Thread(target=self._run, name="vlarl-local-sampler", daemon=True).start()

    @property
    def policy_version(self) -> int:
        """Version of the weights in use."""
        return self._engine.policy_version

    @property
    def num_outstanding(self) -> int:
        """See `SamplerClient.num_outstanding`."""
        with self._wake:
            return sum(map(len, self._waiting)) + self._num_in_model

    def load_weights(self, manifest: WeightManifest) -> int:
        """See `Engine.load_weights`; waits for the batch in the model, and requests behind it get the new weights."""
        with self._engine_lock:
            return self._engine.load_weights(manifest)

    def submit(self, key: Hashable, request: SampleRequest) -> None:
        """See `SamplerClient.submit`."""
        self.submit_many([(key, request)])

    def submit_many(self, items: Sequence[tuple[Hashable, SampleRequest]]) -> None:
        """See `SamplerClient.submit_many`."""
        accepted = []
        for key, request in items:
            try:
                self._engine.check([request])
            except ValueError as error:
                self._completions.put((key, error))
            else:
                accepted.append((key, request))
        with self._wake:
            if not self._closed:
                if accepted:
                    self._waiting.append(accepted)
                    self._wake.notify()
                return
        self._complete(accepted, EngineError("the sampler was closed"))

    def close(self) -> None:
        """See `SamplerClient.close`."""
        with self._wake:
            self._closed = True
            abandoned = [item for call in self._waiting for item in call]
            self._waiting.clear()
            self._wake.notify()
        self._complete(abandoned, EngineError("the sampler was closed"))

    def _run(self) -> None:
        while batch := self._take():
            try:
                with self._engine_lock:
                    replies = self._engine.sample([request for _, request in batch])
            except Exception as error:  # the thread's boundary: the loop that waits must hear of it
                logger.exception("the local engine failed on a batch of %d", len(batch))
                self._complete(batch, _plain(error))
            else:
                for (key, _), reply in zip(batch, replies, strict=True):
                    self._completions.put((key, reply))
            with self._wake:
                self._num_in_model = 0

    def _take(self) -> list[tuple[Hashable, SampleRequest]]:
        """The call that has waited longest, where calls mix with all that fit into its batch; empty once closed."""
        with self._wake:
            while not self._waiting and not self._closed:
                self._wake.wait()
            batch = self._waiting.popleft() if self._waiting else []
            while (
                self._engine.mix_calls
                and self._waiting
                and len(batch) + len(self._waiting[0]) <= self._engine.max_batch
            ):
                batch += self._waiting.popleft()
            self._num_in_model = len(batch)
            return batch

    def _complete(self, items: Sequence[tuple[Hashable, SampleRequest]], failure: Exception) -> None:
        for key, _ in items:
            self._completions.put((key, failure))


def _plain(error: BaseException) -> Exception:
    """The engine's own EngineError or ValueError without Ray's wrapping; EngineError with one line for all else."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, (EngineError, ValueError)):
        return cause
    lines = str(cause).strip().splitlines()
    return EngineError(f"{type(cause).__name__}: {lines[0] if lines else 'no message'}")
