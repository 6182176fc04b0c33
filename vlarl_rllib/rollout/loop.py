"""The event loop of a runner: each slot cycles frame, request, step, and waits at most for the slots of its group.

One thread waits on one set of file descriptors: the environment processes' pipes and a pipe that completed requests are
announced on. So nothing here can deadlock on a lock, and an exception of a sampler arrives as an event like any other.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import wait
from typing import Any

import numpy as np

from vlarl_rllib.engines.client import SamplerClient
from vlarl_rllib.engines.protocol import EngineError
from vlarl_rllib.envs.vector import SlotEvent, SlotProcesses
from vlarl_rllib.rollout.players import Player
from vlarl_rllib.types import SampleReply

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.25
"""How often time-outs are looked at while nothing happens."""


class Completions:
    """Finished requests, announced on a pipe so that they can be waited for together with the environments' pipes."""

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)

    def put(self, item: Any) -> None:
        """Called from any thread."""
        self._items.append(item)
        with contextlib.suppress(BlockingIOError):  # the pipe is full of announcements already
            os.write(self._writer, b"\0")

    def drain(self) -> list[Any]:
        with contextlib.suppress(BlockingIOError):
            os.read(self._reader, 65536)
        return [self._items.popleft() for _ in range(len(self._items))]

    def fileno(self) -> int:
        return self._reader

    def close(self) -> None:
        os.close(self._reader)
        os.close(self._writer)


