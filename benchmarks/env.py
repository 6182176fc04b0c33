"""What an environment costs on this machine: speed of one core, resets, memory, and the observation path.

    python benchmarks/env.py [--env libero] [--suite libero_spatial] [--image-size 224] [--only-observation-path]
        [--out FILE]

Prints a table and writes the same numbers as JSON. Takes a few minutes, or seconds for the observation path alone; run
it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from vlarl_rllib.envs import EnvSpec, horizon, make_env, num_tasks
from vlarl_rllib.envs.vector import SlotEvent, SlotProcesses

NUM_STEPS = 40
NUM_RESETS = 5
LONG = 1000
"""Steps of an episode: random actions are not to reach its end."""
TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True)
class Figure:
    """One measured number."""

    key: str
    description: str
    value: float
    unit: str


class Player:
    """Slots of one subprocess, played one command at a time."""

    def __init__(self, spec: EnvSpec, slot_tasks: list[int], models_per_process: int) -> None:
        self.processes = SlotProcesses(spec, slot_tasks, num_processes=1, models_per_process=models_per_process)
        self._actions = np.random.default_rng(0)

    def reset(self, slot: int, task_id: int, initial_state: int = 0) -> SlotEvent:
        self.processes.send_reset(slot, task_id, initial_state, seed=slot)
        return self._answer()

    def step(self, slot: int) -> SlotEvent:
        arm = self._actions.uniform(-0.5, 0.5, 6)
        self.processes.send_actions(slot, np.append(arm, 1 - 2 * self._actions.integers(2))[None])
        event = self._answer()
        if event.terminated:
            self.reset(slot, event.task_id, event.initial_state)
        return event

    def megabytes(self) -> float:
        (resident,) = self.processes.stats()["rss_bytes"]
        return resident / 1e6

    def _answer(self) -> SlotEvent:
        (event,) = self.processes.poll(TIMEOUT_SECONDS)
        if event.error:
            raise RuntimeError(event.error)
        return event


def measure_speed(spec: EnvSpec) -> list[Figure]:
    """First reset, repeated resets and steps of one slot."""
    player = Player(spec, [0], 1)
    label = "fast_render" if spec.fast_render else "full render"
    key = "fast" if spec.fast_render else "full"
    try:
        began = time.perf_counter()
        player.reset(0, 0)
        first = time.perf_counter() - began
        resets = [player.reset(0, 0, index).seconds for index in range(NUM_RESETS)]
        player.step(0)
        began = time.perf_counter()
        steps = [player.step(0) for _ in range(NUM_STEPS)]
        rate = NUM_STEPS / (time.perf_counter() - began)
    finally:
        player.processes.close()
    drawing = statistics.median(step.render_seconds for step in steps)
    rest = statistics.median(step.seconds - step.render_seconds for step in steps)
    figures = [
        Figure(f"{key}_steps_per_second", f"control steps, one process, {label}", rate, "1/s"),
        Figure(f"{key}_render_ms", f"drawing a frame, {label}", drawing * 1e3, "ms"),
        Figure(f"{key}_rest_ms", f"physics and observation path of a step, {label}", rest * 1e3, "ms"),
        Figure(f"{key}_repeated_reset_seconds", f"reset of the same task, {label}", statistics.median(resets), "s"),
    ]
    if spec.fast_render:
        return figures
    return [*figures, Figure("first_reset_seconds", "new process to first frame: imports, model, reset", first, "s")]


def measure_sharing(spec: EnvSpec) -> list[Figure]:
    """Memory of a process, of a further slot on its model and of a further model."""
    num_slots = 9
    player = Player(spec, [0] * num_slots, 2)
    try:
        player.reset(0, 0)
        player.step(0)
        one_model = player.megabytes()
        for slot in range(1, num_slots):
            player.reset(slot, 0, slot)
        for slot in range(num_slots):
            player.step(slot)
        all_slots = player.megabytes()
        began = time.perf_counter()
        player.reset(num_slots - 1, 1 % num_tasks(spec.suite, name=spec.name))
        second_model_seconds = time.perf_counter() - began
        player.step(num_slots - 1)
        two_models = player.megabytes()
    finally:
        player.processes.close()
    return [
        Figure("process_megabytes", "memory of a process with one model", one_model, "MB"),
        Figure("slot_megabytes", "memory of a further slot", (all_slots - one_model) / (num_slots - 1), "MB"),
        Figure("model_megabytes", "memory of a further model", two_models - all_slots, "MB"),
        Figure("further_model_seconds", "first reset to another task", second_model_seconds, "s"),
    ]


def measure_swap(spec: EnvSpec) -> list[Figure]:
    """Putting one slot's state aside and another's back."""
    env = make_env(spec)
    try:
        env.reset(seed=0)
        env.step(np.zeros(7))
        other = env.snapshot()
        seconds = []
        for _ in range(100):
            began = time.perf_counter()
            env.snapshot()
            env.restore(other)
            seconds.append(time.perf_counter() - began)
    finally:
        env.close()
    return [Figure("swap_ms", "changing the slot between two steps", statistics.median(seconds) * 1e3, "ms")]


def measure_observation_path() -> list[Figure]:
    """The path from a rendered frame to the policy's image on one core: the whole and its stages, in milliseconds."""
    from PIL import Image

    from vlarl_rllib.envs import image

    y, x = np.mgrid[0:256, 0:256] / 256
    waves = 128 + 100 * np.stack([np.sin(7 * x + 3 * y), np.cos(5 * y), np.sin(11 * x * y)], axis=-1)
    noisy = waves + np.random.default_rng(0).normal(0, 10, waves.shape)
    figures = []
    for name, picture in (("smooth", waves), ("noisy", noisy)):
        raw = np.clip(picture, 0, 255).astype(np.uint8)
        compressed = image.jpeg_round_trip(raw)
        resized = image.resize_lanczos(compressed, image.RESIZED_SIDE)
        stages: dict[str, Callable[[], object]] = {
            "observation_path": partial(image.observation_image, raw, center_crop=True, image_size=224),
            "jpeg": partial(image.jpeg_round_trip, raw),
            "lanczos": partial(image.resize_lanczos, compressed, image.RESIZED_SIDE),
            "crop": partial(image.crop_center, resized),
            "small_resize": partial(Image.fromarray(resized).resize, (112, 112), Image.Resampling.BICUBIC),
        }
        for stage, run in stages.items():
            what = (
                "whole observation path, 256 to 224 pixels"
                if stage == "observation_path"
                else f"of which {stage}, alone"
            )
            figures.append(Figure(f"{stage}_{name}_ms", f"{what}, {name} picture", median_milliseconds(run), "ms"))
    return figures


