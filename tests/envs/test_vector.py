"""Slots in subprocesses: events, faults, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from env_helpers import TASK

from vlarl_rllib.envs import EnvSpec, make_env, vector
from vlarl_rllib.envs.libero import LiberoEnv
from vlarl_rllib.envs.vector import SlotEvent, SlotProcesses, assign_slots

SPEC = EnvSpec(name="synthetic", image_size=32)
ELSEWHERE = np.full(7, 0.95)
PATIENCE_SECONDS = 90


@pytest.fixture
def start() -> Iterator[Callable[..., SlotProcesses]]:
    """Build slots that are closed at the end, whatever happened."""
    started: list[SlotProcesses] = []

    def build(spec: EnvSpec, slot_tasks: Sequence[int], **options: Any) -> SlotProcesses:
        started.append(SlotProcesses(spec, slot_tasks, **options))
        return started[-1]

    yield build
    for processes in started:
        processes.close()


def collect(processes: SlotProcesses, count: int) -> list[SlotEvent]:
    """The next `count` events, by slot."""
    events: list[SlotEvent] = []
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(events) < count:
        assert time.monotonic() < deadline, f"only {events} came"
        events += processes.poll(1.0)
    assert len(events) == count
    return sorted(events, key=lambda event: event.slot)


def wait_until_gone(pids: Sequence[int]) -> None:
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        assert time.monotonic() < deadline, f"still there: {pids}"
        time.sleep(0.05)


# What happens before the first command


@pytest.mark.parametrize(
    ("cores", "prepared"), [(2 + vector.CORES_OF_OTHERS, ["0", "1"]), (1 + vector.CORES_OF_OTHERS, [])]
)
def test_models_are_built_before_the_first_command_where_there_are_cores_for_it(
    start: Callable[..., SlotProcesses],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    prepared: list[str],
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    spec = EnvSpec(name="probe_env:CountingEnv", suite=str(tmp_path), image_size=32)
    processes = start(spec, [0, 1, 0], num_processes=2)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(built := sorted(file.name[0] for file in tmp_path.iterdir())) < len(prepared):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert built == prepared
    for slot, task in enumerate((0, 1, 0)):
        processes.send_reset(slot, task, initial_state=0, seed=slot)
    assert [event.kind for event in collect(processes, 3)] == ["reset"] * 3
    assert len([*tmp_path.iterdir()]) == len(prepared) + 3


# How slots are divided


@pytest.mark.parametrize(
    ("tasks", "processes", "models", "expected"),
    [
        ([0, 0, 1, 1], 2, 1, [(0, 1), (2, 3)]),
        ([0, 1, 0, 1], 2, 1, [(0, 2), (1, 3)]),
        ([0, 0, 0, 0], 2, 1, [(0, 2), (1, 3)]),
        ([5, 6, 7, 8], 2, 2, [(0, 2), (1, 3)]),
        ([0, 0, 0, 1], 2, 1, [(0, 1, 2), (3,)]),
        ([3], 4, 1, [(0,)]),
    ],
)
def test_slots_are_divided_evenly_within_the_models(
    tasks: list[int], processes: int, models: int, expected: list
) -> None:
    assert assign_slots(tasks, processes, models) == expected


def test_too_many_tasks_name_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"3 tasks need as many models.*raise env.models_per_process"):
        assign_slots([0, 1, 2], 2, 1)
    with pytest.raises(ValueError, match="at least 1"):
        assign_slots([], 2, 1)


# What slots report


def test_events_carry_what_the_environment_said(start) -> None:
    processes = start(SPEC, [0, 1], num_processes=2)
    for slot in (0, 1):
        processes.send_reset(slot, task_id=slot, initial_state=3, seed=40 + slot)
    for event in collect(processes, 2):
        env = make_env(SPEC)
        observation, info = env.reset(seed=40 + event.slot, options={"task_id": event.slot, "initial_state": 3})
        assert (event.kind, event.task_id, event.initial_state) == ("reset", event.slot, 3)
        assert event.instruction == info["instruction"]
        assert event.seconds > 0
        np.testing.assert_array_equal(event.image, observation["image"])
        processes.send_actions(event.slot, ELSEWHERE[None])
        (stepped,) = collect(processes, 1)
        assert (stepped.kind, stepped.slot, stepped.instruction) == ("step", event.slot, info["instruction"])
        assert stepped.rewards == (0.0,) and not (stepped.terminated or stepped.truncated or stepped.success)
        np.testing.assert_array_equal(stepped.image, env.step(ELSEWHERE)[0]["image"])
        processes.send_actions(event.slot, env.target_action[None])
        (last,) = collect(processes, 1)
        assert (last.rewards, last.terminated, last.truncated, last.success) == ((1.0,), True, False, True)


def test_images_belong_to_the_caller(start) -> None:
    processes = start(SPEC, [0], num_processes=1)
    processes.send_reset(0, 0, 0, seed=0)
    (first,) = collect(processes, 1)
    kept = first.image.copy()
    processes.send_actions(0, ELSEWHERE[None])
    (second,) = collect(processes, 1)
    np.testing.assert_array_equal(first.image, kept)
    assert (second.image != kept).any()


def test_no_slot_waits_for_another(start, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = EnvSpec(name="probe_env:SlowEnv", image_size=32)
    processes = start(slow, [0, 0], num_processes=2)
    processes.send_reset(0, 0, 0, 0)
    collect(processes, 1)
    processes.send_actions(0, ELSEWHERE[None])  # takes ten minutes
    processes.send_reset(1, 0, 0, 0)
    (event,) = collect(processes, 1)
    assert event.slot == 1
    monkeypatch.setattr(vector, "CLOSE_GRACE_SECONDS", 0.5)
    processes.close()
    wait_until_gone(processes.pids())


def test_an_exception_is_an_event(start) -> None:
    processes = start(EnvSpec(name="probe_env:RaisingEnv", image_size=32), [0, 0], num_processes=1)
    for slot in (0, 1):
        processes.send_reset(slot, 0, 0, seed=slot)
    collect(processes, 2)
    processes.send_actions(0, -ELSEWHERE[None])
    (event,) = collect(processes, 1)
    assert (event.slot, event.kind, event.image) == (0, "error", None)
    assert "ZeroDivisionError: pointed to the left" in event.error
    processes.send_actions(1, ELSEWHERE[None])  # its episode goes on
    processes.send_reset(0, 0, 0, seed=0)
    assert [event.kind for event in collect(processes, 2)] == ["reset", "step"]


def test_unknown_slots_and_closed_slots_are_refused(start) -> None:
    processes = start(SPEC, [0], num_processes=1)
    with pytest.raises(ValueError, match="slots are 0 to 0"):
        processes.send_reset(1, 0, 0, 0)
    processes.close()
    with pytest.raises(RuntimeError, match="closed"):
        processes.send_reset(0, 0, 0, 0)
    with pytest.raises(RuntimeError, match="closed"):
        processes.poll(0)


# Faults


def test_a_killed_process_is_replaced_and_the_others_play_on(start) -> None:
    processes = start(SPEC, [0, 0, 1, 1], num_processes=2)
    for slot, task in enumerate([0, 0, 1, 1]):
        processes.send_reset(slot, task, 0, seed=slot)
    collect(processes, 4)
    first, second = processes.pids()
    os.kill(first, signal.SIGKILL)
    wait_until_gone([first])
    for slot in range(4):
        processes.send_actions(slot, ELSEWHERE[None])
    events = collect(processes, 4)
    assert [event.kind for event in events] == ["died", "died", "step", "step"]
    assert events[0].error == "signal SIGKILL" and events[0].image is None
    assert processes.pids()[1] == second and processes.pids()[0] != first
    assert processes.stats()["restarts"] == 1
    processes.send_reset(0, 0, 5, seed=5)
    (event,) = collect(processes, 1)
    assert (event.kind, event.slot, event.initial_state) == ("reset", 0, 5)
    assert processes.poll(0.2) == []


def test_a_process_that_keeps_dying_stops_the_run(start) -> None:
    processes = start(EnvSpec(name="probe_env:CrashingEnv", image_size=32), [0], num_processes=1)
    with pytest.raises(RuntimeError, match=r"process 0 \(slots \[0\]\) died 3 times .* exit code 3"):  # noqa: PT012
        for _ in range(3):
            processes.send_reset(0, 0, 0, 0)
            assert [event.kind for event in collect(processes, 1)] == ["died"]
    assert processes.stats()["restarts"] == 2


def test_deaths_with_resets_in_between_are_forgiven(start) -> None:
    processes = start(SPEC, [0], num_processes=1, max_consecutive_deaths=2)
    for seed in range(3):
        processes.send_reset(0, 0, 0, seed)
        collect(processes, 1)
        os.kill(processes.pids()[0], signal.SIGKILL)
        assert [event.kind for event in collect(processes, 1)] == ["died"]


def test_ctrl_c_is_left_to_the_parent(start) -> None:
    processes = start(SPEC, [0], num_processes=1)
    processes.send_reset(0, 0, 0, 0)
    collect(processes, 1)
    os.kill(processes.pids()[0], signal.SIGINT)
    processes.send_actions(0, ELSEWHERE[None])
    assert [event.kind for event in collect(processes, 1)] == ["step"]


# Nothing is left behind


def test_close_ends_the_processes_and_leaves_no_shared_memory(start) -> None:
    processes = start(SPEC, [0, 0], num_processes=2)
    pids = processes.pids()
    processes.send_reset(0, 0, 0, 0)
    collect(processes, 1)
    for pid in [os.getpid(), pids[processes.slots_of_process().index((0,))]]:
        mapped = Path(f"/proc/{pid}/maps").read_text()
        assert "memfd:vlarl-frames" in mapped  # without a name in /dev/shm, nothing can stay there
        assert "/dev/shm/" not in "".join(line for line in mapped.splitlines() if "vlarl" in line)
    processes.close()
    processes.close()
    wait_until_gone(pids)


PARENT = """
import sys, threading, time
from vlarl_rllib.envs import EnvSpec
from vlarl_rllib.envs.vector import SlotProcesses

