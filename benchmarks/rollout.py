"""Rollout time with closed loops and in lock-step: steps a second, and wall time over the busier of environments and
engine.

    python benchmarks/rollout.py [--env libero|synthetic] [--num-envs 8] [--steps 24] [--out FILE]

One runner, one vLLM engine, the tiny preset; the environments' and the engine's busy seconds are measured inside them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import psutil
import ray
from rich.console import Console
from rich.table import Table

from vlarl_rllib.config import VLAPPOConfig
from vlarl_rllib.settings import Settings


def measure(arguments: argparse.Namespace, lockstep: bool) -> dict[str, Any]:
    settings = Settings.from_dict(
        {
            "env": {
                "name": arguments.env,
                "tasks": [0, 1],
                "num_envs": arguments.num_envs,
                "num_processes": arguments.num_processes,
                "fast_render": not arguments.full_render,
            },
            "rollout": {"steps_per_iteration": arguments.steps, "lockstep": lockstep},
            "engines": {"num": 1, "gpus": arguments.gpus},
            "learners": {"num": 0},
            "evaluation": {"episodes": 0},
        }
    )
    algorithm = VLAPPOConfig.from_settings(settings).build_algo()
    collect = algorithm.collector.collect
    collect(0, arguments.steps, {})  # environments build their models, the engine warms up
    results = []
    for iteration in range(1, 1 + arguments.repeats):
        engine_before = algorithm.engine_pool.statuses()[0].busy_seconds
        began = time.perf_counter()
        rollout = collect(iteration, arguments.steps, {})
        wall = time.perf_counter() - began
        engine = algorithm.engine_pool.statuses()[0].busy_seconds - engine_before
        env = sum(float(metrics["env_seconds"].peek()) for metrics in rollout.metrics) / settings.env.num_processes
        results.append(
            {
                "wall_seconds": wall,
                "env_seconds": env,
                "engine_seconds": engine,
                "steps": sum(rollout.num_decisions),
            }
        )
    algorithm.stop()
    best = min(results, key=lambda result: result["wall_seconds"])
    return best | {
        "steps_per_second": best["steps"] / best["wall_seconds"],
        "wall_over_busiest": best["wall_seconds"] / max(best["env_seconds"], best["engine_seconds"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="libero", choices=["libero", "synthetic"])
    parser.add_argument("--num-envs", type=int, default=8)
    parser.add_argument("--num-processes", type=int, default=min(8, psutil.cpu_count() or 1))
    parser.add_argument("--steps", type=int, default=16, help="per slot")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument("--gpus", type=float, default=0.0, help="of the engine")
    parser.add_argument("--full-render", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    results = {name: measure(arguments, lockstep) for name, lockstep in (("lock-step", True), ("closed loops", False))}
    table = Table(
        "loop",
        "steps/s",
        "wall s",
        "env s per process",
        "engine s",
        "wall / busiest",
        title=f"{arguments.env}, {arguments.num_envs} slots",
    )
    for name, row in results.items():
        numbers = ("steps_per_second", "wall_seconds", "env_seconds", "engine_seconds", "wall_over_busiest")
        table.add_row(name, *(f"{row[key]:.2f}" for key in numbers))
    Console().print(table)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    ray.shutdown()


if __name__ == "__main__":
    main()
