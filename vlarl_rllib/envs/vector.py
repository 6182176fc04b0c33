"""Slots in long-lived subprocesses, for a caller that waits for whichever is ready.

    processes = SlotProcesses(EnvSpec(name="libero", suite="libero_spatial"), slot_tasks=[0, 0, 1, 1], num_processes=2)
    for slot, task in enumerate([0, 0, 1, 1]):
        processes.send_reset(slot, task, initial_state=0, seed=slot)
    while playing:
        for event in processes.poll(timeout_seconds=1.0):
            ...  # event.image -> actions [k, 7], now or later
            processes.send_actions(event.slot, actions)
    processes.close()

A slot has at most one command under way. Frames travel in anonymous shared memory, which the kernel frees with the last
process that has it open, however that ended.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from multiprocessing.connection import Connection, wait

import numpy as np
import psutil

from vlarl_rllib.envs.messages import Reset, SlotEvent, Step, Stop, WorkerSetup, frame_bytes, map_frames
from vlarl_rllib.process.interpreter import python_command, search_path
from vlarl_rllib.types import EnvSpec

__all__ = ["SlotEvent", "SlotProcesses", "assign_slots"]

CORES_OF_OTHERS = 4
"""Cores that engine, learner, runner and algorithm start on. Where subprocesses have cores beside those, they build
their models meanwhile; where not, all would start later for that."""
CLOSE_GRACE_SECONDS = 5.0
"""How long subprocesses may take to finish their step and exit before they are killed."""
_THREADS = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LP_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"
)
"""One thread each (LP is Mesa's software rasteriser): parallelism comes from the number of subprocesses."""


class SlotProcesses:
    """The slots of one runner and the subprocesses that play them.

    Args:
        spec: the environment.
        slot_tasks: task that each slot begins with; slots with equal tasks are put together where that saves a model.
        num_processes: subprocesses; at most one per slot is started.
        models_per_process: environments (for LIBERO: MuJoCo models) that a subprocess may hold at a time.
        max_consecutive_deaths: deaths of one subprocess without a successful reset in between after which `poll` gives
            up.
        max_resets: of a subprocess, after which `recycle` replaces it; None = never.

    Raises:
        ValueError: the tasks do not fit into the subprocesses.
    """

    def __init__(
        self,
        spec: EnvSpec,
        slot_tasks: Sequence[int],
        *,
        num_processes: int,
        models_per_process: int = 1,
        max_consecutive_deaths: int = 3,
        max_resets: int | None = None,
    ) -> None:
        self._spec, self._slot_tasks = spec, tuple(slot_tasks)
        self._models_per_process, self._max_deaths = models_per_process, max_consecutive_deaths
        self._max_resets = max_resets
        assignment = assign_slots(slot_tasks, num_processes, models_per_process)
        self._prepares = len(assignment) + CORES_OF_OTHERS <= len(os.sched_getaffinity(0))
        self._frames_fd = os.memfd_create("vlarl-frames")
        os.ftruncate(self._frames_fd, len(self._slot_tasks) * frame_bytes(spec))
        self._frames = map_frames(self._frames_fd, spec, len(self._slot_tasks))
        self._closed = False
        self._workers = [self._start(index, slots) for index, slots in enumerate(assignment)]
        self._worker_of_slot = {slot: index for index, slots in enumerate(assignment) for slot in slots}
        self._deaths = Counter[int]()
        """By worker, since its last successful reset."""
        self._restarts = 0
        atexit.register(self.close)

    def send_reset(self, slot: int, task_id: int, initial_state: int, seed: int) -> None:
        """Begin an episode in `slot`; returns at once. The answer is a `reset` event."""
        self._send(slot, Reset(slot, task_id, initial_state, seed))
        self._workers[self._worker_of_slot[slot]].num_resets += 1

    def send_actions(self, slot: int, actions: np.ndarray, *, every_frame: bool = False) -> None:
        """Play the environment's actions [k, 7] one after the other, until the episode ends; returns at once. They are
        answered by one `step` event.

        An action that is not 7 finite numbers never reaches a simulator: it is answered by an `error` event.

        Args:
            every_frame: draw behind each action, for `SlotEvent.frames`. Else only what is seen next is drawn.
        """
        self._send(slot, Step(slot, np.asarray(actions, dtype=np.float64), every_frame))

    def poll(self, timeout_seconds: float) -> list[SlotEvent]:
        """What has happened since the last call; waits for the first event up to `timeout_seconds`, 0 = not at all.

        Raises:
            RuntimeError: a subprocess died `max_consecutive_deaths` times without a successful reset in between.
        """
        self._refuse_if_closed()
        events: list[SlotEvent] = []
        ready = wait(self.connections(), timeout_seconds)
        for index, worker in enumerate(self._workers):
            if worker.connection in ready:
                received, alive = worker.receive()
                if any(event.kind == "reset" for event in received):
                    self._deaths[index] = 0
                # What a dead subprocess had still answered is not told: a caller that answers it would talk to the new
                # one, which knows nothing of it, and then once more when it reads of the death.
                events += [self._with_frame(event) for event in received] if alive else self._bury(index)
        return events

    def connections(self) -> list[Connection]:
        """What to wait on (`multiprocessing.connection.wait`, selectors) for `poll` to have something; ask anew after
        it."""
        return [worker.connection for worker in self._workers]

    def pids(self) -> list[int]:
        """Process ids of the subprocesses, in order."""
        return [worker.process.pid for worker in self._workers]

    def stats(self) -> dict[str, object]:
        """`restarts`: subprocesses started again so far; `rss_bytes`: resident memory of each, 0 if it is gone."""
        return {"restarts": self._restarts, "rss_bytes": [_resident_bytes(pid) for pid in self.pids()]}

    def slots_of_process(self) -> list[tuple[int, ...]]:
        """The slots that each subprocess plays."""
        return [worker.slots for worker in self._workers]

    def kill(self, slot: int) -> None:
        """End the subprocess of `slot` by force; `poll` then reports it dead to all its slots and starts it anew."""
        self._workers[self._worker_of_slot[slot]].process.kill()

    def recycle(self) -> list[int]:
        """Replace the subprocesses that have done `max_resets` resets, so that what a simulator or driver leaks has an
        end.

        Call it where no running episode matters: a command under way is never answered.

        Returns:
            The slots of the new subprocesses.
        """
        worn = [
            index
            for index, worker in enumerate(self._workers)
            if self._max_resets and worker.num_resets >= self._max_resets
        ]
        for index in worn:
            self._workers[index].process.kill()
            self._workers[index].end(grace_seconds=CLOSE_GRACE_SECONDS)
            self._workers[index] = self._start(index, self._workers[index].slots)
        return [slot for index in worn for slot in self._workers[index].slots]

    def close(self) -> None:
        """Stop the subprocesses, those that do not stop within `CLOSE_GRACE_SECONDS` by force. May be called again."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        deadline = time.monotonic() + CLOSE_GRACE_SECONDS
        for worker in self._workers:
            worker.ask_to_stop()
        for worker in self._workers:
            worker.end(max(0.0, deadline - time.monotonic()))
        os.close(self._frames_fd)

    def _send(self, slot: int, command: Reset | Step) -> None:
        self._refuse_if_closed()
        if slot not in self._worker_of_slot:
            raise ValueError(f"slot {slot} does not exist; slots are 0 to {len(self._slot_tasks) - 1}")
        self._workers[self._worker_of_slot[slot]].send(command)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise RuntimeError("these subprocesses are closed; make new SlotProcesses")

    def _with_frame(self, event: SlotEvent) -> SlotEvent:
        if event.kind == "error":
            return event
        return replace(event, image=self._frames[event.slot].copy())

    def _start(self, index: int, slots: tuple[int, ...]) -> _Worker:
        tasks = dict.fromkeys(self._slot_tasks[slot] for slot in slots) if self._prepares else {}
        setup = WorkerSetup(
            replace(self._spec, render_device=self._spec.render_device + index),
            self._models_per_process,
            len(self._slot_tasks),
            tuple(tasks),
        )
        return _Worker(slots, setup, self._frames_fd)

    def _bury(self, index: int) -> list[SlotEvent]:
        """Replace a dead subprocess; the events say so to its slots."""
        worker = self._workers[index]
        reason = _exit_reason(worker.end(grace_seconds=1.0))
        self._deaths[index] += 1
        if self._deaths[index] >= self._max_deaths:
            raise RuntimeError(
                f"environment process {index} (slots {list(worker.slots)}) died {self._deaths[index]} times "
                f"without completing a reset; the last time with {reason}"
            )
        self._workers[index] = self._start(index, worker.slots)
        self._restarts += 1
        return [SlotEvent(slot=slot, kind="died", error=reason) for slot in worker.slots]


class _Worker:
    """The parent's end of one subprocess."""

    def __init__(self, slots: tuple[int, ...], setup: WorkerSetup, frames_fd: int) -> None:
        self.slots = slots
        self.num_resets = 0
        ours, theirs = socket.socketpair()
        with theirs:
            fds = (theirs.fileno(), frames_fd)
            command = python_command("-m", "vlarl_rllib.envs.worker", *map(str, fds), str(os.getpid()))
            environment = {**os.environ, **_THREADS, "PYTHONPATH": search_path()}
            environment.pop("CUDA_VISIBLE_DEVICES", None)  # robosuite would compare EGL's device number with it
            started = _spawner().submit(
                subprocess.Popen, command, env=environment, pass_fds=fds, stdin=subprocess.DEVNULL
            )
            self.process = started.result()
        self.connection = Connection(ours.detach())
        self.send(setup)

    def send(self, message: object) -> None:
        """Hand a message over; a subprocess that is gone will be noticed by `receive`."""
        try:
            self.connection.send(message)
        except OSError:
            return

    def receive(self) -> tuple[list[SlotEvent], bool]:
        """(all events that have arrived, whether the subprocess can send more)."""
        events: list[SlotEvent] = []
        try:
            while self.connection.poll(0):
                events.append(self.connection.recv())
        except (EOFError, OSError):
            return events, False
        return events, True

    def ask_to_stop(self) -> None:
        self.send(Stop())

    def end(self, grace_seconds: float) -> int:
        """Wait, then kill; returns the exit code, negative for a signal."""
        try:
            self.process.wait(grace_seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.connection.close()
        return self.process.returncode


@lru_cache(maxsize=1)
def _spawner() -> ThreadPoolExecutor:
    """The thread that starts all subprocesses.

    The kernel kills them when their parent *thread* ends (prctl(2), PR_SET_PDEATHSIG), so that must be one that lives
    as long as the process; the caller's may belong to a pool.
    """
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="env-spawner")


def assign_slots(slot_tasks: Sequence[int], num_processes: int, models_per_process: int) -> list[tuple[int, ...]]:
    """Divide slots among processes evenly, with at most `models_per_process` distinct tasks in each.

    Every task gets a place first; then each further slot goes to the least loaded process that has its task or room for
    one more.

    Returns:
        The slots of each process; processes without slots are left out.

    Raises:
        ValueError: there are more distinct tasks than places.
    """
    if not slot_tasks or num_processes < 1 or models_per_process < 1:
        raise ValueError(
            f"slots: {len(slot_tasks)}, processes: {num_processes}, models per process: {models_per_process}; "
            "each must be at least 1"
        )
    tasks = list(dict.fromkeys(slot_tasks))
    num_processes = min(num_processes, len(slot_tasks))
    if len(tasks) > num_processes * models_per_process:
        raise ValueError(
            f"{len(tasks)} tasks need as many models, but {num_processes} process(es) x models_per_process "
            f"{models_per_process} hold {num_processes * models_per_process}; raise env.models_per_process or "
            "env.num_processes, or list fewer env.tasks"
        )
    slots_of: list[list[int]] = [[] for _ in range(num_processes)]
    tasks_of: list[set[int]] = [set() for _ in range(num_processes)]
    first = [slot_tasks.index(task) for task in tasks]
    for slot in first + [slot for slot in range(len(slot_tasks)) if slot not in first]:
        task = slot_tasks[slot]
        open_to_it = [i for i in range(num_processes) if task in tasks_of[i] or len(tasks_of[i]) < models_per_process]
        chosen = min(open_to_it, key=lambda i: (len(slots_of[i]), task not in tasks_of[i], i))
        slots_of[chosen].append(slot)
        tasks_of[chosen].add(task)
    return [tuple(sorted(slots)) for slots in slots_of if slots]


def _exit_reason(code: int) -> str:
    """An exit code in words."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _resident_bytes(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return 0