made = []
thread = threading.Thread(target=lambda: made.append(SlotProcesses(EnvSpec(name="synthetic"), [0, 0], num_processes=2)))
thread.start()
thread.join()
made[0].send_reset(0, 0, 0, 0)
while not any(event.kind == "reset" for event in made[0].poll(1)):
    pass
time.sleep(0.5)
made[0].send_actions(0, [[0.95] * 7])
assert [event.kind for event in made[0].poll(30)] == ["step"]
print(*made[0].pids(), flush=True)
time.sleep(600)
"""


def test_children_outlive_the_thread_that_made_them_but_not_the_process() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        children = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(children) == 2 and all(psutil.pid_exists(pid) for pid in children)
        parent.kill()
    wait_until_gone(children)


# Real LIBERO


def test_libero_in_a_subprocess(start, libero_env: LiberoEnv) -> None:
    """Two slots on one model see what one episode at a time sees here; the process stays small, without torch and
    Ray."""
    spec = EnvSpec(name="probe_env:TellingLiberoEnv", suite="libero_spatial", fast_render=True)
    processes = start(spec, [TASK, TASK], num_processes=1)
    action = np.array([0.5, -0.2, -0.3, 0.1, 0.0, 0.2, 0.0])
    frames: dict[int, list[np.ndarray]] = {0: [], 1: []}
    for slot in (0, 1):
        processes.send_reset(slot, TASK, initial_state=10 + slot, seed=slot)
    for event in collect(processes, 2):
        assert event.kind == "reset", event.error
        assert event.instruction == "", f"the subprocess imported {event.instruction}"
        assert 0 < event.render_seconds < event.seconds
        frames[event.slot].append(event.image)
    for _ in range(2):
        for slot in (1, 0):
            processes.send_actions(slot, action[None])
        for event in collect(processes, 2):
            frames[event.slot].append(event.image)
    (rss_bytes,) = processes.stats()["rss_bytes"]
    assert rss_bytes < 1.5e9
    assert "torch" not in Path(f"/proc/{processes.pids()[0]}/maps").read_text()
    for slot in (0, 1):
        observation, _ = libero_env.reset(seed=slot, options={"task_id": TASK, "initial_state": 10 + slot})
        alone = [observation["image"]]
        alone += [libero_env.step(action)[0]["image"] for _ in range(2)]
        for image, expected in zip(frames[slot], alone, strict=True):
            np.testing.assert_array_equal(image, expected)
