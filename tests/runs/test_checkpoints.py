"""Checkpoints are complete or absent, and the newest few stay."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlarl_rllib.errors import SettingsError
from vlarl_rllib.runs.checkpoints import ALGORITHM_FILE, FACTS_FILE, POINTER_FILE, CheckpointStore
from vlarl_rllib.runs.sealing import FILES_FILE, DamagedCheckpointError, replacing, seal, verify


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def write(store: CheckpointStore, iteration: int, content: str = "weights") -> Path:
    with store.writing(iteration) as directory:
        (directory / "learners").mkdir()
        (directory / "learners" / "rank_0").write_text(content)
        kept = {"metrics": {"a": np.float64(0.5)}, "successes": [], "rates": {}}
        store.write_facts(
            directory,
            iteration=iteration,
            policy_version=iteration + 1,
            settings={"run": {"seed": 3}},
            models={},
            algorithm=kept,
        )
    return store.list()[-1]


def names(store: CheckpointStore) -> list[str]:
    return [path.name for path in store.list()]


def test_a_run_without_checkpoints_has_none(store: CheckpointStore) -> None:
    assert store.list() == []
    assert not store.root.exists()


def test_a_checkpoint_holds_what_was_written(store: CheckpointStore) -> None:
    checkpoint = write(store, 5)
    assert checkpoint == store.root / "iteration_000005"
    assert (checkpoint / "learners" / "rank_0").read_text() == "weights"
    assert store.read_algorithm(checkpoint) == {"metrics": {"a": 0.5}, "successes": [], "rates": {}}
    assert store.read_facts(checkpoint) == {
        "iteration": 5,
        "policy_version": 6,
        "settings": {"run": {"seed": 3}},
        "models": {},
    }


def test_nothing_is_seen_of_a_checkpoint_while_it_is_written(store: CheckpointStore) -> None:
    write(store, 1)
    with store.writing(2) as directory:
        store.write_facts(directory, iteration=2, policy_version=3, settings={}, models={}, algorithm={})
        assert names(store) == ["iteration_000001"]
    assert names(store) == ["iteration_000001", "iteration_000002"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_checkpoint_that_fails_leaves_nothing(store: CheckpointStore, error: type[BaseException]) -> None:
    write(store, 1)

    def write_half() -> None:
        with store.writing(2) as directory:
            (directory / "half").write_text("of it")
            raise error

    with pytest.raises(error):
        write_half()
    assert [path.name for path in store.root.iterdir()] == ["iteration_000001"]


def test_what_a_killed_process_left_is_not_listed_and_goes_with_the_next_attempt(store: CheckpointStore) -> None:
    left = store.root / ".iteration_000005.partial"
    left.mkdir(parents=True)
    (left / FACTS_FILE).write_text("{}")
    (left / "half").write_text("of it")
    assert store.list() == []
    checkpoint = write(store, 5)
    assert not left.exists()
    assert sorted(path.name for path in checkpoint.iterdir()) == [ALGORITHM_FILE, FACTS_FILE, FILES_FILE, "learners"]


def test_the_newest_are_kept_by_number(store: CheckpointStore) -> None:
    for iteration in (2, 10, 999_999, 1_000_000):
        write(store, iteration)
    assert names(store) == ["iteration_999999", "iteration_1000000"]


def test_a_failed_checkpoint_costs_no_older_one(store: CheckpointStore) -> None:
    write(store, 1), write(store, 2)
    with pytest.raises(OSError, match="disk"), store.writing(3):
        raise OSError("disk full")
    assert names(store) == ["iteration_000001", "iteration_000002"]


def test_an_iteration_played_again_replaces_its_checkpoint(store: CheckpointStore) -> None:
    write(store, 5, "old")
    assert (write(store, 5, "new") / "learners" / "rank_0").read_text() == "new"
    assert names(store) == ["iteration_000005"]


def test_other_things_in_the_directory_are_left_alone(store: CheckpointStore) -> None:
    write(store, 1)
    for name in ("notes", "iteration_5", "iteration_000001_copy", "my_iteration_000001"):
        (store.root / name).mkdir()
    for iteration in (2, 3):
        write(store, iteration)
    assert names(store) == ["iteration_000002", "iteration_000003"]
    assert (store.root / "notes").is_dir() and (store.root / "iteration_000001_copy").is_dir()


def test_a_pointer_leads_to_its_checkpoint_from_anywhere(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write(store, 5)
    tune = tmp_path / "trial" / "checkpoint_000000"
    tune.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    CheckpointStore.write_pointer(tune, CheckpointStore(Path("checkpoints"), keep=1).newest())
    monkeypatch.chdir("/")
    assert CheckpointStore.resolve(tune) == checkpoint


def test_a_checkpoint_stands_for_itself(store: CheckpointStore) -> None:
    checkpoint = write(store, 5)
    assert CheckpointStore.resolve(checkpoint) == checkpoint


def test_a_directory_without_checkpoint_is_refused_with_an_example(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint here; give a directory like runs/"):
        CheckpointStore.resolve(tmp_path)


def test_a_pointer_to_a_checkpoint_that_was_dropped_is_refused(store: CheckpointStore, tmp_path: Path) -> None:
    write(store, 1)
    store.write_pointer(tmp_path, store.newest(), tmp_path)
    for iteration in (2, 3):
        write(store, iteration)
    assert json.loads((tmp_path / POINTER_FILE).read_text())["checkpoint"].endswith("iteration_000001")
    with pytest.raises(FileNotFoundError, match="iteration_000001: no checkpoint here"):
        CheckpointStore.resolve(tmp_path)


def test_a_pointer_written_before_the_first_checkpoint_leads_nowhere(store: CheckpointStore, tmp_path: Path) -> None:
    store.write_pointer(tmp_path, store.newest())
    assert store.points_nowhere(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint here"):
        store.resolve(tmp_path)
    checkpoint = write(store, 1)
    assert not store.points_nowhere(checkpoint)
    store.write_pointer(tmp_path, store.newest())
    assert not store.points_nowhere(tmp_path) and store.resolve(tmp_path) == checkpoint


def test_what_a_kill_left_of_other_iterations_goes_too(store: CheckpointStore) -> None:
    for name in (".iteration_000003.partial", ".iteration_000004.replaced"):
        (store.root / name / "learners").mkdir(parents=True)
    write(store, 9)
    assert [path.name for path in store.root.iterdir()] == ["iteration_000009"]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def rewrite(file: Path) -> None:
    """Another content of the same size and time of change."""
    times = file.stat()
    flip(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 1))


def linked(checkpoint: Path) -> Path:
    """The same content elsewhere."""
    elsewhere = checkpoint.parents[1] / "elsewhere"
    elsewhere.write_text("weights")
    return elsewhere


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing in it": (lambda path: (shutil.rmtree(path), path.mkdir()), "was not written to its end"),
    "no facts": (lambda path: (path / FACTS_FILE).unlink(), "facts.json is missing"),
    "facts cut": (lambda path: cut(path / FACTS_FILE), "facts.json has"),
    "no algorithm": (lambda path: (path / ALGORITHM_FILE).unlink(), "algorithm.json is missing"),
    "no files.json": (lambda path: (path / FILES_FILE).unlink(), "was not written to its end"),
    "files.json cut": (lambda path: cut(path / FILES_FILE), "files.json cannot be read"),
    "files.json empty": (lambda path: (path / FILES_FILE).write_text("{}"), "files.json lists no weights"),
    "shard a link": (
        lambda path: ((path / "learners" / "rank_0").unlink(), (path / "learners" / "rank_0").symlink_to(linked(path))),
        "learners/rank_0 is a link that leads out of it",
    ),
    "files.json a list": (lambda path: (path / FILES_FILE).write_text("[]"), "must hold an object"),
    "shard gone": (lambda path: (path / "learners" / "rank_0").unlink(), "learners/rank_0 is missing"),
    "shard cut": (lambda path: cut(path / "learners" / "rank_0"), "learners/rank_0 has 6 bytes of 7"),
    "shard with a wrong bit": (
        lambda path: flip(path / "learners" / "rank_0"),
        "learners/rank_0 is not what was written",
    ),
    "shard rewritten": (lambda path: rewrite(path / "learners" / "rank_0"), "learners/rank_0 is not what was written"),
    "shards a link to nowhere": (
        lambda path: (shutil.rmtree(path / "learners"), (path / "learners").symlink_to("nowhere")),
        "rank_0 is missing",
    ),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_the_newest_that_verifies_is_taken_and_the_damaged_one_is_told(
    store: CheckpointStore, damage: Callable[[Path], object], said: str
) -> None:
    older, newest = write(store, 5), write(store, 10)
    damage(newest)
    told: list[str] = []
    assert store.newest(told.append) == older
    assert len(told) == 1 and said in told[0] and "iteration_000010" in told[0]
    with pytest.raises(DamagedCheckpointError, match="iteration_000010"):
        verify(newest)


def test_what_was_passed_over_goes_once_the_run_has_another_checkpoint(store: CheckpointStore) -> None:
    write(store, 5)
    (write(store, 10) / FACTS_FILE).unlink()
    write(store, 6)
    assert names(store) == ["iteration_000005", "iteration_000006"]


def test_a_file_that_did_not_change_is_read_once(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write(store, 5)
    copy = store.root.parent / "copy" / checkpoint.name
    shutil.copytree(checkpoint, copy, copy_function=shutil.copyfile)  # new times of change
    read: list[Path] = []
    monkeypatch.setattr(
        "vlarl_rllib.runs.sealing.file_digest",
        lambda file: (read.append(file), hashlib.sha256(file.read_bytes()).hexdigest())[1],
    )
    verify(checkpoint)
    assert read == [], "this process wrote it"
    verify(copy)
    verify(copy)
    assert sorted(file.name for file in read) == [ALGORITHM_FILE, FACTS_FILE, "rank_0"]


def test_a_run_that_moves_keeps_its_pointers(store: CheckpointStore, tmp_path: Path) -> None:
    checkpoint = write(store, 5)
    partial, final = tmp_path / "elsewhere", tmp_path / "trial" / "checkpoint_000000"
    partial.mkdir()
    store.write_pointer(partial, checkpoint, final)  # as Tune has it written before it moves it
    final.parent.mkdir()
    partial.rename(final)
    assert CheckpointStore.resolve(final) == checkpoint
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("checkpoints", "trial"):
        (tmp_path / name).rename(moved / name)
    assert CheckpointStore.resolve(moved / "trial" / "checkpoint_000000") == moved / "checkpoints" / "iteration_000005"


def test_what_tune_still_points_to_stays(tmp_path: Path) -> None:
    trial = tmp_path / "trial"
    store = CheckpointStore(trial / "checkpoints", keep=1, pointers=trial)
    for iteration in (1, 2, 3):
        checkpoint, pointer = write(store, iteration), trial / f"checkpoint_{iteration:06d}"
        pointer.mkdir()
        store.write_pointer(pointer, checkpoint)
    assert names(store) == ["iteration_000001", "iteration_000002", "iteration_000003"]
    shutil.rmtree(trial / "checkpoint_000002")  # Tune keeps the best two, say
    write(store, 4)
    assert names(store) == ["iteration_000001", "iteration_000003", "iteration_000004"]
    assert CheckpointStore.resolve(trial / "checkpoint_000001") == store.root / "iteration_000001"


def test_a_save_replaces_an_older_one_and_nothing_else(store: CheckpointStore, tmp_path: Path) -> None:
    target = tmp_path / "save"
    for content in ("old", "new"):
        with replacing(target) as directory:
            (directory / "weights").write_text(content)
    verify(target)
    assert (target / "weights").read_text() == "new"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine").write_text("dear")
    with (
        pytest.raises(SettingsError, match="holds something else than a checkpoint; give a new directory"),
        replacing(tmp_path / "notes"),
    ):
        pass
    assert (tmp_path / "notes" / "mine").read_text() == "dear"
    verify(target)
    (target / "notes").write_text("dear")
    with pytest.raises(SettingsError, match="holds something else than a checkpoint"), replacing(target):
        pass
    (target / "notes").unlink()
    (tmp_path / "link").symlink_to(target)
    with replacing(tmp_path / "link") as directory:
        (directory / "weights").write_text("newest")
    assert (target / "weights").read_text() == "newest" and (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_file_that_cannot_be_read_is_damage(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    older, newest = write(store, 5), write(store, 10)
    read = hashlib.file_digest

    def fail(stream: Any, name: str) -> Any:
        if str(newest) in stream.name:
            raise OSError(errno.EIO, "Input/output error")
        return read(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", fail)
    monkeypatch.setattr("vlarl_rllib.runs.sealing._verified", {})
    told: list[str] = []
    assert store.newest(told.append) == older
    assert len(told) == 1 and "iteration_000010 cannot be read" in told[0] and "Input/output error" in told[0]


def test_whoever_has_no_time_compares_sizes(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    older, newest = write(store, 5), write(store, 10)
    monkeypatch.setattr("vlarl_rllib.runs.sealing._verified", {})
    monkeypatch.setattr("vlarl_rllib.runs.sealing.file_digest", lambda file: pytest.fail("a file was read"))
    assert store.newest(contents=False) == newest
    cut(newest / "learners" / "rank_0")
    assert store.newest(contents=False) == older


def make_pointer(store: CheckpointStore, trial: Path, number: int) -> None:
    pointer = trial / f"checkpoint_{number:06d}"
    pointer.mkdir()
    store.write_pointer(pointer, store.written, pointer)


def test_an_iteration_that_tune_points_to_stays_when_it_is_played_again(tmp_path: Path) -> None:
    """As in population based training, where a trial goes on from another's checkpoint behind an earlier iteration."""
    store = CheckpointStore(tmp_path / "checkpoints", keep=1, pointers=tmp_path)
    write(store, 12, "own")
    make_pointer(store, tmp_path, 0)
    with store.writing(11) as directory:
        (directory / "learners").mkdir()
    assert store.written == store.root / "iteration_000011", "not the one that counts furthest"
    make_pointer(store, tmp_path, 1)
    for repeat in ("iteration_000012_1", "iteration_000012_2"):
        with store.writing(12) as directory:
            (directory / "weights").write_text(repeat)
        make_pointer(store, tmp_path, 2 + int(repeat[-1]))
        assert store.written == store.newest() == store.root / repeat
    assert (CheckpointStore.resolve(tmp_path / "checkpoint_000000") / "learners" / "rank_0").read_text() == "own"
    assert CheckpointStore.resolve(tmp_path / "checkpoint_000003").name == "iteration_000012_1"


