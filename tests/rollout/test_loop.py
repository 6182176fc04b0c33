"""The event loop of a runner against scripted environments and engines: whatever fails, each slot ends up where it can
go on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from vlarl_rllib.engines.protocol import EngineError
from vlarl_rllib.envs.vector import SlotEvent
from vlarl_rllib.rollout.loop import Completions, SlotLoop, make_groups
from vlarl_rllib.types import SampleReply, SampleRequest, Start

VERSION = 7
Answer = SampleReply | Exception | None


def reply(version: int = VERSION) -> SampleReply:
    return SampleReply(np.arange(7), np.full(7, -1.0, np.float32), version)


class Environments:
    """In place of SlotProcesses: answers at once, but for slots in `held`; the number of each frame is its pixels'
    value.

    Args:
        length: of every episode.
    """

    def __init__(self, length: int = 3) -> None:
        self.length = length
        self.held: set[int] = set()
        self.commands: list[tuple[str, int]] = []
        self.killed: list[int] = []
        self.recycled: list[int] = []
        self._pipe = Completions()
        self._frames, self._steps = 0, dict[int, int]()

    def send_reset(self, slot: int, task_id: int, initial_state: int, seed: int) -> None:
        self._steps[slot] = 0
        self._command("reset", slot)

    def send_actions(self, slot: int, actions: np.ndarray, *, every_frame: bool) -> None:
        self._command("step", slot)

    def _command(self, kind: str, slot: int) -> None:
        self.commands.append((kind, slot))
        if slot not in self.held:
            self.answer(kind, slot)

    def answer(self, kind: str, slot: int, **facts: Any) -> None:
        self._frames += 1
        if kind == "step":
            self._steps[slot] += 1
            facts = {"rewards": (0.0,), "truncated": self._steps[slot] >= self.length, **facts}
        self._pipe.put(SlotEvent(slot=slot, kind=kind, image=np.full((2, 2, 3), self._frames, np.uint8), **facts))

    def kill(self, slot: int) -> None:
        self.killed.append(slot)
        self.held.discard(slot)
        self.answer("died", slot, error="signal SIGKILL")

    def recycle(self) -> list[int]:
        return self.recycled

    def connections(self) -> list[Any]:
        return [self._pipe]

    def poll(self, timeout_seconds: float) -> list[SlotEvent]:
        return self._pipe.drain()


class Engines:
    """In place of a SamplerClient: `answer` says what each request gets, None = nothing."""

    def __init__(self, completions: Completions) -> None:
        self.completions = completions
        self.batches: list[int] = []
        self.unanswered: list[Any] = []
        self.frames: list[int] = []
        self.answer: Callable[[int], Answer] = lambda number: reply()
        """Of the n-th request, from 0."""

    def submit_many(self, items: Sequence[tuple[Any, SampleRequest]]) -> None:
        self.batches.append(len(items))
        for key, request in items:
            self.frames.append(int(request.image[0, 0, 0]))
            if (answer := self.answer(len(self.frames) - 1)) is None:
                self.unanswered.append(key)
            else:
                self.completions.put((key, answer))


class Contributor:
    """In place of a TrainingPlayer."""

    every_frame = False

    def __init__(self, quota: int) -> None:
        self.quota, self.steps, self.drops, self.episodes = quota, 0, 0, 0
        self.image: np.ndarray | None = None

    def next_start(self) -> Start:
        self.image = None
        return Start(0, 0, seed=0)

    def started(self, event: SlotEvent) -> None:
        self.episodes += 1
        self.image = event.image

    def wants_action(self) -> bool:
        return self.steps < self.quota

    def request(self) -> SampleRequest:
        assert self.image is not None, "a request between two episodes"
        return SampleRequest(self.image, "reach", 0, 1.0)

    def stepped(self, reply: SampleReply, event: SlotEvent) -> None:
        self.steps += 1
        self.image = event.image

    def dropped(self) -> None:
        self.drops += 1
        self.image = None


class Rig:
    """A loop of `slots` slots with everything around it."""

    def __init__(
        self,
        slots: int = 2,
        *,
        quota: int = 5,
        length: int = 3,
        groups: Sequence[Sequence[int]] | None = None,
        lockstep: bool = True,
    ) -> None:
        self.completions = Completions()
        self.environments, self.engines = Environments(length), Engines(self.completions)
        self.players = {slot: Contributor(quota) for slot in range(slots)}
        self.groups = [[slot] for slot in range(slots)] if groups is None else groups
        self.loop = SlotLoop(
            self.environments, slots, decode=lambda tokens: np.zeros(7), completions=self.completions,
            request_timeout_seconds=60.0, env_timeout_seconds=60.0, lockstep=lockstep,
        )  # fmt: skip

    def run(self) -> None:
        self.loop.run(self.players, self.engines, range(VERSION, VERSION + 1), self.groups)

    def more(self, quota: int) -> None:
        for player in self.players.values():
            player.quota += quota

    @property
    def steps(self) -> list[int]:
        return [player.steps for player in self.players.values()]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlarl_rllib.rollout.loop.POLL_SECONDS", 0.02)


def test_every_slot_plays_its_quota_and_keeps_its_episode_for_the_next_run() -> None:
    rig = Rig(slots=3, quota=5)
    rig.run()
    assert rig.steps == [5, 5, 5] and rig.loop.engine_error is None
    assert [player.episodes for player in rig.players.values()] == [2, 2, 2]
    rig.more(1)
    rig.run()
    assert rig.steps == [6, 6, 6]
    assert rig.environments.commands.count(("reset", 0)) == 3, "the third episode begins when the second ends"


@pytest.mark.parametrize(
    ("groups", "batches"), [([[0, 1, 2]], [3] * 4), ([[0, 2], [1]], [1] * 4 + [2] * 4), ([[0], [1], [2]], [1] * 12)]
)
def test_each_group_asks_for_all_its_slots_in_one_call(groups: list[list[int]], batches: list[int]) -> None:
    rig = Rig(slots=3, quota=4, groups=groups)
    rig.run()
    assert sorted(rig.engines.batches) == batches


def test_without_lockstep_slots_that_are_ready_at_the_same_time_share_a_call() -> None:
    rig = Rig(slots=3, quota=4, lockstep=False)
    rig.run()
    assert rig.engines.batches == [3] * 4


@pytest.mark.parametrize(
    ("slots_of_process", "count", "groups"),
    [
        ([(0, 2, 4), (1, 3, 5)], 2, [(0, 1, 2), (3, 4, 5)]),
        ([(0, 1, 2, 3)], 2, [(0, 1), (2, 3)]),
        ([(0,), (1,)], 2, [(0,), (1,)]),
        ([(0, 2), (1,)], 2, [(0, 1), (2,)]),
        ([(0, 2), (1,)], 1, [(0, 1, 2)]),
        ([(0, 2), (1,)], 3, [(0,), (1,), (2,)]),
        ([(0,)], 2, [(0,)]),
    ],
)
def test_groups_are_alike_in_size_and_lie_across_the_processes(
    slots_of_process: list[tuple[int, ...]], count: int, groups: list[tuple[int, ...]]
) -> None:
    assert make_groups(slots_of_process, count) == groups


def test_a_group_goes_on_while_the_environment_of_another_one_is_slow() -> None:
    rig = Rig(slots=4, quota=4, groups=[[0, 1], [2, 3]])
    rig.environments.held.add(3)
    rig.engines.answer = lambda number: (rig.environments.kill(3) if number == 7 else None) or reply()
    rig.run()
    assert rig.engines.batches[:4] == [2] * 4 and rig.environments.commands[:10].count(("step", 3)) == 0
    assert rig.steps == [4] * 4


@pytest.mark.parametrize("lockstep", [True, False])
def test_by_itself_no_slot_waits_for_a_slow_environment(lockstep: bool) -> None:
    rig = Rig(slots=2, quota=4, lockstep=lockstep)
    rig.environments.held.add(1)
    rig.engines.answer = lambda number: (rig.environments.kill(1) if number == 3 else None) or reply()
    rig.run()
    assert rig.engines.batches[:4] == [1] * 4 and rig.environments.commands[:6].count(("step", 1)) == 0
    assert rig.steps == [4, 4]


def test_in_lockstep_a_slot_that_resets_at_its_quota_does_not_hold_up_the_others() -> None:
    """It may be left resetting at the end of an iteration, and others may still owe steps after a death."""
    rig = Rig(slots=2, quota=3, length=3, groups=[[0, 1]])
    rig.players[1].quota = 6
    rig.environments.send_reset = holding_back(rig.environments, slot=0, allowed=1)
    rig.run()
    assert rig.steps == [3, 6], "slot 0 waits for its second reset, which nobody needs"


def holding_back(environments: Environments, *, slot: int, allowed: int) -> Callable[..., None]:
    """send_reset that leaves `slot`'s resets unanswered after so many."""
    send, seen = environments.send_reset, [0]

    def send_reset(number: int, *args: Any) -> None:
        if number == slot:
            seen[0] += 1
            if seen[0] > allowed:
                environments.held.add(slot)
        send(number, *args)

    return send_reset


