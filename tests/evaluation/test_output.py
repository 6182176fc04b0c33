"""What is on the disk, and going on from there."""

import errno
import json
from pathlib import Path

import pytest

from vlarl_rllib.evaluation.output import EvaluationDirectory, open_evaluation
from vlarl_rllib.evaluation.report import summarize, write_reports
from vlarl_rllib.settings import SettingsError
from vlarl_rllib.types import EpisodeResult

QUESTION = {"checkpoint": "model", "tasks": [0], "trials": 5, "seed": 7, "checkpoint_files": None}


def begin(path: Path, question: dict[str, object] = QUESTION) -> EvaluationDirectory:
    with open_evaluation(path, question) as directory:
        return directory


def lines(path: Path) -> list[str]:
    return (path / "episodes.jsonl").read_text().splitlines()


def test_finished_episodes_are_on_the_disk_at_once_and_found_again(tmp_path: Path) -> None:
    directory = begin(tmp_path / "new" / "place")
    directory.add([EpisodeResult(0, 2, 7, True, 1.0)])
    assert [json.loads(line) for line in lines(directory.path)] == [
        {"task": 0, "trial": 2, "success": True, "steps": 7}
    ]
    directory.add([EpisodeResult(0, 0, 9, False, 0.0), EpisodeResult(0, 1, 9, False, 0.0)])
    directory.add([])
    again = begin(directory.path)
    assert again.finished == {(0, 0), (0, 1), (0, 2)} and again.episodes == directory.episodes
    assert json.loads((directory.path / "evaluation.json").read_text())["versions"]["ray"]


def test_a_line_cut_by_a_kill_is_dropped_and_what_follows_is_whole(tmp_path: Path) -> None:
    begin(tmp_path).add([EpisodeResult(0, trial, 5, True, 1.0) for trial in (0, 1)])
    file = tmp_path / "episodes.jsonl"
    for cut in (b'{"task": 0, "tri', b"\xff\x00", b'{"task": 0}', b"3"):
        whole = file.read_bytes()
        file.write_bytes(whole + cut)
        assert begin(tmp_path).finished == {(0, 0), (0, 1)}
        assert file.read_bytes() == whole
    file.write_bytes(whole[:-1])  # only the end of the line is missing
    begin(tmp_path).add([EpisodeResult(0, 2, 5, True, 1.0)])
    assert begin(tmp_path).finished == {(0, 0), (0, 1), (0, 2)}


def test_of_an_episode_that_is_there_twice_the_first_counts(tmp_path: Path) -> None:
    begin(tmp_path).add([EpisodeResult(0, 0, 5, True, 1.0), EpisodeResult(0, 0, 9, False, 0.0)])
    assert [episode["success"] for episode in begin(tmp_path).episodes] == [True]


def test_a_video_is_kept_under_its_episode(tmp_path: Path) -> None:
    begin(tmp_path).add(
        [
            EpisodeResult(3, 0, 5, True, 1.0, b"film"),
            EpisodeResult(3, 1, 5, False, 0.0, b"other"),
            EpisodeResult(3, 2, 5, False, 0.0),
        ]
    )
    assert {path.name: path.read_bytes() for path in (tmp_path / "videos").iterdir()} == {
        "task_03_trial_000_success.mp4": b"film",
        "task_03_trial_001_failure.mp4": b"other",
    }


@pytest.mark.parametrize(
    ("key", "value"), [("seed", 8), ("trials", 50), ("tasks", [0, 1]), ("checkpoint_files", "abc")]
)
def test_another_question_is_refused_and_the_key_named(tmp_path: Path, key: str, value: object) -> None:
    begin(tmp_path)
    before = (tmp_path / "evaluation.json").read_text()
    with pytest.raises(SettingsError, match=rf"--out: .* holds another evaluation, whose {key} is") as error:
        begin(tmp_path, {**QUESTION, key: value})
    assert "\n" not in str(error.value)
    assert (tmp_path / "evaluation.json").read_text() == before


def test_a_directory_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(SettingsError, match=r"holds other things \(thesis.tex"):
        begin(tmp_path)
    with pytest.raises(SettingsError, match="cannot be made"):
        begin(tmp_path / "thesis.tex")


