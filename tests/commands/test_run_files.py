"""`vlarl report` of a directory that somebody else has made: damaged files are one line, and nothing outside of it is
read or written."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_run_report
from test_run_report import evaluation, row

from vlarl_rllib.commands.report import report, write_report
from vlarl_rllib.settings import SettingsError

run = test_run_report.run
HUGE = 10**400
STAGE = {"stage": "PPO", "seconds": 3.0, "amount": "9 steps", "success": None}


def add_row(**changes: Any) -> Callable[[Path], Any]:
    """As JSON has it, NaN and all."""

    def write(directory: Path) -> None:
        with (directory / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row(4) | changes) + "\n")

    return write


def put(name: str, content: Any) -> Callable[[Path], Any]:
    return lambda directory: (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))


DAMAGED = {
    "a text for a number": (add_row(env_steps="many"), "metrics.jsonl, line 4: env_steps is 'many'"),
    "NaN": (add_row(success_rate=float("nan")), "line 4: success_rate"),
    "a rate above 1": (add_row(success_rate=1.5), "line 4: success_rate"),
    "a huge number": (add_row(env_steps=HUGE), "line 4: env_steps is 1000"),
    "a huge metric": (add_row(value_loss=HUGE), "line 4: value_loss is 1000"),
    "a metric beyond float32": (add_row(value_loss=1e300), "line 4: value_loss is 1e+300"),
    "a list for a dictionary": (add_row(faults=[1]), "line 4: faults is [1]"),
    "a count below 0": (add_row(faults={"env_deaths": -1}), "line 4: faults.env_deaths is -1"),
    "a missing part of the time": (add_row(seconds={"sample": 1.0}), "line 4: seconds has no evaluation"),
    "a task that is no number": (add_row(success_rate_by_task={"<b>": 0.5}), "line 4: success_rate_by_task.<b>"),
    "an evaluation without episodes": (
        add_row(evaluation=evaluation(0.5) | {"episodes": 0}),
        "line 4: evaluation.episodes is 0",
    ),
    "half an evaluation": (add_row(evaluation={"episodes": 3}), "line 4: evaluation.success_rate"),
    "a missing metric": (
        lambda root: put("metrics.jsonl", {k: v for k, v in row(1).items() if k != "approx_kl"})(root),
        "line 1: approx_kl is None",
    ),
    "a row that is a list": (put("metrics.jsonl", "[1, 2]\n"), "metrics.jsonl, line 1: it is [1, 2]"),
    "a row that is null": (put("metrics.jsonl", "null\n"), "metrics.jsonl, line 1: it is None"),
    "only half a row": (put("metrics.jsonl", '{"iteration": 1, '), "has no finished iteration"),
    "a number of too many digits": (put("metrics.jsonl", "9" * 5000), "has no finished iteration"),
    "a summary that is a list": (put("summary.json", [1]), "summary.json: it is [1]"),
    "a summary without time": (put("summary.json", {"versions": {}}), "summary.json: wall_seconds"),
    "a row of before there were timestamps": (
        lambda root: put("metrics.jsonl", {k: v for k, v in row(1).items() if k != "timestamp"})(root),
        "line 1: timestamp is missing; remove it, or make the run again",
    ),
    "a time that is NaN": (add_row(timestamp=float("nan")), "line 4: timestamp is nan"),
    "a revision that is none": (add_row(git_revision="<script>"), "line 4: git_revision is '<script>'"),
    "a huge return": (add_row(return_mean=HUGE), "line 4: return_mean is 1000"),
    "a length below 0": (add_row(episode_length=-1.0), "line 4: episode_length is -1.0"),
    "no rates that were applied": (add_row(applied=None), "line 4: applied is None"),
    "a rate that is a text": (add_row(applied={"lr": "1", "value_lr": 1.0}), "line 4: applied.lr is '1'"),
    "an infinite time": (
        put("summary.json", '{"wall_seconds": Infinity, "versions": {}}'),
        "summary.json: wall_seconds is inf",
    ),
    "versions that are numbers": (
        put("summary.json", {"wall_seconds": 1.0, "versions": {"ray": 2}}),
        "summary.json: versions.ray is 2",
    ),
    "half a summary": (put("summary.json", '{"wall'), "summary.json cannot be read"),
    "stages that are none": (put("stages.json", {"stage": "PPO"}), "stages.json: it is {'stage': 'PPO'}"),
    "a stage without its time": (put("stages.json", [STAGE | {"seconds": None}]), "stages.json: 0.seconds is None"),
    "half a success": (put("stages.json", [STAGE | {"success": {"rate": 0.5}}]), "stages.json: 0.success.low"),
    "deep nesting": (put("stages.json", "[" * 100_000), "stages.json cannot be read"),
    "a directory for a file": (
        lambda root: (root / "stages.json").mkdir(),
        "stages.json is no regular file; remove it",
    ),
    "a pipe for a file": (lambda root: os.mkfifo(root / "stages.json"), "stages.json is no regular file; remove it"),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize(
    "tell", [write_report, lambda path: report([path, path], path / "report.html")], ids=["report", "comparison"]
)
def test_a_damaged_file_is_one_line(name: str, tell: Callable[[Path], Any], run: Path) -> None:
    damage, message = DAMAGED[name]
    damage(run)
    with pytest.raises(SettingsError, match=r"^RUN_DIR: ") as caught:
        tell(run)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (run / "report.html").exists()


def test_a_run_that_went_astray_has_a_report(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_row(value_loss=float("nan"), approx_kl=float("inf"), logprob_gap_max=1e38, return_mean=-1e38)(run)
    add_row(entropy=1e-320, grad_norm=0.0, timestamp=0.0, env_steps=0, iteration=0, git_revision=None)(run)
    (run / "config.yaml").unlink()
    text = write_report(run).read_text()
    assert "config.yaml is missing, or of another version: some-run" in text
    numbers = re.findall(r'(?:points|[xy][12]?|c[xy])="([^"]*)"', text)
    assert len(numbers) > 500 and not [one for one in numbers if re.search("[^-0-9., ]", one)]
    report([run, run], run / "both.html")
    nothing = dict.fromkeys(row(1)["seconds"], 0.0) | {"sample": 5e-324}
    most = {"env_steps": 10**15, "iteration": 10**15, "timestamp": 1e15}
    for changes in ({"seconds": nothing, "timestamp": 1.0}, most):
        (run / "metrics.jsonl").unlink()
        add_row(**changes)(run)
        report([run, run], run / "both.html")


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "stages.json", "config.yaml"])
def test_a_link_that_leads_out_is_not_read(name: str, run: Path, tmp_path: Path) -> None:
    (run / name).unlink(missing_ok=True)
    (tmp_path / "secret").write_text("the secret\n")
    (run / name).symlink_to(tmp_path / "secret")
    with pytest.raises(
        SettingsError, match=rf"^RUN_DIR: .*{name} is a link that leads out of .*, which is not followed"
    ) as caught:
        write_report(run)
    assert "\n" not in str(caught.value)


def test_films_elsewhere_are_left_out(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlarl_rllib.commands.report.draw_curves", lambda *arguments: b"")
    (tmp_path / "secret").write_bytes(b"the secret")
    (run / "videos").mkdir()
    (run / "videos" / "own.mp4").write_bytes(b"film")
    (run / "videos" / "a_link.mp4").symlink_to("own.mp4")
    (run / "videos" / "secret.mp4").symlink_to(tmp_path / "secret")
    os.mkfifo(run / "videos" / "pipe.mp4")
    text = write_report(run).read_text()
    assert text.count("<video") == 2 and "secret" not in text
    (tmp_path / "elsewhere").mkdir()
    (run / "videos").rename(tmp_path / "films")
    (run / "videos").symlink_to(tmp_path / "films")
    with pytest.raises(SettingsError, match=r"videos is a link that leads out of"):
        write_report(run)


def test_nothing_is_written_through_a_link(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlarl_rllib.commands.report.draw_curves", lambda *arguments: b"picture")
    (tmp_path / "thesis").write_text("years of work")
    names = (
        "report.html",
        "curves.png",
        ".report.html.partial",
        ".curves.png.partial",
        f".report.html.{os.getpid()}.partial",
    )
    for name in names:
        (run / name).symlink_to(tmp_path / "thesis")
    write_report(run)
    assert (tmp_path / "thesis").read_text() == "years of work"
    assert (
        (run / "curves.png").read_bytes() == b"picture"
        and not (run / "curves.png").is_symlink()
        and not (run / "report.html").is_symlink()
    )
    assert (run / "report.html").stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o22)), "as any file that is made"


def test_a_matplotlibrc_in_the_working_directory_changes_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    seen = []
    drawn = "vlarl_rllib.reports.curves._draw"
    monkeypatch.setattr(drawn, lambda *arguments: seen.append(matplotlib.rcParams["text.usetex"]))
    with matplotlib.rc_context({"text.usetex": True}):
        write_report(run)
    assert set(seen) == {False}
