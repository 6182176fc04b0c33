"""The runners as the driver calls them: through failures of engines and runners, in training and in evaluations."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError
from ray.rllib.env.env_runner_group import EnvRunnerGroup

from vlarl_rllib.engines.protocol import NOT_FINITE
from vlarl_rllib.errors import DivergedError
from vlarl_rllib.process.calls import EndRequested, call_unless
from vlarl_rllib.rllib_compat import call_dead, runner_actors
from vlarl_rllib.rollout.contribution import Attached
from vlarl_rllib.rollout.evaluation import EvaluationRound
from vlarl_rllib.types import Start
from vlarl_rllib.weights.sync import EngineWeights

logger = logging.getLogger(__name__)

RUNNER_RESTART_SECONDS = 300.0
"""Longest wait for a restarted runner."""
MAX_FRUITLESS_ROUNDS = 5
"""Rounds of sampling in a row that bring no step at all before the run gives up."""
INTERRUPTIBLE = ("sample_slots", "play_ahead", "evaluate")
"""Calls whose result nobody misses when the run ends."""
MAX_LOST_EPISODES = 5
"""Times that an evaluation begins one start anew, after a death, before it gives up."""


class Engines(Protocol):
    """What runners are told of the engines."""

    @property
    def handles(self) -> list[Any]:
        """The actors to ask now."""
        ...


class Judges(Protocol):
    """The reward worker, as far as runners are concerned."""

    @property
    def handle(self) -> Any:
        """The actor to ask now."""
        ...

    def ensure_alive(self) -> None:
        """Replace a dead one."""
        ...


@dataclass(frozen=True)
class Raised:
    """In place of a runner's answer."""

    words: str

    @classmethod
    def by(cls, error: Exception) -> Raised:
        """One line of it: the error, and where that has a traceback in it, the traceback's own last line."""
        first, *rest = f"{type(error).__name__}: {error}".strip().splitlines()
        return cls(f"{first} {rest[-1].strip()}" if rest else first)


def require_runners(runners: EnvRunnerGroup) -> None:
    """Raise RuntimeError, with the traceback, where a runner could not be made, or could not make its environments.

    RLlib goes on without a runner whose constructor raised, and Ray does not start it anew.
    """
    for index, actor in runner_actors(runners).items():
        try:
            failure = ray.get(actor.failure.remote())
        except RayActorError as error:
            failure = str(error)
        if failure:
            raise RuntimeError(f"runner {index} cannot start:\n{failure}")


