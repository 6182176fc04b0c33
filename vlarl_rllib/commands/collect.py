"""`vlarl collect`: checks, a progress bar, and what is said at the end."""

from __future__ import annotations

from pathlib import Path

from vlarl_rllib.data.collect import CollectRequest, collect
from vlarl_rllib.data.rlds import read_statistics
from vlarl_rllib.data.tfds_process import VERSION
from vlarl_rllib.models.family import family_of
from vlarl_rllib.models.presets import resolve_model
from vlarl_rllib.process.console import make_console, make_progress, shown
from vlarl_rllib.process.signals import END
from vlarl_rllib.settings import Settings, calculate_runtime_args
from vlarl_rllib.types import EnvSpec


def run_collect(settings: Settings, out: Path) -> int:
    """Collect and report; the process's exit code: 0 = done, 1 = the expert fails nearly always or the disk is full,
    128 + signal = ended by one."""
    env, plan = settings.env, calculate_runtime_args(settings)
    model = resolve_model(settings.model.path)
    family = family_of(model, settings.model.family_reference)
    image_size = settings.collect.image_size or family.read_facts(model).image_size
    request = CollectRequest(
        EnvSpec(
            name=env.name, suite=env.suite, image_size=image_size, max_steps=settings.collect.max_steps or env.max_steps
        ),
        tasks=plan.demonstrated_tasks,
        episodes=settings.collect.episodes,
        family=family,
        out=out,
        noise=settings.collect.noise,
        paces=tuple(settings.collect.paces),
        seed=settings.run.seed,
        num_processes=plan.num_processes,
    )
    console = make_console()
    END.limit_seconds = settings.run.stop_seconds
    try:
        with make_progress(console, "episodes") as progress:
            bar = progress.add_task("", total=settings.collect.episodes, shown="")

            def show(kept: int, played: int) -> None:
                progress.update(bar, completed=kept, shown=f"expert succeeds in {100 * kept / played:.0f} %")

            path = collect(request, show)
    except (RuntimeError, ValueError) as error:  # ValueError: an environment that cannot be made so
        console.print(str(error), style="red")
        return 1
    except OSError as error:
        console.print(
            f"{shown(out)} cannot be written: {error}; make room, and collect into another directory",
            style="red",
        )
        return 1
    except KeyboardInterrupt:
        kept = out / env.name / VERSION
        console.print(
            f"stopped; what was kept is in {shown(kept)}" if kept.exists() else "stopped; there is no data set"
        )
        return END.code
    statistics = read_statistics(path, family)[1]
    console.print(f"{statistics['num_trajectories']} episodes, {statistics['num_transitions']:,} steps: {shown(path)}")
    return 0
