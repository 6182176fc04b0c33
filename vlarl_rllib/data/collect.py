"""`vlarl collect`: a scripted expert plays in subprocesses, and what succeeds becomes an RLDS data set.

Only training starts are played: held-out ones stay unseen by supervised fine-tuning too. No-ops are dropped, as in the
published data. With noise, what is played strays from the expert's action and what is recorded is the expert's: the
data show how to come back (DART, arXiv 1703.09327).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlarl_rllib.data.experts import make_expert
from vlarl_rllib.data.rlds_writer import Demonstration, RLDSWriter
from vlarl_rllib.envs.base import check_action, check_step
from vlarl_rllib.envs.registry import make_env, training_and_held_out_states
from vlarl_rllib.models.family import PolicyFamily
from vlarl_rllib.process.interpreter import safe_path
from vlarl_rllib.types import EnvSpec, Start, derive_seed

if TYPE_CHECKING:
    from vlarl_rllib.envs.base import VLAEnv

MAX_ATTEMPTS_PER_EPISODE = 5
"""An expert that needs more of them counts as unfit: after so many times the wanted episodes,"""
MIN_ATTEMPTS = 40
"""or at once where, after this many, it is that bad so far."""


@dataclass(frozen=True)
class CollectRequest:
    """What is to be collected."""

    spec: EnvSpec
    tasks: tuple[int, ...]
    episodes: int
    """Successful ones, the tasks in turn."""
    family: PolicyFamily
    """Of the policies that are to learn from them."""
    out: Path
    """The data set goes into `out/<environment's name>/1.0.0`."""
    noise: float = 0.0
    """Standard deviation of what is added to the arm's three position deltas, in units of a full action."""
    paces: tuple[float, ...] = (1.0,)
    """Shares of full speed, each in (0, 1]; every episode is played at one of them, drawn at random.

    One that is named twice comes twice as often.
    """
    seed: int = 0
    num_processes: int = 1


def collect(request: CollectRequest, progress: Callable[[int, int], None] = lambda kept, played: None) -> Path:
    """Play until enough episodes have succeeded; the data set's directory.

    Args:
        progress: called with (episodes kept, episodes played) after each.

    Raises:
        FileExistsError, ImportError: see `RLDSWriter`.
        RuntimeError: the expert fails nearly always. What was kept is there.
    """
    kept = played = 0
    context = multiprocessing.get_context("spawn")  # a fork would take threads and GL contexts along
    with (
        safe_path(),
        RLDSWriter(request.out, request.spec.name, request.family) as writer,
        ProcessPoolExecutor(request.num_processes, mp_context=context, initializer=_prepare_worker) as pool,
    ):
        try:
            for demonstration in _in_order(pool, request):
                played += 1
                if demonstration is not None:
                    writer.add(demonstration)
                    kept += 1
                progress(kept, played)
                if kept == request.episodes or (played >= MIN_ATTEMPTS and kept * MAX_ATTEMPTS_PER_EPISODE < played):
                    break
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    if kept < request.episodes:
        raise RuntimeError(
            f"the expert succeeded in {kept} of {played} episodes of {request.spec.name}; lower the noise, or "
            "choose other tasks"
        )
    return writer.path


def starts(request: CollectRequest) -> Iterator[Start]:
    """The tasks in turn, each through its training starts again and again; every one has a seed of its own."""
    training = {task: training_and_held_out_states(request.spec, task)[0] for task in request.tasks}
    for index in range(request.episodes * MAX_ATTEMPTS_PER_EPISODE):
        task, turn = request.tasks[index % len(request.tasks)], index // len(request.tasks)
        yield Start(task, training[task][turn % len(training[task])], derive_seed(request.seed, 3, index))


def play(spec: EnvSpec, start: Start, noise: float, paces: tuple[float, ...]) -> Demonstration | None:
    """One episode of the expert; None where it fails.

    Raises ValueError for an action, or a step, that is not what `VLAEnv` says.
    """
    random = np.random.default_rng(start.seed)
    env, expert = _env(spec), make_expert(spec.name, float(random.choice(paces)))
    _, info = env.reset(seed=start.seed, options={"task_id": start.task_id, "initial_state": start.initial_state})
    images: list[np.ndarray] = []
    actions: list[np.ndarray] = []
    states: list[np.ndarray] = []
    while True:
        images.append(np.array(env.render()))
        if (state := env.proprioception()) is not None:
            states.append(np.array(state, dtype=np.float32))
        actions.append(expert.act(env))
        check_action(actions[-1], f"{spec.name} task {start.task_id} start {start.initial_state}: the expert's action")
        played = actions[-1].copy()
        played[:3] += noise * random.standard_normal(3)
        result = env.step(np.clip(played, -1.0, 1.0))
        check_step(result, spec.image_size, f"{spec.name} task {start.task_id} start {start.initial_state}: step")
        _, _, terminated, truncated, outcome = result
        if terminated or truncated:
            break
    if not outcome["success"]:
        return None
    origin = f"{spec.name} task {start.task_id} start {start.initial_state} seed {start.seed}"
    told = np.array(states) if len(states) == len(actions) else None
    return Demonstration(
        images, np.array(actions, dtype=np.float32), info["instruction"], states=told, origin=origin
    ).without_no_ops()


def _in_order(pool: ProcessPoolExecutor, request: CollectRequest) -> Iterator[Demonstration | None]:
    """Episodes in the order of their starts, so that the data do not depend on who was faster; a few are played
    ahead."""
    coming = starts(request)
    # Ctrl-C and a closed terminal are for the parent, which cancels what is not begun. The first submit spawns every
    # worker, and a blocked signal is inherited.
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        futures = [
            pool.submit(play, request.spec, start, request.noise, request.paces)
            for start in islice(coming, 2 * request.num_processes)
        ]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
    while futures:
        demonstration = futures.pop(0).result()
        futures += [pool.submit(play, request.spec, start, request.noise, request.paces) for start in islice(coming, 1)]
        yield demonstration


@lru_cache(maxsize=1)
def _env(spec: EnvSpec) -> VLAEnv:
    return make_env(spec)


def _prepare_worker() -> None:
    """One thread for numbers, and one that ends the worker with its parent: the pool's queue would keep it waiting for
    ever."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LP_NUM_THREADS"):
        os.environ[name] = "1"


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker of a pool has a parent"
    parent.join()
    os._exit(1)