class RunnerCalls:
    """Calls to the runners that go on through failures of engines and runners, and the evaluation that is made of them.

    Args:
        runners: RLlib's group of VLAEnvRunners.
        sync: for the engines' health and the weights' version.
        pool: None with in-process samplers.
        reward_service: None without a judge.
        restore_runners: brings restarted runners back into the group.
        timeout_seconds: a runner that takes longer for a call is frozen; it is killed and started anew.
        if_diverged: what to do where the weights give no finite numbers.
        trial: number of the trial that the runners play for, and their config for it; runners that play for another one
            are told. None = the one that they were made for.
        ended: where it is set, sampling and evaluating are broken off with `EndRequested`; the runners are of no use
            any more then.
    """

    def __init__(
        self,
        runners: EnvRunnerGroup,
        sync: EngineWeights,
        pool: Engines | None,
        *,
        reward_service: Judges | None = None,
        restore_runners: Callable[[], Any],
        timeout_seconds: float,
        if_diverged: str = "check the model's weights",
        trial: tuple[int, Any] = (0, None),
        ended: threading.Event | None = None,
    ) -> None:
        self._trial, self._config = trial
        self._if_diverged, self._ended = if_diverged, ended or threading.Event()
        self._runners, self._sync, self._pool, self._reward_service = runners, sync, pool, reward_service
        self._restore_runners, self._timeout_seconds = restore_runners, timeout_seconds
        self.num_restarts = 0
        """Runners that came back as a new process.

        RLlib counts only those that it saw dead: Ray may be faster than the next call.
        """
        self._next_look = 0.0
        self._runner_pids: dict[int, int] = {}
        self._last_words: dict[int, str] = {}
        """What a runner failed with, by runner, as long as it has not played since."""

    def evaluate(
        self,
        starts: Sequence[Start],
        *,
        change_tasks: bool = False,
        seconds: float | None = None,
        record: Collection[Start] = (),
    ) -> Iterator[EvaluationRound]:
        """One greedy episode from each start, none twice, none left out. Yields what is new, round by round.

        The runners hold the episodes that go on; whatever nobody holds is shared out anew in each round.

        Args:
            starts: no two with the same task and initial state.
            change_tasks, seconds, record: see `VLAEnvRunner.evaluate`.

        Raises:
            RuntimeError: nothing was played several times in a row, or one start's episode was lost time and again.
        """
        open_starts = {(start.task_id, start.initial_state): start for start in starts}
        losses: Counter[Start] = Counter()
        fruitless = 0
        while open_starts:
            self._restore()
            attached = self._attach()
            held = {start for runner in attached.values() for start in runner.evaluating}
            shares = _share([start for start in open_starts.values() if start not in held], attached, change_tasks)
            able = [index for index, runner in attached.items() if shares[index] or runner.evaluating]
            options = {"change_tasks": change_tasks, "seconds": seconds, "record": record}
            rounds: dict[int, EvaluationRound] = self._foreach(
                "evaluate", {index: {"starts": shares[index], **options} for index in able}
            )
            losses.update(start for index in able if index not in rounds for start in attached[index].evaluating)
            losses.update(start for played in rounds.values() for start in played.dropped)
            new = EvaluationRound(
                results=[
                    r
                    for played in rounds.values()
                    for r in played.results
                    if open_starts.pop((r.task_id, r.initial_state), None)
                ],
                num_steps=sum(played.num_steps for played in rounds.values()),
                env_deaths=sum(played.env_deaths for played in rounds.values()),
            )
            yield new
            _check_losses(losses)
            errors = [played.engine_error for played in rounds.values()]
            fruitless = fruitless + 1 if not new.num_steps and (not errors or any(errors)) else 0
            self._check(fruitless, errors)
        self._end_episodes()

    def leave_checkpoint(self) -> None:
        """A checkpoint was written: new episodes begin, since a resumed run cannot have the running ones either."""
        self.begin_new_episodes()

    def begin_new_episodes(self) -> None:
        """End the running episodes where they are, unseen."""
        self._end_episodes()

    def _end_episodes(self) -> None:
        self._foreach("begin_new_episodes", {index: {} for index in self._runners.healthy_worker_ids()})

    def _restore(self) -> None:
        """Take back runners that were started anew. Asking one that waits for a node takes seconds, so that is done
        for a fifth of the time at most."""
        began = time.monotonic()
        if self._runners.num_healthy_remote_workers() < self._runners.num_remote_workers() and began > self._next_look:
            self._restore_runners()
            now = time.monotonic()
            self._next_look = now + 4 * (now - began)

    def _attach(self) -> dict[int, Attached]:
        """Make engines current, see after the reward worker, and tell the runners about them; those that are ready to
        sample."""
        self._sync.make_engines_current()
        return self._ready(self._attach_for_this_trial(self._attach_arguments()))

    def _attach_arguments(self) -> dict[str, Any]:
        """Of `VLAEnvRunner.attach`, with a reward worker that lives."""
        handles = self._pool.handles if self._pool is not None else []
        attach = {"engines": handles, "version": self._sync.version, "manifest": self._sync.manifest}
        if self._reward_service is not None:
            self._reward_service.ensure_alive()
            attach["reward_worker"] = self._reward_service.handle
        return attach

    def _ready(self, attached: dict[int, Attached]) -> dict[int, Attached]:
        """Those of the runners that can sample; the others are killed, and may work when they were started anew."""
        for index in [index for index, runner in attached.items() if runner.failure]:
            self._last_words[index] = f"cannot start: {str(attached.pop(index).failure).strip().splitlines()[-1]}"
            self._kill(index)
        pids = {index: runner.pid for index, runner in attached.items()}
        self.num_restarts += sum(self._runner_pids.get(index, pid) != pid for index, pid in pids.items())
        self._runner_pids.update(pids)
        return attached

    def _attach_for_this_trial(self, attach: dict[str, Any]) -> dict[int, Attached]:
        """Attach; whoever plays for another trial, since it was made for that one, is told of this one."""
        attached: dict[int, Attached] = self._foreach(
            "attach", dict.fromkeys(self._runners.healthy_worker_ids(), attach)
        )
        others = [index for index, runner in attached.items() if not runner.failure and runner.trial != self._trial]
        self._reconfigure(others)
        return attached | self._foreach("attach", dict.fromkeys(others, attach))

    def _reconfigure(self, indices: Sequence[int]) -> None:
        """Have these runners play for this trial."""
        self._foreach("reconfigure", {index: {"config": self._config, "trial": self._trial} for index in indices})

    def _foreach(self, method: str, arguments: dict[int, dict[str, Any]]) -> dict[int, Any]:
        """Call `method` on the runners with these numbers; answers by number. Those that died, froze or raised are left
        out, the latter two killed."""
        indices = list(arguments)
        if not indices:  # which RLlib would take for all
            return {}
        call = partial(
            self._runners.foreach_env_runner,
            [partial(numbered, method)] * len(indices),
            kwargs=list(arguments.values()),
            remote_worker_ids=indices,
            timeout_seconds=self._timeout_seconds,
            local_env_runner=False,
        )
        answers: list[tuple[int, Any]] = call_unless(self._ended, call) if method in INTERRUPTIBLE else call()
        results = dict(sorted(answers, key=lambda answer: answer[0]))
        for index in set(self._runners.healthy_worker_ids()) & set(indices) - results.keys():
            self._end(index, method)
        return self._unraised(results, method)

    def _unraised(self, answers: dict[int, Any], method: str) -> dict[int, Any]:
        """The answers of runners that did not raise; the others are killed."""
        for index, answer in list(answers.items()):
            if isinstance(answer, Raised):
                self._last_words[index] = f"failed in {method}: {answers.pop(index).words}"
                logger.warning("runner %d %s", index, self._last_words[index])
                self._kill(index)
            elif method in INTERRUPTIBLE:
                self._last_words.pop(index, None)
        return answers

    def _end(self, index: int, method: str) -> None:
        """Kill a frozen runner. Ray starts another, and RLlib takes it for dead until that answers."""
        logger.warning(
            "runner %d: no answer to %s within rollout.timeout_seconds = %g; it is killed",
            index,
            method,
            self._timeout_seconds,
        )
        self._kill(index)

    def _kill(self, index: int) -> None:
        ray.kill(runner_actors(self._runners)[index], no_restart=False)
        call_dead(self._runners, index)

    def _check(self, fruitless: int, errors: list[str | None]) -> None:
        """Behind a round: raise where there is no hope; wait for a runner where nothing was played."""
        self._raise_if_hopeless(fruitless, errors)
        if fruitless:
            self._wait_for_a_runner()

    def _raise_if_hopeless(self, fruitless: int, errors: Sequence[str | None]) -> None:
        if errors and all(error and NOT_FINITE in error for error in errors):
            raise DivergedError(
                f"the weights give log-probabilities or values that are not finite; {self._if_diverged}"
            )
        if fruitless >= MAX_FRUITLESS_ROUNDS:
            said = [error or "no error, and nothing played" for error in errors]
            said += [f"runner {index} {words}" for index, words in self._last_words.items()]
            reasons = ", ".join(said) or "no runner answered"
            raise RuntimeError(
                f"sampling brought no step {fruitless} times in a row; the runners' last words: {reasons}; "
                "their own logs are on their nodes, in Ray's session directory under logs/"
            )

    def _wait_for_a_runner(self) -> None:
        """Where runners are down, wait until one more is back.

        Ray restarts a dead runner by itself; RLlib takes it back once it answers a ping, which fails at once while it
        starts.
        """
        deadline = time.monotonic() + RUNNER_RESTART_SECONDS
        healthy, total = self._runners.num_healthy_remote_workers(), self._runners.num_remote_workers()
        while self._runners.num_healthy_remote_workers() < min(healthy + 1, total) and time.monotonic() < deadline:
            if self._ended.is_set():
                raise EndRequested
            self._restore_runners()
            time.sleep(0.5)


