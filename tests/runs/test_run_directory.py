"""A run's directory: its config and its rows survive kills and resumes; mistakes with --run-dir are named."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from vlarl_rllib.runs.checkpoints import CheckpointStore
from vlarl_rllib.runs.directory import RowLog, RunDirectory, check_unfinished, new_run_directory, open_run_directory
from vlarl_rllib.settings import Settings, SettingsError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def claim(run: RunDirectory, settings: Settings) -> None:
    """What a start of the run does first."""
    with run.claimed(settings):
        pass


@pytest.fixture
def run(here: Path) -> RunDirectory:
    """A run that has begun."""
    run = new_run_directory(Path("runs/first"), "config", None)
    claim(run, Settings())
    return run


def add_checkpoint(run: RunDirectory, iteration: int) -> Path:
    store = CheckpointStore(run.path / "checkpoints", keep=9)
    with store.writing(iteration) as directory:
        store.write_facts(
            directory, iteration=iteration, policy_version=iteration, settings={}, models={}, algorithm={}
        )
    return store.list()[-1]


# The config and the way to a run


def test_the_config_comes_back_as_it_was(run: RunDirectory) -> None:
    settings = Settings.from_dict(
        {
            "training": {"lr": 3e-7, "vf_clip": None},
            "learners": {"fsdp": {"mesh": [-1, 1]}},
            "env": {"tasks": None, "num_envs": 10, "models_per_process": 10},
        }
    )
    claim(run, settings)
    assert run.settings() == settings


def test_a_new_run_is_named_after_its_config_and_the_time(here: Path) -> None:
    run = new_run_directory(None, "libero_smoke_cpu", None)
    assert run.path.parent == here / "runs"
    assert re.fullmatch(r"libero_smoke_cpu-\d{8}-\d{6}", run.path.name)
    assert not run.path.exists()


def test_an_empty_directory_may_become_a_run(here: Path) -> None:
    (here / "prepared").mkdir()
    claim(new_run_directory(Path("prepared"), "config", None), Settings())
    assert (here / "prepared" / "config.yaml").is_file()


def test_a_run_is_not_overwritten(run: RunDirectory) -> None:
    new_run_directory(Path("runs/first"), "config", None)  # it failed before its first iteration: nothing to lose
    RowLog(run).add({"iteration": 1})
    with pytest.raises(SettingsError, match=r"--run-dir: runs/first holds a run already; continue it with --resume"):
        new_run_directory(Path("runs/first"), "config", None)


def test_a_run_without_a_checkpoint_may_be_begun_again_by_its_own_command(run: RunDirectory) -> None:
    RowLog(run).add({"iteration": 1})
    assert new_run_directory(Path("runs/first"), "config", None, again="iteration") == run
    with pytest.raises(SettingsError, match="holds a run already"):
        new_run_directory(Path("runs/first"), "config", None, again="step")
    add_checkpoint(run, 5)
    with pytest.raises(SettingsError, match="holds a run already"):
        new_run_directory(Path("runs/first"), "config", None, again="iteration")


def test_a_new_run_may_begin_from_a_checkpoint_only(run: RunDirectory) -> None:
    with pytest.raises(SettingsError, match="--resume-from: runs/first: no checkpoint here"):
        new_run_directory(Path("runs/second"), "config", Path("runs/first"))
    assert new_run_directory(Path("runs/second"), "config", add_checkpoint(run, 5)).path.name == "second"


def test_a_run_directory_that_cannot_be_made_is_named(here: Path) -> None:
    (here / "file").write_text("")
    for path in ("file", "file/below"):
        with pytest.raises(SettingsError, match=r"--run-dir: .*file.* cannot be made \(.+\); give another directory"):
            claim(new_run_directory(Path(path), "config", None), Settings())


def test_resuming_needs_a_run_with_a_checkpoint(run: RunDirectory) -> None:
    with pytest.raises(SettingsError, match=r"--run-dir: runs/absent holds no run \(config.yaml is missing\)"):
        open_run_directory(Path("runs/absent"))
    with pytest.raises(SettingsError, match="--resume: runs/first has no complete checkpoint"):
        open_run_directory(Path("runs/first"))
    (run.path / "checkpoints" / ".iteration_000005.partial").mkdir(parents=True)
    with pytest.raises(SettingsError, match="no complete checkpoint"):
        open_run_directory(Path("runs/first"))
    with run.checkpoints(unit="step").writing(5):
        pass
    with pytest.raises(SettingsError, match="no complete checkpoint of vlarl train to continue from"):
        open_run_directory(Path("runs/first"))
    assert open_run_directory(Path("runs/first"), "step") == run
    add_checkpoint(run, 5)
    assert open_run_directory(Path("runs/first")) == run


def test_the_newest_checkpoint_is_the_one_to_continue_from(run: RunDirectory) -> None:
    assert run.newest_checkpoint() is None
    for iteration in (5, 10):
        add_checkpoint(run, iteration)
    assert run.newest_checkpoint() == run.path / "checkpoints" / "iteration_000010"


# runs/latest


def test_latest_is_the_run_begun_last(run: RunDirectory, here: Path) -> None:
    assert (here / "runs" / "latest").resolve() == run.path
    second = new_run_directory(Path("runs/second"), "config", None)
    claim(second, Settings())
    assert (here / "runs" / "latest").resolve() == second.path


def test_latest_moves_with_the_directory_of_runs(run: RunDirectory, here: Path) -> None:
    (here / "runs").rename(here / "old_runs")
    assert (here / "old_runs" / "latest" / "config.yaml").is_file()


def test_a_run_can_be_continued_as_latest(run: RunDirectory, here: Path) -> None:
    add_checkpoint(run, 5)
    latest = open_run_directory(Path("runs/latest"))
    claim(latest, latest.settings())
    assert latest == run
    assert (here / "runs" / "latest").resolve() == run.path


def test_a_directory_of_that_name_is_left_alone(here: Path) -> None:
    (here / "runs" / "latest").mkdir(parents=True)
    claim(new_run_directory(Path("runs/first"), "config", None), Settings())
    assert not (here / "runs" / "latest").is_symlink()


# metrics.jsonl


def test_rows_come_back_in_order(run: RunDirectory) -> None:
    assert run.read_rows() == []
    rows = [{"iteration": i, "success_rate": i / 4, "evaluation": None} for i in (1, 2, 3)]
    log = RowLog(run)
    assert [log.add(row) for row in rows] == [0, 0, 0]
    assert run.read_rows() == rows == log.rows


@pytest.mark.parametrize("cut", ["{", '{"iteration": 3', '{"iteration": 3, "loss": 0.'])
def test_a_row_cut_short_by_a_kill_is_not_read_and_written_over(run: RunDirectory, cut: str) -> None:
    log = RowLog(run)
    for iteration in (1, 2):
        log.add({"iteration": iteration})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(cut)
    assert run.read_rows() == [{"iteration": 1}, {"iteration": 2}]
    RowLog(run).add({"iteration": 3})
    assert run.read_rows() == [{"iteration": 1}, {"iteration": 2}, {"iteration": 3}]


@pytest.mark.parametrize("line", [b"\xff\xfe", b"[1]", b'{"a": 1}', b"{cut"])
def test_rows_that_are_none_are_told(run: RunDirectory, line: bytes) -> None:
    (run.path / "metrics.jsonl").write_bytes(b'{"iteration": 1}\n' + line + b'\n{"iteration": 3}\n')
    with pytest.raises(SettingsError, match=r"metrics.jsonl: line 2 is no row of a run; put the file back"):
        run.read_rows()


def test_an_iteration_played_again_replaces_itself_and_what_followed(run: RunDirectory) -> None:
    log = RowLog(run)
    for iteration in (1, 2, 3, 4):
        log.add({"iteration": iteration, "played": "before"})
    again = RowLog(run)
    assert again.add({"iteration": 3, "played": "again"}) == 2
    assert again.add({"iteration": 4, "played": "again"}) == 0
    assert [(row["iteration"], row["played"]) for row in run.read_rows()] == [
        (1, "before"),
        (2, "before"),
        (3, "again"),
        (4, "again"),
    ]


def test_a_full_disk_costs_no_row(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RowLog(run)
    log.add({"iteration": 1})
    log._file.unlink()
    log._file.symlink_to("/dev/full")  # every write to it fails with ENOSPC
    log.add({"iteration": 2})
    log._file.unlink()
    log.add({"iteration": 3})
    assert [row["iteration"] for row in run.read_rows()] == [1, 2, 3]


def test_a_run_belongs_to_one_process_at_a_time(run: RunDirectory) -> None:
    other = (
        "import sys; from pathlib import Path; from vlarl_rllib.runs.directory import RunDirectory; from "
        "vlarl_rllib.settings import Settings\n"
    )
    other += "with RunDirectory(Path(sys.argv[1])).claimed(Settings()): print('claimed', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", other, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "claimed\n"
    with pytest.raises(SettingsError, match="is in use by a running process"):
        claim(run, Settings())
    process.kill()
    process.wait()
    claim(run, Settings())


def test_a_finished_run_has_nothing_to_resume(run: RunDirectory) -> None:
    checkpoint = add_checkpoint(run, 4)
    check_unfinished(checkpoint, Settings.from_dict({"run": {"iterations": 5}}))
    with pytest.raises(SettingsError, match=r"at iteration 4 of 4.*--resume-from and --set run.iterations"):
        check_unfinished(checkpoint, Settings.from_dict({"run": {"iterations": 4}}))
