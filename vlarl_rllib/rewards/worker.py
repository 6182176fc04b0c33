"""The reward worker of a run: one Ray actor with a judge, which all runners ask.

Ray starts it anew when it dies. Lives in the Algorithm's process, beside the engine pool; runners only get `handle`.

    service = RewardService(directory, "cpu", actor_options={"num_cpus": 1})   # returns at once
    service.wait_until_ready()
    service.ensure_alive()                                 # before each sample call
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any

import numpy as np
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayError

from vlarl_rllib.errors import one_line
from vlarl_rllib.rewards.judge import check_judge
from vlarl_rllib.rewards.judges import load_judge
from vlarl_rllib.telemetry.actors import ActorNames, own_name
from vlarl_rllib.telemetry.recorder import Telemetry

logger = logging.getLogger(__name__)

START_TIMEOUT_SECONDS = 600.0
"""Longest wait for the worker, which loads a model of some billion parameters from a network disk at worst."""
PATIENCE_SECONDS = 30.0
"""A worker that answers no ping, or is at one call, for so long is frozen."""
PINGS = "pings"
"""Concurrency group of the worker."""
RESTART_POLL_SECONDS = 0.5


class RewardWorker:
    """The actor. Raises ValueError from its constructor where the directory holds no judge.

    `ping` has a thread of its own, so that it does not wait behind the calls of slow rounds: Ray cancels none that is
    with an actor.
    """

    def __init__(self, directory: str, device: str, run: str = "vlarl", suite: str = "") -> None:
        self._judge = load_judge(directory, device)
        self._since: float | None = None
        self._telemetry = Telemetry(run, suite, "reward")

    def __repr__(self) -> str:
        """What Ray's dashboard and logs call this actor."""
        return own_name(type(self).__name__)

    @ray.method(concurrency_group=PINGS)
    def follow_run(self, run: str, suite: str) -> None:
        """Tell metrics as this run's from now on."""
        self._telemetry.follow(run, suite)

    @ray.method(concurrency_group=PINGS)
    def ping(self) -> tuple[int, float]:
        """(process id, seconds that the call which is being answered has taken so far)."""
        since = self._since
        return os.getpid(), 0.0 if since is None else time.monotonic() - since

    def score(self, images: np.ndarray, instruction: str) -> np.ndarray:
        """See `Judge.score`. A broken CUDA context, which no later call would survive, ends the process: Ray starts
        another."""
        self._since = time.monotonic()
        try:
            return self.judge(images, instruction)
        except RuntimeError as error:
            if "CUDA error" in str(error):  # memory that is short reads otherwise
                logger.exception("the reward worker's GPU failed; it ends")
                os._exit(1)
            raise
        finally:
            self._telemetry.observe("judge_seconds", time.monotonic() - self._since)
            self._since = None

    def judge(self, images: np.ndarray, instruction: str) -> np.ndarray:
        """The scores, from the judge."""
        return self._judge.score(images, instruction)


class RewardService:
    """Starts the worker, sees that it answers, and ends it. The constructor does not wait.

    Args:
        directory: of the judge.
        device: "cpu" or "cuda".
        actor_options: Ray options: num_cpus, num_gpus, scheduling_strategy, ...
        patience_seconds: a worker that answers no ping, or is at one call, for so long is killed; Ray starts another.
        worker_class: the actor's class.
        run: what the run is called.
        suite: what its environments are called in metrics.

    Raises:
        ValueError: in one line, where the directory holds no judge; no actor is started then.
    """

    def __init__(
        self,
        directory: str,
        device: str,
        *,
        actor_options: dict[str, Any],
        patience_seconds: float = PATIENCE_SECONDS,
        worker_class: type = RewardWorker,
        run: str = "vlarl",
        suite: str = "",
    ) -> None:
        check_judge(directory)
        self._arguments = (directory, device, run, suite)
        self._names = ActorNames(run)
        actor_class: Any = ray.remote(concurrency_groups={PINGS: 1})(worker_class)
        self._actor_class = actor_class
        self._options = {"max_restarts": -1, "max_task_retries": 0, **actor_options}
        self._patience_seconds = patience_seconds
        self.pid = 0
        """Process id of the worker, as of when it last answered."""
        self.num_restarts = 0
        """Workers that answered as a new process."""
        self.handle: Any = self._start()

    def wait_until_ready(self, timeout_seconds: float = START_TIMEOUT_SECONDS) -> None:
        """Wait for the judge to be loaded.

        Raises RuntimeError, with the worker gone, where that fails or takes too long.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                self.pid, _ = ray.get(self.handle.ping.remote(), timeout=max(0.0, deadline - time.monotonic()))
                return
            except ActorUnavailableError:  # it was killed while it started, and Ray starts another
                time.sleep(RESTART_POLL_SECONDS)
            except (RayError, GetTimeoutError) as error:
                self.shutdown()
                raise RuntimeError(f"the reward worker does not start: {one_line(error)}") from error

    def ensure_alive(self) -> None:
        """Kill a worker that is frozen and replace one that Ray has given up.

        Waits for no restart: runners do without meanwhile.
        """
        try:
            pid, busy_seconds = ray.get(self.handle.ping.remote(), timeout=self._patience_seconds)
            if busy_seconds > self._patience_seconds:
                raise GetTimeoutError(f"one call takes {busy_seconds:.0f} s already")
        except GetTimeoutError as error:
            logger.warning(
                "the reward worker is frozen (%s, more than %g s); it is killed",
                one_line(error),
                self._patience_seconds,
            )
            ray.kill(self.handle, no_restart=False)
        except ActorDiedError as error:  # its constructor failed, after a restart
            logger.warning("the reward worker is lost (%s); another one is started", one_line(error))
            self.handle = self._start()
        except RayError as error:
            logger.warning("the reward worker is being restarted: %s", one_line(error))
        else:
            self.num_restarts += pid != self.pid
            self.pid = pid

    def follow_run(self, run: str, suite: str) -> None:
        """Have the worker tell metrics as this run's; does not wait for it."""
        self._arguments, self._names = (*self._arguments[:2], run, suite), ActorNames(run)
        self.handle.follow_run.remote(run, suite)

    def _start(self) -> Any:
        return self._names.start(self._actor_class, "reward", self._options, *self._arguments)

    def shutdown(self) -> None:
        """Kill the worker for good; safe to call twice."""
        ray.kill(self.handle, no_restart=True)
