"""`vlarl report`: one file that tells of a run."""

import base64
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlarl_rllib.cli import main
from vlarl_rllib.commands.report import compare, write_report
from vlarl_rllib.observability.metrics import FAULTS, LEARNER_METRICS, SECONDS
from vlarl_rllib.reports.series import evaluation_points
from vlarl_rllib.runs.files import read_run
from vlarl_rllib.settings import Settings, SettingsError

PNG = b"\x89PNG\r\n"


def evaluation(rate: float) -> dict[str, Any]:
    return {"episodes": 20, "success_rate": rate, "mean_length": 9.0, "success_rate_by_task": {"0": rate, "10": rate}}


def row(iteration: int, **changes: Any) -> dict[str, Any]:
    numbers = dict.fromkeys(LEARNER_METRICS, 0.1 * iteration)
    base = {
        "iteration": iteration, "env_steps": 64 * iteration, "episodes": 5, "success_rate": 0.1 * iteration,
        "success_rate_by_task": {"0": 0.2}, "return_mean": 0.5, "episode_length": 12.0,
        "timestamp": 1.8e9 + 60.0 * iteration, "git_revision": "0123456789ab",
        "applied": {"lr": 1e-5, "value_lr": 1e-4},
        "seconds": dict.fromkeys(SECONDS, 1.5), "faults": dict.fromkeys(FAULTS, 0),
        "initial_evaluation": None, "evaluation": None,
    }  # fmt: skip
    return {**numbers, **base, **changes}


def write_run(directory: Path, rows: list[dict[str, Any]], **settings: Any) -> Path:
    """A run's directory, with what differs from the defaults by sections."""
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (directory / "config.yaml").write_text(yaml.safe_dump(Settings().replaced(**settings).to_dict()))
    (directory / "summary.json").write_text(json.dumps({"wall_seconds": 90.0, "versions": {"ray": "2.60.0"}}))
    return directory


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rows = [
        row(1, initial_evaluation=evaluation(0.25), success_rate=None),
        row(2),
        row(3, evaluation=evaluation(0.6), faults=dict.fromkeys(FAULTS, 0) | {"env_deaths": 7}),
    ]
    return write_run(tmp_path / "some-run", rows)


def test_a_quickstarts_stages_are_in_the_report(run: Path) -> None:
    success = {"rate": 0.5, "low": 0.41, "high": 0.59, "episodes": 128, "by_task": {"0": 0.5}}
    stages = [
        {"stage": "demonstrations", "seconds": 41.2, "amount": "800 episodes", "success": None},
        {"stage": "PPO", "seconds": 300.0, "amount": "27,648 environment steps", "success": success},
    ]
    assert "Stages" not in write_report(run).read_text()
    (run / "stages.json").write_text(json.dumps(stages))
    text = write_report(run).read_text()
    assert "41 s" in text and "27,648 environment steps" in text and "50.0 % of 128 (41 to 59 %)" in text


def test_the_report_holds_everything_in_one_file(run: Path) -> None:
    (run / "videos").mkdir()
    (run / "videos" / "iteration_000000_task_00_start_040_failure.mp4").write_bytes(b"film")
    file = write_report(run)
    assert file == run / "report.html" and (run / "curves.png").read_bytes().startswith(PNG)
    text = file.read_text()
    assert not re.search(r'(src|href)="(?!data:)', text), "nothing is fetched from elsewhere"
    assert base64.b64encode(b"film").decode() in text and ", start 40, failure<" in text
    # 5 of 20: Wilson's interval is 11.2 to 46.9 %; 12 of 20: 38.7 to 78.1 %
    assert "25.0 %" in text and "11.2 to 46.9 %" in text and "60.0 %" in text and "38.7 to 78.1 %" in text
    assert "env_deaths" in text and ">7<" in text and "runner_restarts" not in text
    assert "1.5 min" in text and "ray 2.60.0" in text and "learners:" in text and "git 0123456789ab" in text


def test_tasks_are_called_by_their_instructions(run: Path) -> None:
    def first_column() -> list[str]:
        table = write_report(run).read_text().split("held-out starts</h2>")[1].split("</table>")[0]
        assert re.findall(r"<td[^>]*>([^<]*)</td>", table)[-2:] == ["25 %", "60 %"]
        return re.findall(r"<th>([^<]*)</th>", table)

    (run / "videos").mkdir()
    (run / "videos" / "iteration_000000_task_00_start_040_failure.mp4").write_bytes(b"film")
    (run / "config.yaml").write_text("env: {name: tabletop}\nmodel: {unnorm_key: tabletop}\n")
    assert first_column() == [
        "after environment steps",
        "success",
        "95 % interval",
        "episodes",
        "touch the red cube",
        "pick up the green cylinder",
    ]
    assert "iteration 0: touch the red cube, start 40, failure<" in (run / "report.html").read_text()
    for foreign in ("env: {name: 'antigravity:Env'}", "env: {no_such_key: 1}"):
        (run / "config.yaml").write_text(foreign)
        assert first_column()[-2:] == ["task 0", "task 10"]
        assert "antigravity" not in sys.modules


def test_what_a_user_writes_does_not_become_markup(run: Path) -> None:
    (run / "config.yaml").write_text("run: {wandb: '<script>alert(1)</script>'}\n")
    assert "<script>" not in write_report(run).read_text()


def test_a_run_of_fine_tuning_is_told(run: Path) -> None:
    (run / "metrics.jsonl").write_text(json.dumps({"step": 50, "loss": 1.0}) + "\n")
    with pytest.raises(
        SettingsError, match=r"is a run of vlarl sft, which has metrics\.jsonl alone; give a run of vlarl train"
    ):
        write_report(run)


def test_a_run_that_goes_on_and_has_no_evaluation(run: Path) -> None:
    (run / "metrics.jsonl").write_text(json.dumps(row(1, success_rate=None, success_rate_by_task={})) + "\n")
    (run / "summary.json").unlink()
    text = write_report(run).read_text()
    assert "goes on or was killed" in text and "held-out" not in text and "<p>None.</p>" in text


def test_evaluations_are_placed_where_they_were_made(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(steps, point["success_rate"]) for steps, point in evaluation_points(rows)] == [(0, 0.25), (192, 0.6)]
    table = compare([read_run(run)])
    assert [list(column.cells) for column in table.columns] == [
        ["some-run"],
        ["3"],
        ["192"],
        ["25.0 %"],
        ["60.0 %"],
        ["90 s"],
        ["7"],
    ]


def test_the_command_and_a_directory_without_a_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["vlarl", "report", "some-run"])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0 and "wrote some-run/report.html" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("sys.argv", ["vlarl", "report", "empty"])
    with pytest.raises(SystemExit) as failed:
        main()
    assert failed.value.code == 2 and capsys.readouterr().err.startswith(
        "vlarl: RUN_DIR: empty has no finished iteration"
    )