def _share(starts: Sequence[Start], runners: dict[int, Attached], change_tasks: bool) -> dict[int, list[Start]]:
    """Divide the starts over the runners: turn by turn over those that have the task, or task by task where tasks may
    change.

    The latter gives every runner as few tasks as can be, because each is a model that its processes build.
    """
    shares: dict[int, list[Start]] = {index: [] for index in runners}
    if change_tasks:
        by_task = sorted(starts, key=lambda start: start.task_id)
        bounds = [len(by_task) * part // max(1, len(runners)) for part in range(len(runners) + 1)]
        return {index: by_task[begin:end] for index, begin, end in zip(runners, bounds, bounds[1:], strict=False)}
    for start in starts:
        able = [index for index, runner in runners.items() if start.task_id in runner.tasks]
        if able:
            shares[min(able, key=lambda index: len(shares[index]))].append(start)
    return shares


def _check_losses(losses: Counter[Start]) -> None:
    for start, times in losses.items():
        if times >= MAX_LOST_EPISODES:
            raise RuntimeError(
                f"task {start.task_id}, initial state {start.initial_state}: its environment or runner died "
                f"{times} times in the middle of "
                "the episode; the runners' logs are on their nodes, in Ray's session directory under logs/"
            )


def numbered(method: str, runner: Any, **kwargs: Any) -> tuple[int, Any]:
    """In the runner. RLlib would end its process at an exception, and tell the driver nothing of it."""
    try:
        return runner.worker_index, getattr(runner, method)(**kwargs)
    except Exception as error:  # of an environment or a reward, which may be somebody else's code
        logger.exception("%s failed", method)
        return runner.worker_index, Raised.by(error)
