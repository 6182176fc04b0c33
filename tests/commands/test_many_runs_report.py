"""`vlarl report` of several runs and of sweeps: one file that compares them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_run_report import evaluation, row, write_run

from vlarl_rllib.cli import main
from vlarl_rllib.commands.report import report, write_report
from vlarl_rllib.settings import SettingsError


def rows_to(rate: float, count: int = 3) -> list[dict[str, Any]]:
    """Of a run whose last evaluation has this success."""
    return [row(number, evaluation=evaluation(rate) if number == count else None) for number in range(1, count + 1)]


def cells(text: str, heading: str) -> list[list[str]]:
    """The table under a heading, tags aside."""
    table = text.split(f">{heading}</h2>")[1].split("</table>")[0]
    found = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", line, re.DOTALL) for line in re.split("<tr[^>]*>", table)[1:]]
    return [[re.sub("<[^>]*>", "", cell) for cell in line] for line in found]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for lr, rates in ((1e-5, (0.5, 0.7)), (1e-4, (0.9, 0.9))):
        for seed, rate in enumerate(rates):
            write_run(tmp_path / "sweep" / f"lr_{lr:g}_{seed}", rows_to(rate), training={"lr": lr}, run={"seed": seed})
    (tmp_path / "sweep" / "latest").symlink_to("lr_1e-05_0")
    write_run(tmp_path / "sweep" / "pending", [], training={"lr": 0.5})
    return tmp_path / "sweep"


def test_a_sweep_is_one_file_that_says_what_differs_and_what_is_best(sweep: Path) -> None:
    file, table = report([sweep])
    assert file == sweep / "report.html" and table.row_count == 4
    text = file.read_text()
    assert cells(text, "Settings that differ") == [
        ["setting", "lr 0.0001", "lr 1e-05"],
        ["training.lr", "0.0001", "1e-05"],
    ]
    # 0.6 +- 12.706 x 0.1414 / sqrt(2), within [0, 1]
    assert [line[:4] for line in cells(text, "Ranking")[1:]] == [
        ["1", "lr 0.0001", "90.0 %", "90.0 to 90.0 %"],
        ["2", "lr 1e-05", "60.0 %", "0.0 to 100.0 %"],
    ]
    assert "1 of 5 trials of sweep have no finished iteration" in text
    assert "2 different settings are too few to tell; 10 are needed" in text
    assert not re.search(r'(src|href)="(?!data:)', text) and "<script" not in text


def test_every_axis_has_the_same_charts_with_a_band_of_seeds(sweep: Path) -> None:
    text = report([sweep])[0].read_text()
    by_axis = [part.split("</section>")[0] for part in text.split('<div class="charts by-')[1:]]
    assert [part.split('"')[0] for part in by_axis] == ["steps", "iterations", "minutes"]
    titles = [re.findall(r"<figcaption>(.*?)</figcaption>", part) for part in by_axis]
    assert titles[0] == titles[1] == titles[2]
    for wanted in (
        "held-out", "training episodes", "return", "length", "entropy", "gradient norm", "learning rate", "KL",
        "clip fraction", "log-prob", "seconds",
    ):  # fmt: skip
        assert any(wanted in title for title in titles[0]), wanted
    assert all(part.count("<polygon") >= 2 for part in by_axis)


def test_runs_beside_each_other_go_where_runs_are(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["vlarl", "report", "sweep/lr_1e-05_0", "sweep/lr_0.0001_1"])
    with pytest.raises(SystemExit) as done:
        main()
    [file] = tmp_path.glob("runs/compare-*.html")
    assert done.value.code == 0 and f"wrote {file.relative_to(tmp_path)}" in capsys.readouterr().out
    text = file.read_text()
    # the seeds differ too, but in nothing that is learned; 19 of 20, Wilson: no more than the runs' names
    assert [line[1:3] for line in cells(text, "Ranking")[1:]] == [["lr_0.0001_1", "90.0 %"], ["lr_1e-05_0", "50.0 %"]]
    assert "Importance" not in text


def test_where_a_report_goes(sweep: Path, tmp_path: Path) -> None:
    one, other = sweep / "lr_1e-05_0", tmp_path / "new" / "x.html"
    assert report([one])[0] == one / "report.html" == write_report(one)
    assert report([one, sweep], other)[0] == other and other.is_file()
    with pytest.raises(SettingsError, match=r"^--out: .*notes.txt must be called something.html"):
        report([one], tmp_path / "notes.txt")
    (tmp_path / "d.html").mkdir()
    with pytest.raises(SettingsError, match=r"^--out: .* cannot be written \(Is a directory\); give another file"):
        report([one], tmp_path / "d.html")


def test_a_sweep_that_has_finished_nothing_is_one_line(sweep: Path) -> None:
    for trial in sweep.glob("lr_*"):
        (trial / "metrics.jsonl").write_text("")
    with pytest.raises(SettingsError, match=r"^RUN_DIR: no trial of .*sweep has a finished iteration"):
        report([sweep])


def test_a_damaged_trial_is_one_line(sweep: Path) -> None:
    with (sweep / "lr_1e-05_0" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row(4, env_steps="many")) + "\n")
    with pytest.raises(SettingsError, match=r"lr_1e-05_0/metrics.jsonl, line 4: env_steps is 'many'"):
        report([sweep])
    assert not (sweep / "report.html").exists()


def test_names_and_values_do_not_become_markup(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / str(number) / name.replace("/", "_"), rows_to(0.5), run={"wandb": f"<i>{name}"})
        for number, name in enumerate(("<b>bold</b>", "&amp;"))
    ]
    text = report(runs, tmp_path / "x.html")[0].read_text()
    assert "<i>&" not in text and "<b>bold" not in text and "&lt;b&gt;bold" in text and "&amp;amp;" in text


def test_one_run_says_what_was_changed_first(tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path / "run", rows_to(0.5), training={"lr": 3e-5})).read_text()
    assert cells(text, "Changed settings") == [["setting", "value", "default"], ["training.lr", "3e-05", "1e-05"]]
    assert text.index("Changed settings") < text.index("environment steps")
    assert "None: all defaults." in write_report(write_run(tmp_path / "other", rows_to(0.5))).read_text()
