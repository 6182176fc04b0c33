"""A weight update as it passes through an engine: fed by the actor's methods, applied by the thread of the model."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol

from vlarl_rllib.engines.protocol import EngineError, as_engine_error
from vlarl_rllib.types import HALF_LOADED, INITIAL_VERSION, WeightBucket
from vlarl_rllib.weights.protocol import TransferError

if TYPE_CHECKING:
    from torch import Tensor


class Loading(Protocol):
    """What an update asks of the model; see `step_loop.Stepper`."""

    def begin_load(self) -> None: ...

    def load(self, tensors: dict[str, Tensor]) -> None: ...

    def end_load(self) -> None: ...


class WeightUpdate:
    """One version on its way into the model.

    Args:
        version: of the weights.
        fetch: the tensors of a bucket; `TransferError` breaks the update off.
    """

    def __init__(self, version: int, fetch: Callable[[WeightBucket], dict[str, Tensor]]) -> None:
        self.version = version
        self.future: Future[int] = Future()
        """The version then in use, once the last bucket is loaded; what the update broke off with, else."""
        self.seconds = {"fetch": 0.0, "load": 0.0}
        """Until buckets were there, and until the model had them; not those in which it waited for the next one."""
        self._fetch = fetch
        self._fed: deque[tuple[WeightBucket, Future[None]]] = deque()
        self._wake = threading.Condition()
        self._has_ended = self._is_over = False
        self._broken: Exception | None = None

    @classmethod
    def closed(cls) -> WeightUpdate:
        """One that takes nothing."""
        update = cls(INITIAL_VERSION, lambda _: {})
        update._is_over = True
        return update

    # The actor's side

    def feed(self, bucket: WeightBucket) -> Future[None]:
        """Load a bucket; done once nothing of it is read any more."""
        future: Future[None] = Future()
        with self._wake:
            if self._broken or self._has_ended or self._is_over:
                future.set_exception(self._broken or TransferError("no update is under way"))
            else:
                self._fed.append((bucket, future))
                self._wake.notify()
        return future

    def end(self) -> Future[int]:
        """That was the last bucket; the future holds the version then in use."""
        with self._wake:
            self._has_ended = True
            self._wake.notify()
        return self.future

    def abort(self, why: str) -> None:
        """Nothing more comes."""
        self._break_off(TransferError(f"the update to version {self.version} broke off: {why}"))

    def fail(self, error: EngineError) -> None:
        """The model is beyond use."""
        self._break_off(error)

    # The model's thread

    def apply(self, model: Loading, version: int) -> int:
        """Load what is fed until the update ends or breaks off; returns the version then in use.

        Args:
            version: in use so far.
        """
        has_begun = False
        while (item := self._take()) is not None:
            bucket, future = item
            began = time.perf_counter()
            try:
                tensors = self._fetch(bucket)
            except TransferError as error:
                future.set_exception(error)
                self._break_off(error)
                break
            fetched = time.perf_counter()
            self.seconds["fetch"] += fetched - began
            began = fetched
            try:
                if not has_begun:
                    has_begun = True
                    model.begin_load()
                model.load(tensors)
            except BaseException as error:
                future.set_exception(as_engine_error(error))
                raise
            del tensors
            self.seconds["load"] += time.perf_counter() - began
            future.set_result(None)
        if has_begun:
            began = time.perf_counter()
            model.end_load()
            self.seconds["load"] += time.perf_counter() - began
        with self._wake:
            self._is_over = True
        if self._broken is None:
            return self.version
        return HALF_LOADED if has_begun else version

    def tell(self) -> None:
        """How it ended, once the model's thread goes by the version that `apply` returned."""
        if self._broken is None:
            self.future.set_result(self.version)
        else:
            self.future.set_exception(self._broken)

    def _take(self) -> tuple[WeightBucket, Future[None]] | None:
        """The next bucket; None where the update has ended or broken off."""
        with self._wake:
            while not (self._fed or self._has_ended or self._broken):
                self._wake.wait()
            return self._fed.popleft() if self._fed else None

    def _break_off(self, error: Exception) -> None:
        with self._wake:
            if self._broken or self._is_over:
                return
            self._broken = error
            abandoned = [future for _, future in self._fed]
            self._fed.clear()
            self._wake.notify()
        for future in abandoned:
            future.set_exception(error)
