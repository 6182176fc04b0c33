"""`vlarl tune` as a command that is killed and goes on, and the same from Python."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_helpers import CONFIG, Command
from head_helpers import Head

from vlarl_rllib.commands.tune import make_tuner
from vlarl_rllib.runs.checkpoints import CheckpointStore
from vlarl_rllib.settings.experiment import Experiment

ITERATIONS = 6
LR = {"training.lr": {"loguniform": [1.0e-6, 1.0e-4]}}


def write(file: Path, iterations: int = ITERATIONS, **values: Any) -> Path:
    config = yaml.safe_load(CONFIG) | {"run": {"iterations": iterations, "checkpoint_every": 2, "dashboard": False}}
    config |= {"rollout": {"steps_per_iteration": 8}, "evaluation": {"every": 2, "episodes": 2}}
    file.write_text(yaml.safe_dump({"config": config, "reuse_actors": True, **values}))
    return file


def rows_of(experiment: Path) -> dict[str, list[dict[str, Any]]]:
    """By trial."""
    files = sorted(experiment.glob("0*/metrics.jsonl"))
    return {file.parent.name: [json.loads(line) for line in file.read_text().splitlines()] for file in files}


@pytest.fixture
def commands() -> Iterator[list[Command]]:
    started: list[Command] = []
    yield started
    for process in (process for command in started for process in command.processes()):
        process.kill()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_population_goes_on_behind_a_kill(tmp_path: Path, commands: list[Command]) -> None:
    file = write(tmp_path / "pbt.yaml", search=LR, samples=2, scheduler={"pbt": {"perturb_every": 2}})
    directory = tmp_path / "run"
    commands.append(Command(tmp_path, "tune", str(file), "--run-dir", str(directory)))
    commands[0].wait_until(lambda: any("TERMINATED" in f.read_text() for f in directory.glob("experiment_state*")))
    commands[0].process.kill()
    commands[0].process.wait()
    before = rows_of(directory)
    finished = [name for name in before if (directory / name / "summary.json").exists()]

    commands.append(Command(tmp_path, "tune", "--restore", "--run-dir", str(directory)))
    assert commands[1].end(300) == 0, commands[1].output
    after = rows_of(directory)
    assert [[row["iteration"] for row in rows] for rows in after.values()] == [list(range(1, ITERATIONS + 1))] * 2
    assert finished and all(after[name] == before[name] for name in finished), "a trial that has ended was played again"
    rates = [[row["applied"]["lr"] for row in rows] for rows in after.values()]
    assert any(len(set(of_trial)) > 1 for of_trial in rates), "nobody went on with other values"
    assert all(1e-6 <= rate <= 1e-4 for of_trial in rates for rate in of_trial)
    for name, rows in after.items():
        versions = [row["policy_version"] for row in rows]
        assert versions == sorted(set(versions)), f"{name}: the version of the weights repeats"
        assert json.loads((directory / name / "summary.json").read_text())["iterations"] == ITERATIONS
    ranking = json.loads((directory / "ranking.json").read_text())
    assert [sample["trials"][0]["state"] for sample in ranking["samples"]] == ["done", "done"]
    assert "best checkpoint of the first" in commands[1].output and "rank" in commands[1].output
    with (directory / "ranking.csv").open() as table:
        assert [float(row["training.lr"]) for row in csv.DictReader(table)] == [
            sample["sampled"]["training.lr"] for sample in ranking["samples"]
        ]


@pytest.mark.timeout(600)
def test_asha_ends_the_worse_trials_early(ray_session: None, tmp_path: Path) -> None:
    """All play the same first iteration, which is worth less to the others."""
    file = write(
        tmp_path / "asha.yaml", 4, set={"run.checkpoint_every": 1, "run.keep_checkpoints": 1},
        search={"rewards.success": [1.0, 0.5, 0.25]}, metric="reward_mean", scheduler={"asha": {"reduction_factor": 2}},
    )  # fmt: skip
    results = make_tuner(Experiment.from_yaml(file), tmp_path / "asha").fit()
    assert not results.errors
    assert [len(rows) for rows in rows_of(tmp_path / "asha").values()] == [4, 1, 1]
    best = results.get_best_result(scope="all")
    assert best.checkpoint is not None and CheckpointStore.resolve(Path(best.checkpoint.path)).is_dir()
    assert best.config["sampled"] == {"rewards.success": 1.0}
    kept = {metrics["training_iteration"] for _, metrics in best.best_checkpoints}
    rewards = [row["reward_mean"] for row in next(iter(rows_of(tmp_path / "asha").values()))]
    assert rewards.index(max(rewards)) + 1 in kept and len(kept) < 4, "the best by the metric, not the newest alone"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ctrl_c_keeps_the_last_iteration_of_each_trial(tmp_path: Path, commands: list[Command]) -> None:
    file = write(tmp_path / "grid.yaml", 50, seeds=[0, 1], concurrent=2, reuse_actors=False, set={
        "run.checkpoint_every": 40,
    })  # fmt: skip
    directory = tmp_path / "run"
    commands.append(Command(tmp_path, "tune", str(file), "--run-dir", str(directory)))
    commands[0].wait_until(lambda: len(rows_of(directory)) == 2 and all(map(len, rows_of(directory).values())))
    commands[0].process.send_signal(2)
    assert commands[0].end(120) == 130, commands[0].output
    assert "go on with: vlarl tune --restore --run-dir" in commands[0].output
    for name, rows in rows_of(directory).items():
        kept = CheckpointStore(directory / name / "checkpoints", 1).newest()
        assert kept is not None and int(kept.name.split("_")[1]) == rows[-1]["iteration"], name
    told = rows_of(directory)
    commands.append(Command(tmp_path, "tune", "--restore", "--run-dir", str(directory)))
    commands[1].wait_until(lambda: all(len(rows) > len(told[name]) + 1 for name, rows in rows_of(directory).items()))
    commands[1].process.send_signal(15)
    assert commands[1].end(120) == 0, commands[1].output
    again = rows_of(directory)
    assert all(rows[: len(told[name])] == told[name] for name, rows in again.items()), "nothing is played twice"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lost_node_costs_a_trial_what_it_did_since_its_checkpoint(tmp_path: Path, commands: list[Command]) -> None:
    file = write(tmp_path / "grid.yaml", 12, seeds=[0, 1], concurrent=2, reuse_actors=False)
    directory = tmp_path / "run"
    head = Head(2, tmp_path)
    try:
        raylet = head.add_node(2)
        cluster = head.client(RAY_AUTH_MODE="token", RAY_ADDRESS=f"127.0.0.1:{head.gcs_port}")
        commands.append(Command(tmp_path, "tune", str(file), "--run-dir", str(directory), variables=cluster))
        commands[0].wait_until(lambda: len(rows_of(directory)) == 2 and min(map(len, rows_of(directory).values())) >= 3)
        raylet.kill()
        assert commands[0].process.wait(300) == 0, commands[0].output
        assert "starts anew from its newest checkpoint" in commands[0].output
        rows = rows_of(directory)
        assert [[row["iteration"] for row in of_trial] for of_trial in rows.values()] == [list(range(1, 13))] * 2
    finally:
        head.stop()
