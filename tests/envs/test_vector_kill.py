"""Ending the subprocess of a slot by force, as the event loop does after `env.timeout_seconds`."""

import time
from multiprocessing.connection import wait

import numpy as np
import psutil

from vlarl_rllib.envs.vector import SlotEvent, SlotProcesses
from vlarl_rllib.types import EnvSpec


def wait_for(processes: SlotProcesses, kind: str) -> SlotEvent:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for event in processes.poll(1.0):
            if event.kind == kind:
                return event
    raise AssertionError(f"no {kind} event within a minute")


def test_a_killed_slot_is_reported_dead_and_plays_again() -> None:
    processes = SlotProcesses(EnvSpec(name="synthetic", image_size=28), [0, 1], num_processes=2)
    try:
        processes.send_reset(0, 0, initial_state=0, seed=0)
        wait_for(processes, "reset")
        pids = processes.pids()
        processes.kill(0)
        assert wait_for(processes, "died").slot == 0
        assert processes.pids()[0] != pids[0] and processes.pids()[1] == pids[1]
        processes.send_reset(0, 0, initial_state=0, seed=0)
        assert wait_for(processes, "reset").slot == 0
    finally:
        processes.close()


def test_the_last_answer_of_a_dead_process_is_not_told() -> None:
    """A caller would answer it with a command to the process's successor, and send that one a second command for the
    death."""
    processes = SlotProcesses(EnvSpec(name="synthetic", image_size=28), [0], num_processes=1)
    try:
        processes.send_reset(0, 0, initial_state=0, seed=0)
        assert wait(processes.connections(), 60), "the answer is in the pipe now"
        processes.kill(0)
        while psutil.Process(processes.pids()[0]).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert [event.kind for event in processes.poll(1.0)] == ["died"]
    finally:
        processes.close()


def test_a_worn_process_is_replaced_when_asked_and_plays_on() -> None:
    processes = SlotProcesses(EnvSpec(name="synthetic", image_size=28), [0, 1], num_processes=2, max_resets=2)
    try:
        pids = processes.pids()
        assert processes.recycle() == []
        for _ in range(2):
            processes.send_reset(1, 1, initial_state=0, seed=0)
            wait_for(processes, "reset")
        processes.send_reset(0, 0, initial_state=0, seed=0)
        first = wait_for(processes, "reset")
        assert processes.recycle() == [1]
        assert processes.pids()[0] == pids[0] and processes.pids()[1] != pids[1]
        assert processes.stats()["restarts"] == 0, "that is for deaths"
        for _ in range(2):
            processes.send_reset(0, 0, initial_state=0, seed=0)
            again = wait_for(processes, "reset")
            processes.send_reset(1, 1, initial_state=0, seed=0)
            wait_for(processes, "reset")
        assert np.array_equal(first.image, again.image)
        assert processes.recycle() == [0, 1], "the new process counts from 0"
    finally:
        processes.close()