@pytest.mark.parametrize(
    "failure", [EngineError("the engine died"), reply(VERSION - 1)], ids=["engine lost", "stale version"]
)
def test_a_failed_request_stops_the_run_and_its_frame_is_asked_again(failure: Answer) -> None:
    rig = Rig(slots=2, quota=4)
    rig.engines.answer = lambda number: failure if number == 3 else reply()
    rig.run()
    assert isinstance(rig.loop.engine_error, EngineError)
    assert sum(rig.steps) < 8
    lost, resets = rig.engines.frames[3], rig.environments.commands.count(("reset", 0))
    rig.engines.answer = lambda number: reply()
    rig.run()
    assert rig.steps == [4, 4] and rig.loop.engine_error is None
    assert rig.engines.frames.count(lost) == 2, "the frame of the failed request"
    assert rig.environments.commands.count(("reset", 0)) <= resets + 1, "the episode went on"


def test_a_malformed_request_is_raised() -> None:
    rig = Rig()
    rig.engines.answer = lambda number: ValueError("token 12 is not an action token")
    with pytest.raises(ValueError, match="token 12"):
        rig.run()


def test_an_environments_own_error_is_raised_with_its_slot() -> None:
    rig = Rig()
    rig.environments.held.add(1)
    rig.environments.answer("error", 1, error="no such task")
    with pytest.raises(RuntimeError, match=r"slot 1 failed:\nno such task"):
        rig.run()