def make_groups(slots_of_process: Sequence[Sequence[int]], count: int) -> list[tuple[int, ...]]:
    """Divide all slots into up to `count` groups of nearly one size, each with slots of as many processes as possible.

    Of two groups one steps its environments while the engine samples for the other (double-buffered sampling, arXiv
    2006.11751).
    """
    columns = itertools.zip_longest(*slots_of_process)
    slots = [slot for column in columns for slot in column if slot is not None]
    size = -(-len(slots) // count)
    return [tuple(slots[start : start + size]) for start in range(0, len(slots), size)]


class SlotState(enum.Enum):
    EMPTY = "no episode"
    RESETTING = "waits for its environment to reset"
    READY = "has a frame"
    SAMPLING = "waits for a decision"
    STEPPING = "waits for its environment to step"


class SlotLoop:
    """Drives the slots of one runner.

    Args:
        processes: the environments.
        decode: a reply's token ids [A] -> the actions [k, 7] to play; raises ValueError for anything else.
        request_timeout_seconds: a reply that takes longer counts as an engine failure.
        env_timeout_seconds: a reset or step that takes longer ends its environment process, which is then started anew.
        lockstep: who shares a call is to depend on nothing but the groups of `run`. Else slots without company that are
            ready at the same time share one, which takes longer than some models need for a request.
    """

    def __init__(
        self,
        processes: SlotProcesses,
        num_slots: int,
        *,
        decode: Callable[[np.ndarray], np.ndarray],
        completions: Completions,
        request_timeout_seconds: float,
        env_timeout_seconds: float,
        lockstep: bool,
    ) -> None:
        self.completions, self._lockstep = completions, lockstep
        self._processes, self._num_slots = processes, num_slots
        self._decode = decode
        self._request_timeout, self._env_timeout = request_timeout_seconds, env_timeout_seconds
        self._env_calls: dict[int, float] = {}
        """Since when each slot has been waiting for its environment."""
        self._state = [SlotState.EMPTY] * num_slots
        self._discard = [False] * num_slots
        self._replies: dict[int, SampleReply] = {}
        self._requests: dict[int, tuple[int, float]] = {}
        self._next_key = 0
        self.engine_error: EngineError | None = None
        self.env_steps = Counter[tuple[int, str]]()
        """Played since the loop was made, by task and purpose."""
        self.forget_counts()

    def forget_counts(self) -> None:
        """Begin anew to count."""
        self.env_deaths = 0
        self.env_seconds = self.sampler_seconds = 0.0

    def abandon(self) -> None:
        """All running episodes end here; the next `run` starts new ones, whatever is still under way."""
        for slot, state in enumerate(self._state):
            if state is SlotState.READY:
                self._state[slot] = SlotState.EMPTY
            elif state is not SlotState.EMPTY:
                self._discard[slot] = True
        for slot in self._processes.recycle():
            self._env_calls.pop(slot, None)
            if self._state[slot] is not SlotState.SAMPLING:
                self._state[slot], self._discard[slot] = SlotState.EMPTY, False

    def run(
        self,
        players: Mapping[int, Player],
        sampler: SamplerClient,
        versions: range,
        groups: Iterable[Sequence[int]],
        purpose: str = "training",
        *,
        until: Callable[[], bool] = lambda: False,
    ) -> None:
        """Play until every player rests, or until the engine failed (`engine_error`) and nothing is in flight any more.

        Args:
            players: by slot; other slots stay as they are.
            versions: policy versions that a reply may carry.
            groups: of slots, which together hold each player's once. A group's requests are sent in one call, when none
                of its slots is under way.
            purpose: what steps are counted as.
            until: says whether to return at once; what is under way then is the next run's, of the same players.
        """
        self.engine_error = None
        self._purpose = purpose
        self._players, self._sampler, self._versions = players, sampler, versions
        self._groups = [[slot for slot in group if slot in players] for group in groups]
        self._begin_idle()
        self._send_requests()
        while self._waiting(players) and not until():
            wait([*self._processes.connections(), self.completions.fileno()], timeout=POLL_SECONDS)
            for event in self._processes.poll(0):
                self._on_event(event)
            for key, outcome in self.completions.drain():
                self._on_completion(key, outcome)
            self._check_timeouts()
            self._send_requests()

    # Who is waited for

    def _waiting(self, slots: Iterable[int]) -> bool:
        """Whether any of these slots is under way.

        A slot that rests at its quota may be left resetting: that overlaps with the update.
        """
        return any(
            self._state[slot] in (SlotState.SAMPLING, SlotState.STEPPING)
            or (
                self._state[slot] is SlotState.RESETTING
                and self.engine_error is None
                and self._players[slot].wants_action()
            )
            for slot in slots
        )

    # What happens to a slot

    def _begin_idle(self) -> None:
        for slot in self._players:
            if self._state[slot] is SlotState.EMPTY:
                self._begin(slot)

    def _begin(self, slot: int) -> None:
        start = self._players[slot].next_start()
        if start is None:
            self._state[slot] = SlotState.EMPTY
            return
        self._state[slot] = SlotState.RESETTING
        self._env_calls[slot] = time.monotonic()
        self._processes.send_reset(slot, start.task_id, start.initial_state, start.seed)

    def _send_requests(self) -> None:
        if self.engine_error is not None:
            return
        alone: list[int] = []
        for group in self._groups:
            if not self._waiting(group):
                ready = [
                    slot
                    for slot in group
                    if self._state[slot] is SlotState.READY and self._players[slot].wants_action()
                ]
                if len(group) == 1 and not self._lockstep:
                    alone += ready
                else:
                    self._submit(ready)
        self._submit(alone)

    def _submit(self, slots: list[int]) -> None:
        items = []
        for slot in slots:
            key, self._next_key = self._next_key, self._next_key + 1
            self._requests[key] = (slot, time.monotonic())
            self._state[slot] = SlotState.SAMPLING
            items.append((key, self._players[slot].request()))
        if items:
            self._sampler.submit_many(items)

    def _on_completion(self, key: int, outcome: SampleReply | Exception) -> None:
        if key not in self._requests:  # given up on after its time-out
            return
        slot, since = self._requests.pop(key)
        assert self._state[slot] is SlotState.SAMPLING, f"an action for slot {slot}, which {self._state[slot].value}"
        self.sampler_seconds += time.monotonic() - since
        if self._discard[slot]:
            self._discard[slot] = False
            self._state[slot] = SlotState.EMPTY
            if slot in self._players:
                self._begin(slot)
            return
        if isinstance(outcome, Exception):
            self._fail(slot, outcome)
            return
        if outcome.policy_version not in self._versions:
            newest = "" if len(self._versions) == 1 else " or a newer one"
            self._fail(
                slot,
                EngineError(
                    f"an engine answered with policy version {outcome.policy_version} where {self._versions.start}"
                    f"{newest} is current"
                ),
            )
            return
        self._replies[slot] = outcome
        self._state[slot] = SlotState.STEPPING
        self._env_calls[slot] = time.monotonic()
        actions = self._decode(outcome.tokens)
        self._processes.send_actions(slot, actions, every_frame=self._players[slot].every_frame)

    def _fail(self, slot: int, error: Exception) -> None:
        """No further requests in this run; the slot keeps its frame and goes on when an engine is back."""
        if not isinstance(error, EngineError):
            raise error
        if self.engine_error is None:
            logger.warning("sampling stops here until an engine is back: %s", error)
        self.engine_error = self.engine_error or error
        self._state[slot] = SlotState.READY

    def _on_event(self, event: SlotEvent) -> None:
        slot = event.slot
        self._env_calls.pop(slot, None)
        self.env_seconds += event.seconds
        if event.kind == "error":
            raise RuntimeError(f"environment of slot {slot} failed:\n{event.error}")
        if event.kind == "died":
            self._on_death(slot)
            return
        expected = SlotState.RESETTING if event.kind == "reset" else SlotState.STEPPING
        assert self._state[slot] is expected, f"a {event.kind} event of slot {slot}, which {self._state[slot].value}"
        if event.kind == "step":
            self.env_steps[event.task_id, self._purpose] += event.num_steps
        if self._discard[slot] or slot not in self._players:
            self._discard[slot] = False
            self._state[slot] = SlotState.EMPTY
            if slot in self._players:
                self._begin(slot)
        elif event.kind == "reset":
            self._state[slot] = SlotState.READY
            self._players[slot].started(event)
        else:
            self._state[slot] = SlotState.READY
            self._players[slot].stepped(self._replies.pop(slot), event)
            if event.ended:
                self._state[slot] = SlotState.EMPTY
                # others too: the end of an episode may be what one that had nothing to do has waited for
                self._begin_idle()

    def _on_death(self, slot: int) -> None:
        """The process is being restarted; an answer still on its way to this slot finds nobody."""
        self.env_deaths += 1
        self._replies.pop(slot, None)
        self._requests = {key: (s, since) for key, (s, since) in self._requests.items() if s != slot}
        self._discard[slot] = False
        self._state[slot] = SlotState.EMPTY
        if slot in self._players:
            self._players[slot].dropped()
            self._begin(slot)

    def _check_timeouts(self) -> None:
        now = time.monotonic()
        for key, (_, since) in list(self._requests.items()):
            if now - since > self._request_timeout:
                self._on_completion(
                    key, EngineError(f"no action within engines.request_timeout_seconds = {self._request_timeout:g}")
                )
        for slot, since in list(self._env_calls.items()):
            if now - since > self._env_timeout:
                del self._env_calls[slot]
                logger.warning(
                    "slot %d: no answer from its environment within env.timeout_seconds = %g; its process is ended",
                    slot,
                    self._env_timeout,
                )
                self._processes.kill(slot)
