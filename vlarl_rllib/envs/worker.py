"""A subprocess that runs slots: `python -m vlarl_rllib.envs.worker SOCKET FRAMES PARENT`, started by `SlotProcesses`.

SOCKET and FRAMES are inherited file descriptors: a socket for commands and replies, and memory that holds one frame per
slot. A fresh interpreter, because a fork would carry the parent's threads, CUDA context and memory along. It never
imports torch, Ray or transformers.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import numpy as np

from vlarl_rllib.envs.messages import Reset, SlotEvent, Step, Stop, WorkerSetup, map_frames

if TYPE_CHECKING:
    from vlarl_rllib.envs.slots import SlotTable

_PR_SET_PDEATHSIG = 1
"""linux/prctl.h"""


def main(arguments: list[str]) -> None:
    """Serve commands until told to stop or the parent is gone."""
    socket_fd, frames_fd, parent = (int(argument) for argument in arguments)
    _live_and_die_with(parent)
    os.dup2(2, 1)  # what a simulator prints must not end up in the parent's output
    connection = Connection(socket_fd)
    try:
        setup = connection.recv()
        _serve(connection, frames_fd, setup)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _live_and_die_with(parent: int) -> None:
    """Leave Ctrl-C, which a terminal sends to the whole group, to the parent; be killed when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before the line above
        sys.exit(0)


def _serve(connection: Connection, frames_fd: int, setup: WorkerSetup) -> None:
    """Answer commands in the order they come; an exception in the environment is an answer too."""
    from vlarl_rllib.envs.slots import SlotTable

    frames = map_frames(frames_fd, setup.spec, setup.num_slots)
    table = SlotTable(setup.spec, setup.max_models)
    starts: dict[int, SlotEvent] = {}
    for task_id in setup.prepare:
        if connection.poll(0):
            break
        with suppress(Exception):  # which the first episode will meet, and tell
            table.prepare(task_id)
    while not isinstance(command := connection.recv(), Stop):
        began = time.perf_counter()
        try:
            image, event = _play(table, command, starts)
        except Exception:
            event = SlotEvent(slot=command.slot, kind="error", error=traceback.format_exc())
        else:
            frames[command.slot] = image
        connection.send(replace(event, seconds=time.perf_counter() - began))
    table.close()


def _play(table: SlotTable, command: Reset | Step, starts: dict[int, SlotEvent]) -> tuple[np.ndarray, SlotEvent]:
    """Run one command; the parent fills in the frame. `starts` keeps the facts of each slot's last reset."""
    slot = command.slot
    if isinstance(command, Reset):
        observation, info = table.reset(slot, command.task_id, command.initial_state, command.seed)
        starts[slot] = SlotEvent(
            slot=slot,
            kind="reset",
            instruction=info["instruction"],
            task_id=info["task_id"],
            initial_state=info["initial_state"],
            render_seconds=table.render_seconds,
        )
        return observation["image"], starts[slot]
    played = table.play(slot, command.actions, every_frame=command.every_frame)
    return played.image, replace(
        starts[slot],
        kind="step",
        rewards=played.rewards,
        frames=played.frames,
        terminated=played.terminated,
        truncated=played.truncated,
        success=played.success,
        render_seconds=table.render_seconds,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