def median_milliseconds(run: Callable[[], object], repeats: int = 5, count: int = 100) -> float:
    """Least of several medians, after a warm-up: other programs on the machine only ever add time."""
    run()
    medians = []
    for _ in range(repeats):
        seconds = []
        for _ in range(count):
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
        medians.append(statistics.median(seconds))
    return min(medians) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="libero", help="env.name of a config")
    parser.add_argument("--suite", default="libero_spatial", help="LIBERO suite whose tasks 0 and 1 are played")
    parser.add_argument("--image-size", type=int, default=224, help="side of the policy's image in pixels")
    parser.add_argument("--only-observation-path", action="store_true", help="no simulator")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/env.json"), help="JSON file to write")
    arguments = parser.parse_args()
    try:
        horizon(arguments.suite, name=arguments.env)
    except ValueError as error:
        parser.error(str(error))
    full = EnvSpec(name=arguments.env, suite=arguments.suite, image_size=arguments.image_size, max_steps=LONG)
    fast = replace(full, fast_render=True)
    figures = measure_observation_path()
    if not arguments.only_observation_path:
        figures += measure_speed(full) + measure_speed(fast) + measure_sharing(fast) + measure_swap(fast)
    table = Table("what", "value", "unit", title=f"{arguments.env} on {os.cpu_count()} core(s)")
    for figure in figures:
        table.add_row(figure.description, f"{figure.value:.3g}", figure.unit)
    Console().print(table)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    machine = {
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "processor": platform.processor() or platform.machine(),
    }
    versions = {name: version(name) for name in ("mujoco", "robosuite", "numpy")}
    values = {figure.key: figure.value for figure in figures}
    arguments.out.write_text(
        json.dumps({"env": asdict(full), "machine": machine, "versions": versions, **values}, indent=1)
    )
    Console().print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
