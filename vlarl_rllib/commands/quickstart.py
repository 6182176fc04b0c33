"""`vlarl quickstart`: demonstrations, supervised fine-tuning and PPO one after the other, in one Ray session.

RUN/demonstrations/  what the scripted expert showed (RLDS)
    initial/         the preset with random weights, where `model.path` is one
    sft/             the run of `vlarl sft`, with its model
    stages.json      seconds, amount and success of each stage
    ...              the run of `vlarl train`, which goes on from sft/model
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from vlarl_rllib.commands.collect import run_collect
from vlarl_rllib.commands.sft import MODEL_DIRECTORY, run_sft
from vlarl_rllib.commands.train import run_training
from vlarl_rllib.data.rlds import read_statistics
from vlarl_rllib.evaluation.report import wilson_interval
from vlarl_rllib.models.family import family_of
from vlarl_rllib.models.presets import presets, write_checkpoint
from vlarl_rllib.process.console import make_console, pasted
from vlarl_rllib.process.lost_output import keep_trying
from vlarl_rllib.process.own_files import replace_file
from vlarl_rllib.process.signals import END
from vlarl_rllib.reports.page import stage_cells
from vlarl_rllib.reports.series import evaluation_points
from vlarl_rllib.runs.directory import RunDirectory
from vlarl_rllib.runs.files import STAGES_FILE
from vlarl_rllib.runs.preflight import DEMONSTRATIONS
from vlarl_rllib.runs.ray_session import ray_session
from vlarl_rllib.settings import Settings, calculate_runtime_args

INITIAL, SFT = "initial", "sft"
"""Folders in a run's directory."""


def run_quickstart(settings: Settings, run: RunDirectory) -> int:
    """All stages and their table; the exit code of the first one that did not end well, else 0."""
    console = make_console()
    END.limit_seconds, END.words = settings.run.stop_seconds, lambda: "start again with another --run-dir"
    initial, sft = settings.model.path, RunDirectory(run.path / SFT)
    if initial in presets():
        initial = str(run.path / INITIAL)
        write_checkpoint(settings.model.path, initial, seed=settings.run.seed)
    data = run.path / DEMONSTRATIONS / settings.env.name
    for_sft = settings.replaced(model={"path": initial}, sft={"data": str(data)})
    for_ppo = settings.replaced(model={"path": str(sft.path / MODEL_DIRECTORY)})

    def fine_tune() -> int:
        with sft.claimed(for_sft):
            return run_sft(for_sft, sft)

    def reinforce() -> int:
        with run.claimed(for_ppo):
            return run_training(for_ppo, run, resume_from=None)

    stages: list[tuple[str, Callable[[], int]]] = [
        ("demonstrations", lambda: run_collect(settings, run.path / DEMONSTRATIONS)),
        ("supervised fine-tuning", fine_tune),
        ("PPO", reinforce),
    ]
    seconds: dict[str, float] = {}
    with ray_session(calculate_runtime_args(settings), settings, run.path):
        for number, (name, stage) in enumerate(stages, start=1):
            END.check()
            console.print(f"{number}/{len(stages)} {name}", style="bold")
            began = time.perf_counter()
            if code := stage():
                if number == 1:
                    console.print(END.words())
                elif stage is fine_tune:
                    console.print(
                        "then go on to PPO with: vlarl train CONFIG --set "
                        f"model.path={pasted(sft.path / MODEL_DIRECTORY)}"
                    )
                return code
            seconds[name] = time.perf_counter() - began
    if not run.read_rows():  # ended while PPO started
        return END.code
    rows = _stage_rows(settings, run, sft, data, seconds)
    unwritten = keep_trying(lambda: replace_file(run.path / STAGES_FILE, json.dumps(rows, indent=2) + "\n"))
    console.print(_table(rows))
    if unwritten:
        console.print(f"{STAGES_FILE} could not be written: {unwritten}", style="red")
    return 1 if unwritten else 0


def _stage_rows(
    settings: Settings, run: RunDirectory, sft: RunDirectory, data: Path, seconds: dict[str, float]
) -> list[dict[str, Any]]:
    """One for each stage: its name, seconds, amount in words, and the greedy success behind it, None where there is no
    policy yet."""
    statistics = read_statistics(data, family_of(str(sft.path / MODEL_DIRECTORY), settings.model.family_reference))[1]
    tuned, rows = sft.read_rows()[-1], run.read_rows()
    evaluations = [evaluation for _, evaluation in evaluation_points(rows)]
    before, after = evaluations[0], evaluations[-1] if len(evaluations) > 1 else None  # a PPO that was ended has none
    amounts = (
        (f"{statistics['num_trajectories']:,} episodes, {statistics['num_transitions']:,} steps", None),
        (f"{tuned['step']:,} x {settings.sft.batch_size} steps", before),
        (f"{rows[-1]['env_steps']:,} environment steps", after),
    )
    return [
        {
            "stage": name,
            "seconds": seconds[name],
            "amount": amount,
            "success": _success(evaluation) if evaluation else None,
        }
        for name, (amount, evaluation) in zip(seconds, amounts, strict=True)
    ]


def _success(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Of greedy episodes from held-out starts: rate, 95 % Wilson interval, episodes, and the rate of each task."""
    rate, episodes = evaluation["success_rate"], evaluation["episodes"]
    low, high = wilson_interval(round(rate * episodes), episodes)
    return {"rate": rate, "low": low, "high": high, "episodes": episodes, "by_task": evaluation["success_rate_by_task"]}


def _table(rows: list[dict[str, Any]]) -> Table:
    cells = [stage_cells(row) for row in rows]
    table = Table(*cells[0])
    for row in cells:
        table.add_row(*row.values())
    return table
