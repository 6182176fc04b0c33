"""Sampling ahead of the updates, with runners that are slow, die, freeze and come back."""

from __future__ import annotations

import random
import threading
from collections import Counter
from typing import Any

import pytest

from tests.rollout.fake_group import FakeGroup
from vlarl_rllib.process.calls import EndRequested
from vlarl_rllib.rollout import async_collector, runner_pool
from vlarl_rllib.rollout.async_collector import AsyncCollector
from vlarl_rllib.rollout.contribution import Attached, Contribution, Order, Portion
from vlarl_rllib.rollout.runner_pool import RunnerCalls

SLOTS, QUOTA = 2, 8


class Weights:
    """In place of WeightSync: versions are 10, 20, ... so that none is mistaken for a number of updates."""

    def __init__(self) -> None:
        self.version, self.manifest, self.visits = 10, None, 0

    def push(self) -> None:
        self.version += 10

    def make_engines_current(self) -> None:
        self.visits += 1


class Runner:
    """In place of a VLAEnvRunner: each report is as far as chance lets its two slots get."""

    def __init__(self, worker_index: int, pid: int, rng: random.Random, sync: Weights) -> None:
        self.worker_index, self.pid, self.rng, self.sync = worker_index, pid, rng, sync
        self.generation, self.engine_error, self.failure = -1, None, None
        self.shares: list[int] = []
        self.progress: list[Counter[int]] = []

    def play_ahead(self, attach: dict[str, Any], order: Order) -> Contribution:
        if order.generation != self.generation:
            self.generation = order.generation
            self.shares, self.progress = [order.first] * SLOTS, [Counter[int]() for _ in range(SLOTS)]
        report = Contribution(runner=self.worker_index, generation=order.generation, engine_error=self.engine_error)
        for slot in range(SLOTS) if not self.engine_error else ():
            while self.shares[slot] <= order.last and self.rng.random() < 0.7:
                assert self.sync.version >= order.oldest_version
                self.progress[slot][self.sync.version] += 4
                report.played += 4
                if self.progress[slot].total() == order.quota:
                    report.portions.append(self.portion(self.shares[slot], self.progress[slot]))
                    self.shares[slot], self.progress[slot] = self.shares[slot] + 1, Counter()
        report.through = min(self.shares) - 1
        report.attached = Attached(self.pid, (0,) * SLOTS, (), self.failure)
        return report

    def portion(self, iteration: int, versions: Counter[int]) -> Portion:
        return Portion(f"{self.pid}", iteration, QUOTA, QUOTA, False, dict(versions))


class Runners(FakeGroup):
    """In place of RLlib's EnvRunnerGroup, whose calls take as long as chance wants."""

    def __init__(self, num: int, rng: random.Random, sync: Weights) -> None:
        self.calls: dict[int, Any] = {}
        self.mortality = 0.0
        self.frozen: set[int] = set()
        super().__init__(num, rng, lambda index, pid: Runner(index, pid, rng, sync))

    def restore(self) -> None:
        if self.rng.random() < 0.3:
            super().restore()

    def lose(self, index: int) -> None:
        super().lose(index)
        self.calls.pop(index, None)
        self.frozen.discard(index)

    def foreach_env_runner_async(
        self, functions: list[Any], *, tag: str, kwargs: list[Any], remote_worker_ids: list[int]
    ) -> None:
        assert tag == "play_ahead" and not self.calls.keys() & set(remote_worker_ids), "one call at a time"
        for function, arguments, index in zip(functions, kwargs, remote_worker_ids, strict=True):
            self.calls[index] = (function, arguments)

    def fetch_ready_async_reqs(self, *, tags: str, timeout_seconds: float) -> list[Any]:
        for index in list(self.calls):
            if self.rng.random() < self.mortality:
                self.lose(index)
        ready = [index for index in self.calls if index not in self.frozen and self.rng.random() < 0.6]
        answers = []
        for index in ready:
            function, arguments = self.calls.pop(index)
            answers.append((index, function(self.runners[index], **arguments)))
        return answers


def make(
    num: int, seed: int, *, max_staleness: int = 1, enough: int = 1, monkeypatch: pytest.MonkeyPatch, **calls: Any
) -> tuple[AsyncCollector, Runners, Weights]:
    monkeypatch.setattr(async_collector, "POLL_SECONDS", 0.0)
    sync = Weights()
    runners = Runners(num, random.Random(seed), sync)
    monkeypatch.setattr(RunnerCalls, "_kill", lambda self, index: runners.lose(index))
    options = {"restore_runners": runners.restore, "timeout_seconds": 60.0} | calls
    return (
        AsyncCollector(runners, sync, None, enough=lambda: enough, max_staleness=max_staleness, **options),
        runners,
        sync,
    )


def learn(collector: AsyncCollector, sync: Weights, iterations: int, rng: random.Random) -> list[Any]:
    """The Algorithm's loop: collect, update for a while, push."""
    rollouts = []
    for iteration in range(iterations):
        rollouts.append(collector.collect(iteration, QUOTA, {}))
        for _ in range(rng.randrange(12)):
            collector.keep_playing()
        sync.push()
    return rollouts