def test_two_processes_do_not_share_a_directory(tmp_path: Path) -> None:
    with open_evaluation(tmp_path, QUESTION), pytest.raises(SettingsError, match="in use by a running process"):
        begin(tmp_path)


def test_changed_versions_are_noticed(tmp_path: Path) -> None:
    assert begin(tmp_path).versions_before == {}
    file = tmp_path / "evaluation.json"
    values = json.loads(file.read_text())
    values["versions"]["mujoco"] = "1.0"
    file.write_text(json.dumps(values))
    assert begin(tmp_path).versions_before["mujoco"] == "1.0"


def test_episodes_that_are_none_of_the_question_are_played(tmp_path: Path) -> None:
    begin(tmp_path)
    good = {"task": 0, "trial": 1, "success": True, "steps": 4}
    odd = [
        {"task": 9},
        {"trial": 5},
        {"trial": -1},
        {"task": "0"},
        {"task": [0]},
        {"success": "yes"},
        {"steps": None},
        {"steps": 1.5},
        {"trial": True},
    ]
    (tmp_path / "episodes.jsonl").write_text(
        "".join(json.dumps(good | change) + "\n" for change in odd) + json.dumps(good) + "\n[1]\n" + "9" * 5000
    )
    assert begin(tmp_path).episodes == [good]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"versions": 3}', '{"versions": {"ray": 1}}'])
def test_a_damaged_question_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(
        SettingsError,
        match=r"^--out: .*evaluation\.json (cannot be read|is not what an evaluation writes).*; give a new directory",
    ):
        begin(tmp_path)


@pytest.mark.parametrize("name", ["evaluation.json", "episodes.jsonl", "videos"])
def test_links_that_lead_out_are_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    directory, elsewhere = tmp_path / "evaluation", tmp_path / "elsewhere"
    begin(directory)
    (directory / "videos").mkdir()
    (directory / name).rename(elsewhere)
    before = elsewhere.read_bytes() if elsewhere.is_file() else b""
    (directory / name).symlink_to(elsewhere)
    with pytest.raises(SettingsError, match=rf"^--out: .*{name} is a link that leads out of"):
        begin(directory).add([EpisodeResult(0, 0, 5, True, 1.0, b"film")])
    assert (elsewhere.read_bytes() == before) if elsewhere.is_file() else not list(elsewhere.iterdir())


def test_reports_and_films_take_the_place_of_links(tmp_path: Path) -> None:
    directory, victim = begin(tmp_path / "evaluation"), tmp_path / "victim"
    victim.write_text("years of work")
    (directory.path / "videos").mkdir()
    for name in (
        "results.json",
        "report.md",
        ".results.json.partial",
        ".episodes.jsonl.partial",
        "videos/task_00_trial_000_success.mp4",
    ):
        (directory.path / name).symlink_to(victim)
    directory.add([EpisodeResult(0, 0, 5, True, 1.0, b"film")])
    question = {**QUESTION, "suite": None, "env": "synthetic"}
    write_reports(directory.path, summarize(question, directory.episodes, {0: "point"}, {0: frozenset()}, []))
    begin(directory.path)
    assert victim.read_text() == "years of work"
    assert (
        not (directory.path / "results.json").is_symlink()
        and (directory.path / "videos" / "task_00_trial_000_success.mp4").read_bytes() == b"film"
    )


def test_a_disk_that_was_full_costs_no_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = begin(tmp_path)
    directory.add([EpisodeResult(0, 0, 5, True, 1.0)])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", no_space)
        patch.setattr("vlarl_rllib.evaluation.output.replace_file", no_space)
        for trial in (1, 2):
            directory.add([EpisodeResult(0, trial, 5, True, 1.0, b"film")])
        with pytest.raises(OSError, match="No space"):
            directory.write()
    directory.add([EpisodeResult(0, 3, 5, True, 1.0)])
    assert [json.loads(line)["trial"] for line in lines(tmp_path)] == [0, 1, 2, 3]


def no_space(*args: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