def test_a_request_without_an_answer_times_out_and_its_late_answer_is_ignored() -> None:
    rig = Rig(slots=2, quota=4)
    rig.loop._request_timeout = 0.1
    rig.engines.answer = lambda number: None if number == 0 else reply()
    rig.run()
    assert "engines.request_timeout_seconds = 0.1" in str(rig.loop.engine_error)
    rig.completions.put((rig.engines.unanswered[0], reply()))
    rig.run()
    assert rig.steps == [4, 4]


def test_an_environment_without_an_answer_is_killed_and_only_its_episode_is_lost() -> None:
    rig = Rig(slots=2, quota=4)
    rig.loop._env_timeout = 0.1
    rig.environments.held.add(1)
    rig.run()
    assert rig.environments.killed == [1] and rig.loop.env_deaths == 1
    assert [player.drops for player in rig.players.values()] == [0, 1]
    assert rig.steps == [4, 4]


def test_an_answer_for_an_environment_that_died_meanwhile_finds_nobody() -> None:
    rig = Rig(slots=2, quota=4)

    def answer(number: int) -> Answer:
        if number == 0:
            rig.environments.kill(0)
            return None
        if number == 6:
            rig.completions.put((rig.engines.unanswered[0], reply()))
        return reply()

    rig.engines.answer = answer
    rig.run()
    assert rig.steps == [4, 4] and rig.players[0].drops == 1 and rig.players[0].episodes == 3


