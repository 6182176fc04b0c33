"""`vlarl collect`: checks, a progress bar, and what is said at the end."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlarl_rllib.data.collect import CollectRequest, collect
from vlarl_rllib.data.experts import EXPERTS
from vlarl_rllib.data.rlds import read_statistics
from vlarl_rllib.envs import registry
from vlarl_rllib.envs.registry import EnvSpec
from vlarl_rllib.settings import SettingsError


def run_collect(
    out: Path,
    env: str,
    episodes: int,
    tasks: tuple[int, ...] | None,
    noise: float,
    slowest: float,
    image_size: int,
    max_steps: int | None,
    num_processes: int | None,
    seed: int,
) -> int:
    """Collect and report; the process's exit code: 0 = done, 1 = the expert fails nearly always, 130 = ended by Ctrl-C."""
    if env not in EXPERTS:
        raise SettingsError(f"--env: {env!r} has no scripted expert; choose one of {', '.join(EXPERTS)}")
    available = registry.num_tasks("", name=env)
    for task in tasks or ():
        if not 0 <= task < available:
            raise SettingsError(f"--tasks: {task} is not a task of {env}, whose tasks are 0 to {available - 1}")
    if noise < 0:
        raise SettingsError(f"--noise: {noise:g} must be at least 0")
    if not 0 < slowest <= 1:
        raise SettingsError(f"--slowest: {slowest:g} must be above 0 and at most 1")
    if (out / env).exists():
        raise SettingsError(f"--out: {out / env} exists; give another directory, or remove it")
    spec = EnvSpec(name=env, suite="", image_size=image_size, max_steps=max_steps)
    processes = num_processes or psutil.cpu_count() or 1
    request = CollectRequest(spec, tuple(tasks or range(available)), episodes, out, noise, slowest, seed, processes)
    console = Console(highlight=False, soft_wrap=True)
    columns = (TextColumn("episodes"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task("", total=episodes, shown="")

            def show(kept: int, played: int) -> None:
                progress.update(bar, completed=kept, shown=f"expert succeeds in {100 * kept / played:.0f} %")

            path = collect(request, show)
    except RuntimeError as error:
        console.print(f"[red]{error}[/red]")
        return 1
    except KeyboardInterrupt:
        console.print(f"stopped; what was kept is in {os.path.relpath(out / env)}")
        return 130
    statistics = read_statistics(path)[1]
    console.print(f"{statistics['num_trajectories']} episodes, {statistics['num_transitions']:,} steps: {os.path.relpath(path)}")
    return 0
