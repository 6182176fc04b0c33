"""Waiting for other processes, and being called away from it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")

LISTEN_SECONDS = 0.25
"""`ray job stop` kills after 3 s, and the checkpoint has to be written by then."""


class EndRequested(Exception):
    """The run is to end: what has been sampled since the last iteration is dropped."""


def call_unless(ended: threading.Event, call: Callable[[], T]) -> T:
    """`call()`, which waits for actors and does no more, in a thread that is left behind where `ended` is set
    meanwhile.

    Raises:
        EndRequested: that was so.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    if not ended.is_set():
        threading.Thread(target=run, name="vlarl-call", daemon=True).start()
    while not ended.is_set():
        if wait([done], LISTEN_SECONDS).done:
            return done.result()
    raise EndRequested