@pytest.mark.parametrize("max_staleness", [1, 2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_each_iteration_has_one_share_of_each_slot_and_none_is_older_than_the_bound(
    seed: int, max_staleness: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector, _, sync = make(3, seed, max_staleness=max_staleness, monkeypatch=monkeypatch)
    rollouts = learn(collector, sync, 20, random.Random(seed))
    for iteration, rollout in enumerate(rollouts):
        assert [runner for runner, _ in rollout.portions] == [1, 1, 2, 2, 3, 3]
        assert {portion.iteration for _, portion in rollout.portions} == {iteration}
        assert sum(rollout.staleness.values()) == 3 * SLOTS * QUOTA
        assert max(rollout.staleness) <= max_staleness and rollout.stale_steps == rollout.lost_steps == 0
    staleness = sum((Counter(rollout.staleness) for rollout in rollouts), Counter[int]())
    assert staleness[0] and staleness[1] and max(staleness) > (max_staleness > 2), "sampling does run ahead"


@pytest.mark.parametrize("seed", range(20))
def test_iterations_go_on_though_runners_die(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    collector, runners, sync = make(1 + seed % 3, seed, enough=2, monkeypatch=monkeypatch)
    runners.mortality = 0.1
    monkeypatch.setattr(runner_pool, "MAX_FRUITLESS_ROUNDS", 100)
    rollouts = learn(collector, sync, 20, random.Random(seed))
    assert runners.deaths > 0, "nothing was tested"
    for rollout in rollouts:
        assert len(rollout.portions) >= 2 and max(rollout.staleness) <= 1


def test_a_lost_portion_is_made_up_for_by_later_shares_or_played_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    collector, _, _ = make(1, 0, enough=SLOTS, monkeypatch=monkeypatch)
    rollout = collector.collect(0, QUOTA, {})
    rollout.drop([0, 1])
    again = collector.collect(0, QUOTA, {}, rollout)
    assert [portion.iteration for _, portion in again.portions] == [1, 1] and again.lost_steps == 2 * QUOTA
    again.drop([0, 1])
    assert [p.iteration for _, p in collector.collect(0, QUOTA, {}, again).portions] == [0, 0], "all begin anew"


def test_what_was_played_before_a_rollback_is_not_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    collector, runners, sync = make(2, 3, monkeypatch=monkeypatch)
    learn(collector, sync, 3, random.Random(0))
    for _ in range(30):
        collector.keep_playing()
    pending = dict(runners.calls)
    collector.begin_new_episodes()
    sync.push()
    rollout = collector.collect(1, QUOTA, {})
    assert rollout.lost_steps > 0 and {p.iteration for _, p in rollout.portions} == {1}
    assert all(set(portion.versions) == {sync.version} for _, portion in rollout.portions)
    assert len(pending) <= 2


def test_a_portion_that_is_too_old_is_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    collector, _, sync = make(1, 1, monkeypatch=monkeypatch)
    collector.collect(0, QUOTA, {})
    old = Portion("old", 0, QUOTA, QUOTA, False, {sync.version - 5: 1, sync.version: QUOTA - 1})
    collector._waiting.portions.append((1, old))
    sync.push()
    rollout = collector.collect(1, QUOTA, {})
    assert rollout.stale_steps == QUOTA and "old" not in rollout.refs


def test_a_frozen_runner_is_ended_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    collector, runners, sync = make(2, 2, timeout_seconds=0.05, monkeypatch=monkeypatch)
    collector.collect(0, QUOTA, {})
    runners.frozen = {2}
    for iteration in (1, 2, 3):  # it may have been ahead
        sync.push()
        assert collector.collect(iteration, QUOTA, {}).portions
    assert runners.deaths >= 1


def test_engines_that_fail_are_seen_to_and_end_the_run_time_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    collector, runners, sync = make(1, 0, monkeypatch=monkeypatch)
    runners.runners[1].engine_error = "the engine is out"
    with pytest.raises(RuntimeError, match="the engine is out"):
        collector.collect(0, QUOTA, {})
    assert sync.visits == 1 + runner_pool.MAX_FRUITLESS_ROUNDS


def test_runners_that_cannot_start_end_the_run_with_their_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    collector, runners, _ = make(1, 0, monkeypatch=monkeypatch)
    make_runner = runners.new

    def make_broken(index: int) -> Runner:
        runner: Runner = make_runner(index)
        runner.failure = "Traceback ...\nMemoryError: no room for a model"  # type: ignore[assignment]
        return runner

    runners.new = make_broken  # type: ignore[method-assign]
    runners.lose(1)
    with pytest.raises(RuntimeError, match=r"5 times in a row; .*runner 1 cannot start: MemoryError: no room for a"):
        collector.collect(0, QUOTA, {})


def test_an_end_is_heard_while_runners_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    collector, runners, _ = make(1, 0, ended=ended, monkeypatch=monkeypatch)
    runners.frozen = {1}
    ended.set()
    with pytest.raises(EndRequested):
        collector.collect(0, QUOTA, {})
    collector.keep_playing()
