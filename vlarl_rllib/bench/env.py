"""Environment steps a second by number of processes, and what a simulator costs: resets, drawing, memory, swaps."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from vlarl_rllib.bench.measure import rate
from vlarl_rllib.bench.policy import BenchPolicy
from vlarl_rllib.bench.result import CEILING, PART, PLAIN, PRODUCT, Result, phases
from vlarl_rllib.envs.base import VLAEnv
from vlarl_rllib.envs.image import observation_image
from vlarl_rllib.envs.messages import SlotEvent
from vlarl_rllib.envs.registry import ENVIRONMENTS, make_env, num_tasks
from vlarl_rllib.envs.vector import SlotProcesses
from vlarl_rllib.settings import Settings, calculate_runtime_args
from vlarl_rllib.types import ACTION_SIZE, EnvSpec

UNIT = "environment steps/s"
STEPS = 10
"""Of each slot between two looks at the clock."""
SLOTS = 4
"""Further ones on a model, whose memory is told."""
LONG = 1_000_000
"""Steps of an episode: random actions are not to reach its end, but for the simulator's own."""
RESETS, SWAPS, FRAMES = 3, 20, 100
TIMEOUT_SECONDS = 600.0
CPU = torch.device("cpu")


def measure(settings: Settings, profile: bool) -> Result:
    """Slots in subprocesses as a runner has them, one in this process, and one that is never drawn."""
    policy = BenchPolicy(settings)
    env = settings.env
    spec = EnvSpec(
        name=env.name, suite=env.suite, image_size=policy.facts.image_size, center_crop=settings.center_crop,
        max_steps=LONG, fast_render=env.fast_render,
    )  # fmt: skip
    task = settings.task_ids[0]
    result = Result.of("env", settings, f"{os.cpu_count()} core(s)")
    simulator, plain = (_rate_in_this_process(spec, task, draws=draws) for draws in (False, True))
    parts: dict[str, tuple[float, str]] = {}
    for count in process_counts(calculate_runtime_args(settings).num_processes):
        player = Player(spec, [task] * count, count)
        try:
            began = time.perf_counter()
            player.reset_all()
            first = time.perf_counter() - began
            value = rate(player.play, CPU)
            memory = sum(player.megabytes()) / 1e3
            if count == 1:
                parts = {"new process to first frame": (first, "s"), **_parts(player, task)}
        finally:
            player.close()
        together = {"plain": plain, "ceiling": simulator * min(count, os.cpu_count() or 1)}
        result.add(f"{count} process(es), a slot each", PRODUCT, value, UNIT, memory_gb=memory, **together)
    result.add("one environment in a loop", PLAIN, plain, UNIT, ceiling=simulator)
    result.add("one simulator, never drawn", CEILING, simulator, UNIT)
    parts |= _sharing(spec, task) | {"slot of a model changed": (_swap_milliseconds(spec, task), "ms")}
    parts |= _observation_path(spec)
    for name, (value, unit) in parts.items():
        result.add(name, PART, value, unit)
    if profile:
        names = ("drawing a frame", "rest of a step")
        result.profile = phases({name: parts[name][0] / 1e3 for name in names}, 1.0)
    return result


def process_counts(most: int) -> list[int]:
    """1, 2, 4, ... and the most."""
    return sorted({1, most, *(2**power for power in range(most.bit_length()) if 2**power <= most)})


class Player:
    """Slots that are always stepping: an answer is followed by the next random action at once.

    Args:
        slot_tasks: the task of each.
    """

    def __init__(self, spec: EnvSpec, slot_tasks: list[int], num_processes: int) -> None:
        self._slots, self._tasks = range(len(slot_tasks)), slot_tasks
        self._processes = SlotProcesses(spec, slot_tasks, num_processes=num_processes, models_per_process=2)
        self._random = np.random.default_rng(0)
        self.close = self._processes.close
        self.steps: list[SlotEvent] = []
        """Answers to actions of the last `play`."""

    def reset(self, slot: int, task: int, initial_state: int = 0) -> SlotEvent:
        """Begin an episode in one slot, while the others rest."""
        self._processes.send_reset(slot, task, initial_state, seed=slot)
        (event,) = self._answers()
        return event

    def reset_all(self) -> None:
        for slot, task in zip(self._slots, self._tasks, strict=True):
            self._processes.send_reset(slot, task, 0, seed=slot)
        waiting = len(self._slots)
        while waiting:
            waiting -= len(self._answers())

    def play(self) -> float:
        """So many steps of each slot as they come; how many. An episode that ends is begun anew, in between."""
        left, under_way = len(self._slots) * STEPS, 0
        self.steps = []
        for slot in self._slots:
            self._act(slot)
            under_way += 1
        while under_way:
            for event in self._answers():
                under_way -= 1
                if event.kind == "step":
                    self.steps.append(event)
                if event.kind == "step" and event.ended:
                    self._processes.send_reset(event.slot, event.task_id, event.initial_state, seed=event.slot)
                elif len(self.steps) + under_way < left:
                    self._act(event.slot)
                else:
                    continue
                under_way += 1
        return float(len(self.steps))

    def megabytes(self) -> list[float]:
        """Resident, of each process."""
        resident: Any = self._processes.stats()["rss_bytes"]
        return [number / 1e6 for number in resident]

    def _act(self, slot: int) -> None:
        self._processes.send_actions(slot, random_action(self._random)[None])

    def _answers(self) -> list[SlotEvent]:
        events = self._processes.poll(TIMEOUT_SECONDS)
        for event in events:
            if event.error:
                raise RuntimeError(event.error)
        return events


