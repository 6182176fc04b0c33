"""Checkpoints are complete or absent, and the newest few stay."""

import json
from pathlib import Path

import numpy as np
import pytest

from vlarl_rllib.checkpoints import ALGORITHM_FILE, FACTS_FILE, POINTER_FILE, CheckpointStore


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def write(store: CheckpointStore, iteration: int, content: str = "weights") -> Path:
    with store.writing(iteration) as directory:
        (directory / "learners").mkdir()
        (directory / "learners" / "rank_0").write_text(content)
        store.write_facts(
            directory, iteration=iteration, policy_version=iteration + 1, settings={"run": {"seed": 3}}, algorithm={"metrics": {"a": np.float64(0.5)}}
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
    assert store.read_algorithm(checkpoint) == {"metrics": {"a": 0.5}}
    assert store.read_facts(checkpoint) == {"iteration": 5, "policy_version": 6, "settings": {"run": {"seed": 3}}}


def test_nothing_is_seen_of_a_checkpoint_while_it_is_written(store: CheckpointStore) -> None:
    write(store, 1)
    with store.writing(2) as directory:
        store.write_facts(directory, iteration=2, policy_version=3, settings={}, algorithm={})
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
    assert sorted(path.name for path in checkpoint.iterdir()) == [ALGORITHM_FILE, FACTS_FILE, "learners"]


def test_the_newest_are_kept_by_number(store: CheckpointStore) -> None:
    for iteration in (2, 999_999, 10, 1_000_000):
        write(store, iteration)
    # Of 2, 999999, 10 the 2 goes; then 10 goes.
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


def test_a_pointer_leads_to_its_checkpoint_from_anywhere(store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    with pytest.raises(FileNotFoundError, match=r"no complete checkpoint here \(facts.json is missing\); give a directory like runs/"):
        CheckpointStore.resolve(tmp_path)


def test_a_pointer_to_a_checkpoint_that_was_dropped_is_refused(store: CheckpointStore, tmp_path: Path) -> None:
    write(store, 1)
    store.write_pointer(tmp_path, store.newest())
    for iteration in (2, 3):
        write(store, iteration)
    assert json.loads((tmp_path / POINTER_FILE).read_text())["checkpoint"].endswith("iteration_000001")
    with pytest.raises(FileNotFoundError, match="iteration_000001: no complete checkpoint"):
        CheckpointStore.resolve(tmp_path)


def test_a_pointer_written_before_the_first_checkpoint_leads_nowhere(store: CheckpointStore, tmp_path: Path) -> None:
    store.write_pointer(tmp_path, store.newest())
    assert store.points_nowhere(tmp_path)
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
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