def test_a_pointer_that_a_full_disk_has_cut_names_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=1, pointers=tmp_path)
    write(store, 1)
    make_pointer(store, tmp_path, 0)
    (tmp_path / "checkpoint_000000" / POINTER_FILE).write_text("")
    write(store, 2)
    assert names(store) == ["iteration_000002"]


def test_what_cannot_be_removed_costs_no_checkpoint(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for iteration in (1, 2):
        write(store, iteration)

    def fail(path: Path, **options: Any) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(shutil, "rmtree", fail)
    write(store, 3)
    assert store.written == store.root / "iteration_000003" and names(store)[0] == "iteration_000001"


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"iteration": -5}, "iteration is -5"),
        ({"policy_version": True}, "policy_version is True"),
        ({"settings": {"training": 7}}, "facts.json: training: 7 is not allowed"),
    ],
)
def test_facts_that_make_no_sense_are_damage(store: CheckpointStore, facts: dict[str, Any], said: str) -> None:
    checkpoint = write(store, 5)
    content = json.loads((checkpoint / FACTS_FILE).read_text()) | facts
    (checkpoint / FACTS_FILE).write_text(json.dumps(content))
    seal(checkpoint)
    with pytest.raises(DamagedCheckpointError, match=said):
        store.read_facts(checkpoint)
