"""What the driver makes of its runners' rounds: each start once, whoever dies when."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.rollout.fake_group import FakeGroup
from vlarl_rllib.engines.protocol import NOT_FINITE
from vlarl_rllib.errors import DivergedError, lower_the_rates
from vlarl_rllib.rollout import runner_pool
from vlarl_rllib.rollout.collector import Rollout
from vlarl_rllib.rollout.contribution import Attached, Portion
from vlarl_rllib.rollout.evaluation import EvaluationRound, StartQueue
from vlarl_rllib.rollout.runner_pool import RunnerCalls
from vlarl_rllib.types import EpisodeResult, Start
from vlarl_rllib.weights.sync import LoadedWeights

EVERYTHING = [Start(task, state, seed=state) for task in range(4) for state in range(6)]


class Runner:
    """In place of a VLAEnvRunner: two slots whose episodes take a random number of rounds."""

    def __init__(self, worker_index: int, pid: int, rng: random.Random, tasks: tuple[int, ...]) -> None:
        self.worker_index, self.pid, self.rng, self.tasks = worker_index, pid, rng, tasks
        self.queue: StartQueue | None = None
        self.engine_error: str | None = None
        self.broken: str | None = None
        self.steps = 1

    def attach(self, engines: list[Any], version: int, manifest: Any) -> Attached:
        if self.broken:
            return Attached(self.pid, (), (), self.broken)
        return Attached(self.pid, self.tasks, tuple(self.queue.playing.values()) if self.queue else ())

    def begin_new_episodes(self) -> None:
        self.queue = None

    def evaluate(
        self, starts: list[Start], *, change_tasks: bool, seconds: float | None, record: Any
    ) -> EvaluationRound:
        self.queue = self.queue or StartQueue(self.tasks, [(0,), (1,)], 1, change_tasks=change_tasks)
        self.queue.refill(starts)
        played = EvaluationRound(num_steps=self.steps, engine_error=self.engine_error)
        if not self.steps:
            return played
        for slot in (0, 1):
            if slot not in self.queue.playing and self.queue.take(slot) is None:
                continue
            fate = self.rng.random()
            if fate < 0.5:
                start = self.queue.finish(slot)
                played.results.append(EpisodeResult(start.task_id, start.initial_state, self.pid, True, 1.0))
            elif fate < 0.55:
                played.dropped.append(self.queue.finish(slot))
        return played


class Runners(FakeGroup):
    """In place of RLlib's EnvRunnerGroup.

    `fail(method)` says whether a call is lost: before it is made, or on its way back.
    """

    def __init__(self, num: int, rng: random.Random, tasks: tuple[int, ...] = (0, 1)) -> None:
        self.fail: Callable[[str], str | None] = lambda method: None
        super().__init__(num, rng, lambda index, pid: Runner(index, pid, rng, tasks))

    def foreach_env_runner(
        self, functions: list[Any], *, kwargs: list[Any], remote_worker_ids: list[int], **options: Any
    ) -> list[Any]:
        answers = []
        for function, arguments, index in zip(functions, kwargs, remote_worker_ids, strict=True):
            when = self.fail(function.args[0])
            if when != "before":
                answer = function(self.runners[index], **arguments)
            if when is None:
                answers.append(answer)
            else:
                self.lose(index)
        return answers


def calls(runners: Runners) -> RunnerCalls:
    return RunnerCalls(runners, LoadedWeights(None), None, restore_runners=runners.restore, timeout_seconds=1.0)


def outcome(rounds: Any) -> list[tuple[int, int]]:
    return sorted((result.task_id, result.initial_state) for played in rounds for result in played.results)


ONCE_EACH = [(start.task_id, start.initial_state) for start in EVERYTHING]


@pytest.mark.parametrize("seed", range(30))
def test_each_start_is_played_once_though_runners_and_environments_die(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_pool.time, "sleep", lambda seconds: None)
    rng = random.Random(seed)
    runners = Runners(1 + seed % 3, rng)
    runners.fail = lambda method: rng.choice(["before", "behind"]) if rng.random() < 0.1 else None
    assert outcome(calls(runners).evaluate(EVERYTHING, change_tasks=True, seconds=1.0)) == ONCE_EACH
    assert runners.deaths > 0, "nothing was tested"


def test_an_evaluation_in_training_keeps_to_the_slots_tasks_and_ends_the_episodes() -> None:
    runners = Runners(2, random.Random(0), tasks=(2, 3))
    starts = [start for start in EVERYTHING if start.task_id > 1]
    assert outcome(calls(runners).evaluate(starts)) == [(start.task_id, start.initial_state) for start in starts]
    assert all(runner.queue is None for runner in runners.runners.values())


def test_a_start_that_no_runner_may_play_is_an_error_and_not_an_endless_loop() -> None:
    runners = Runners(2, random.Random(0), tasks=(0, 1))
    with pytest.raises(RuntimeError, match="5 times in a row"):
        list(calls(runners).evaluate(EVERYTHING))


def test_engines_that_fail_time_and_again_end_the_evaluation() -> None:
    runners = Runners(1, random.Random(0))
    runners.runners[1].engine_error, runners.runners[1].steps = "the engine is out", 0
    with pytest.raises(RuntimeError, match="the engine is out"):
        list(calls(runners).evaluate(EVERYTHING, change_tasks=True, seconds=1.0))


def test_weights_that_give_no_finite_numbers_end_it_at_once_and_say_what_to_do() -> None:
    """Another engine would say the same: so no five rounds, no new engine, and no new trial."""
    runners = Runners(1, random.Random(0))
    runners.runners[1].engine_error, runners.runners[1].steps = f"log-probability nan; {NOT_FINITE}", 0
    diverged = RunnerCalls(
        runners,
        LoadedWeights(None),
        None,
        restore_runners=runners.restore,
        timeout_seconds=1.0,
        if_diverged=lower_the_rates({"training.lr": 0.5}),
    )
    with pytest.raises(DivergedError, match=r"the weights give .* not finite; lower training.lr \(0.5\)"):
        list(diverged.evaluate(EVERYTHING, change_tasks=True, seconds=1.0))
    assert runners.deaths == 0


def test_a_runner_that_does_not_come_back_is_killed_and_its_last_words_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner_pool.time, "sleep", lambda seconds: None)
    runners = Runners(1, random.Random(0))
    runners.runners[1].broken = "Traceback ...\nMemoryError: no room for a model"
    killed: list[int] = []
    monkeypatch.setattr(RunnerCalls, "_kill", lambda self, index: killed.append(index))
    with pytest.raises(
        RuntimeError, match=r"5 times in a row; .*runner 1 cannot start: MemoryError: no room for a model"
    ):
        list(calls(runners).evaluate(EVERYTHING, change_tasks=True, seconds=1.0))
    assert killed == [1] * runner_pool.MAX_FRUITLESS_ROUNDS


def test_what_an_environment_raised_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_pool.time, "sleep", lambda seconds: None)
    killed: list[int] = []
    monkeypatch.setattr(RunnerCalls, "_kill", lambda self, index: killed.append(index))

    def raising(self: Runner, starts: list[Start], **options: Any) -> EvaluationRound:
        raise RuntimeError("environment of slot 0 failed:\nTraceback ...\nKeyError: 'drawer'\n")

    monkeypatch.setattr(Runner, "evaluate", raising)
    told = "runner 1 failed in evaluate: RuntimeError: environment of slot 0 failed: KeyError: 'drawer'; their own logs"
    with pytest.raises(RuntimeError, match=f"5 times in a row; the runners' last words: {told}"):
        list(calls(Runners(1, random.Random(0))).evaluate(EVERYTHING, change_tasks=True, seconds=1.0))
    assert killed == [1] * runner_pool.MAX_FRUITLESS_ROUNDS


def test_rounds_without_a_step_are_patience_where_nothing_failed() -> None:
    """Models are being built."""
    runners = Runners(1, random.Random(0))
    runners.runners[1].steps = 0
    rounds = calls(runners).evaluate(EVERYTHING, change_tasks=True, seconds=1.0)
    for _ in range(3 * runner_pool.MAX_FRUITLESS_ROUNDS):
        assert next(rounds).results == []
    runners.runners[1].steps = 1
    assert outcome(rounds) == ONCE_EACH


def test_a_start_that_kills_its_environment_each_time_is_named() -> None:
    runners = Runners(1, random.Random(0))
    bad = Start(2, 4, seed=4)
    evaluate = Runner.evaluate

    def deadly(self: Runner, starts: list[Start], **options: Any) -> EvaluationRound:
        played = evaluate(self, [start for start in starts if start != bad], **options)
        return EvaluationRound(played.results, [*played.dropped, bad], 1)

    runners.runners[1].evaluate = deadly.__get__(runners.runners[1])
    with pytest.raises(RuntimeError, match=r"task 2, initial state 4: .* died 5 times"):
        list(calls(runners).evaluate(EVERYTHING, change_tasks=True, seconds=1.0))


def test_a_stop_between_two_rounds_leaves_the_rest_unplayed() -> None:
    rounds = calls(Runners(1, random.Random(3))).evaluate(EVERYTHING, change_tasks=True, seconds=1.0)
    first = [result for _ in range(3) for result in next(rounds).results]
    rounds.close()
    assert 0 < len(first) < len(EVERYTHING)


def test_with_several_runners_a_task_is_in_few_hands() -> None:
    attached = {index: Attached(index, (0, 1), ()) for index in (1, 2)}
    shares = runner_pool._share(EVERYTHING, attached, change_tasks=True)
    assert [{start.task_id for start in share} for share in shares.values()] == [{0, 1}, {2, 3}]
    assert [len(share) for share in shares.values()] == [12, 12]


def test_uniform_groups_are_left_out_but_for_what_every_learner_needs() -> None:
    def kept(uniform: list[bool], enough: int) -> list[str]:
        rollout = Rollout([(1, Portion(f"group {i}", 0, 8, 8, same, {0: 8})) for i, same in enumerate(uniform)])
        rollout.filter_groups(enough)
        assert rollout.lost_steps == 0
        return rollout.refs

    assert kept([True, False, True, False], enough=1) == ["group 1", "group 3"]
    assert kept([True, False, True], enough=2) == ["group 1", "group 0"]
    assert kept([True, True, True], enough=2) == ["group 0", "group 1"]