@pytest.mark.parametrize("state", ["READY", "RESETTING", "STEPPING", "SAMPLING"])
@pytest.mark.parametrize("recycled", [False, True], ids=["kept", "new process"])
def test_abandoned_episodes_are_replaced_whatever_their_slots_were_doing(state: str, recycled: bool) -> None:
    rig = Rig(slots=1, quota=4, length=100)
    rig.engines.answer = {"SAMPLING": lambda number: None if number == 2 else reply(), "READY": failing_at(2)}.get(
        state, lambda number: reply()
    )
    if state in ("RESETTING", "STEPPING"):
        hold_at(rig, 0 if state == "RESETTING" else 2)
    interrupt(rig)
    assert rig.loop._state[0].name == state

    rig.environments.recycled = [0] if recycled else []
    rig.loop.abandon()
    rig.engines.answer = lambda number: reply()
    if state == "SAMPLING":
        rig.completions.put((rig.engines.unanswered[0], reply()))
    elif state != "READY" and not recycled:  # a new process never answers what the old one was asked
        rig.environments.answer("reset" if state == "RESETTING" else "step", 0)
    rig.environments.held.clear()
    episodes = rig.players[0].episodes
    rig.run()
    assert rig.steps == [4]
    assert rig.players[0].episodes == episodes + 1, "exactly one new episode"
    assert rig.environments.commands.count(("reset", 0)) == 2


def test_an_abandoned_request_that_is_never_answered_does_not_bring_its_frame_back() -> None:
    rig = Rig(slots=1, quota=4, length=100)
    rig.engines.answer = lambda number: None if number == 2 else reply()
    interrupt(rig)
    rig.loop.abandon()
    rig.loop._request_timeout = 0.1
    rig.engines.answer = lambda number: reply()
    rig.run()
    assert rig.steps == [4] and rig.players[0].episodes == 2


def failing_at(number: int) -> Callable[[int], Answer]:
    return lambda asked: EngineError("gone") if asked == number else reply()


def hold_at(rig: Rig, step: int) -> None:
    """The environment answers nothing from its n-th step on, or from its reset for 0."""
    if step == 0:
        rig.environments.held.add(0)
        return
    send, sent = rig.environments.send_actions, [0]

    def send_actions(slot: int, actions: np.ndarray, *, every_frame: bool) -> None:
        sent[0] += 1
        if sent[0] == step:
            rig.environments.held.add(slot)
        send(slot, actions, every_frame=every_frame)

    rig.environments.send_actions = send_actions


class Interrupted(Exception):
    """Leaves `run` in the middle, as an exception in another slot does."""


def interrupt(rig: Rig) -> None:
    """Run until nothing moves any more, then leave."""

    def check() -> None:
        if time.monotonic() > deadline:
            raise Interrupted

    deadline = time.monotonic() + 0.3
    check_timeouts, rig.loop._check_timeouts = rig.loop._check_timeouts, check
    try:
        rig.run()
    except Interrupted:
        pass
    finally:
        rig.loop._check_timeouts = check_timeouts


def test_completions_from_threads_all_arrive_and_a_full_pipe_blocks_nobody() -> None:
    completions = Completions()
    number = 40_000
    threads = [
        threading.Thread(target=lambda base=base: [completions.put(base + i) for i in range(number)])
        for base in (0, number)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a pipe that nobody reads blocks the engines' threads"
    items: list[Any] = []
    for _ in range(3):
        items += completions.drain()
    assert sorted(items) == list(range(2 * number))
    completions.close()


def test_a_run_that_is_cut_short_leaves_what_is_under_way_to_the_next_one() -> None:
    rig = Rig(slots=2, quota=6, length=10)
    rig.environments.held = {1}
    cut = iter([*[False] * 6, True])
    rig.loop.run(rig.players, rig.engines, range(VERSION, VERSION + 1), rig.groups, until=lambda: next(cut))
    assert rig.steps[1] == 0 and 0 < rig.steps[0] < 6, "slot 1 still waits for its environment"
    rig.environments.held = set()
    rig.environments.answer("reset", 1)
    rig.run()
    assert rig.steps == [6, 6] and rig.loop.engine_error is None
    assert rig.environments.commands.count(("reset", 1)) == 1


def test_of_policies_that_run_ahead_a_range_is_taken() -> None:
    rig = Rig(slots=1, quota=3, length=10)
    versions = [VERSION, VERSION + 2, VERSION - 1]
    rig.engines.answer = lambda number: reply(versions[number])
    rig.loop.run(rig.players, rig.engines, range(VERSION, VERSION + 100), rig.groups)
    assert rig.steps == [2]
    assert (
        str(rig.loop.engine_error)
        == f"an engine answered with policy version {VERSION - 1} where {VERSION} or a newer one is current"
    )