def random_action(random: np.random.Generator) -> np.ndarray:
    """[7] float64: half of full speed at most, gripper open or closed."""
    return np.append(random.uniform(-0.5, 0.5, ACTION_SIZE - 1), 1 - 2 * random.integers(2))


def _rate_in_this_process(spec: EnvSpec, task: int, *, draws: bool) -> float:
    """Steps a second of `env.step` in a loop."""
    env, random = make_env(spec), np.random.default_rng(0)

    def reset() -> None:
        env.draws = True
        env.reset(seed=0, options={"task_id": task, "initial_state": 0})

    def play() -> float:
        for _ in range(STEPS):
            env.draws = draws
            if env.step(random_action(random))[2]:
                reset()
        return float(STEPS)

    try:
        reset()
        return rate(play, CPU)
    finally:
        env.close()


def _parts(player: Player, task: int) -> dict[str, tuple[float, str]]:
    """Of steps and resets of one slot in one process."""
    drawing = statistics.median(step.render_seconds for step in player.steps)
    rest = statistics.median(step.seconds - step.render_seconds for step in player.steps)
    resets = [player.reset(0, task, index).seconds for index in range(RESETS)]
    return {
        "drawing a frame": (drawing * 1e3, "ms"),
        "rest of a step": (rest * 1e3, "ms"),
        "reset of the same task": (statistics.median(resets), "s"),
    }


def _sharing(spec: EnvSpec, task: int) -> dict[str, tuple[float, str]]:
    """Memory of a process, of a further slot on its model, and of a further model."""
    player = Player(spec, [task] * (1 + SLOTS), 1)
    try:
        player.reset(0, task)
        (one,) = player.megabytes()
        player.reset_all()
        player.play()
        (many,) = player.megabytes()
        began = time.perf_counter()
        player.reset(SLOTS, (task + 1) % num_tasks(spec.suite, name=spec.name))
        further = time.perf_counter() - began
        (two,) = player.megabytes()
    finally:
        player.close()
    return {
        "memory of a process with one model": (one, "MB"),
        "memory of a further slot": (max(0.0, many - one) / SLOTS, "MB"),
        "memory of a further model": (max(0.0, two - many), "MB"),
        "first reset to another task": (further, "s"),
    }


def _swap_milliseconds(spec: EnvSpec, task: int) -> float:
    """Putting one slot's state aside and another's back."""
    env: VLAEnv = make_env(spec)
    try:
        env.reset(seed=0, options={"task_id": task, "initial_state": 0})
        other = env.snapshot()
        return median_milliseconds(lambda: (env.snapshot(), env.restore(other)), SWAPS)
    finally:
        env.close()


def _observation_path(spec: EnvSpec) -> dict[str, tuple[float, str]]:
    """From a rendered frame to the policy's image, of a smooth picture and a noisy one; nothing where an environment
    draws that image itself."""
    if spec.name not in ENVIRONMENTS or not ENVIRONMENTS[spec.name].crops:
        return {}
    side = spec.camera_size
    y, x = np.mgrid[0:side, 0:side] / side
    smooth = 128 + 100 * np.stack([np.sin(7 * x + 3 * y), np.cos(5 * y), np.sin(11 * x * y)], axis=-1)
    pictures = {"smooth": smooth, "noisy": smooth + np.random.default_rng(0).normal(0, 10, smooth.shape)}
    found = {}
    for name, picture in pictures.items():
        raw = np.clip(picture, 0, 255).astype(np.uint8)
        path = partial(observation_image, raw, center_crop=spec.center_crop, image_size=spec.image_size)
        path()  # compiles its loops
        found[f"observation path of a {name} picture"] = median_milliseconds(path, FRAMES), "ms"
    return found


def median_milliseconds(call: Callable[[], object], count: int) -> float:
    """Of so many calls."""
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds) * 1e3
