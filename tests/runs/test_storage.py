"""Runs behind a URI. pyarrow's local file system stands for an object store: nothing here renames or locks."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from vlarl_rllib.errors import SettingsError
from vlarl_rllib.learner.checkpoint import load_sharded, save_sharded
from vlarl_rllib.process.storage import StoragePath, facts_of, place_of
from vlarl_rllib.runs import sealing
from vlarl_rllib.runs.checkpoints import CheckpointStore, local
from vlarl_rllib.runs.directory import RowLog, new_run_directory, open_run_directory, run_at
from vlarl_rllib.runs.sealing import DamagedCheckpointError, note_shards, verify
from vlarl_rllib.settings import Settings


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoragePath:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # of the copy
    return StoragePath(f"file://{tmp_path}/bucket")


def write(store: CheckpointStore, number: int, content: str = "weights") -> None:
    with store.writing(number) as directory:
        (directory / "learners").mkdir()
        (directory / "learners" / "rank_0").write_text(content)
        store.write_facts(directory, iteration=number, policy_version=2, settings={}, models={}, algorithm={})


def test_what_stands_for_what() -> None:
    assert place_of("runs/mine") == Path("runs/mine") and place_of("file:///tmp/x") == Path("/tmp/x")
    run = place_of("s3://bucket/runs/mine?region=eu-central-1")
    assert isinstance(run, StoragePath) and run.name == "mine"
    assert str(run / "checkpoints") == "s3://bucket/runs/mine/checkpoints?region=eu-central-1"
    assert (run / "checkpoints").parent == run
    with pytest.raises(OSError, match="nope://bucket: Unrecognized filesystem"):
        StoragePath("nope://bucket").exists()


def test_a_checkpoint_is_there_when_its_list_of_files_is(bucket: StoragePath) -> None:
    store = CheckpointStore(bucket / "checkpoints", keep=2)
    assert store.list() == [] and store.newest() is None
    write(store, 1)
    with store.writing(2) as directory:
        (directory / "learners").mkdir()
        (directory / "learners" / "rank_0").write_text("half")
        assert [path.name for path in store.list()] == ["iteration_000001"]
    write(store, 3)
    assert [path.name for path in store.list()] == ["iteration_000002", "iteration_000003"], "keep=2"
    with pytest.raises(OSError, match="no room"), store.writing(4):
        raise OSError("no room")
    assert not (store.root / "iteration_000004").exists()

    (store.root / "iteration_000009" / "learners").mkdir()  # of a process that was killed while it wrote
    newest = store.newest()
    assert newest is not None and store.read_facts(newest)["iteration"] == 3
    write(store, 5)
    assert not (store.root / "iteration_000009").exists()
    with pytest.raises(SettingsError, match="only vlarl train reads checkpoints behind a URI"):
        local(newest)


def test_a_file_that_changed_its_size_is_damage(bucket: StoragePath) -> None:
    store = CheckpointStore(bucket / "checkpoints", keep=2)
    write(store, 1)
    write(store, 2)
    (store.root / "iteration_000002" / "learners" / "rank_0").write_text("cut")
    with pytest.raises(DamagedCheckpointError, match="learners/rank_0 is not what was written"):
        verify(store.root / "iteration_000002")
    passed_over: list[str] = []
    newest = store.newest(passed_over.append)
    assert newest is not None and newest.name == "iteration_000001" and len(passed_over) == 1


def test_what_a_rank_has_written_must_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the run's directory is another one on the rank's node."""
    monkeypatch.setattr("vlarl_rllib.process.storage.VISIBLE_SECONDS", 0.0)
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    facts = facts_of(b"weights")
    with store.writing(1) as directory:
        (directory / "learners").mkdir()
        (directory / "learners" / "rank_0").write_text("weights")
        note_shards(directory, [{"rank_0": facts}])
    verify(store.root / "iteration_000001")

    def seal_too_early() -> None:
        with store.writing(2) as directory:
            (directory / "learners").mkdir()
            (directory / "learners" / "rank_0").write_text("weights")
            note_shards(directory, [{"rank_0": facts}, {"rank_1": facts}])

    with pytest.raises(OSError, match=r"rank_1: 7 bytes were written, and are not seen"):
        seal_too_early()
    assert [path.name for path in store.list()] == ["iteration_000001"]
    with store.writing(3) as directory:  # in another form than the rank says
        (directory / "learners").mkdir()
        (directory / "learners" / "rank_0").write_text("WEIGHTS")
        note_shards(directory, [{"rank_0": facts}])
    sealing._verified.clear()
    with pytest.raises(DamagedCheckpointError, match="rank_0 is not what was written"):
        verify(store.root / "iteration_000003")


def test_learners_save_and_load_behind_a_uri(bucket: StoragePath, tmp_path: Path) -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        model = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        written = save_sharded(bucket / "learners", model, {"policy": optimizer})
        assert set(written) == {"shards/__0_0.distcp", "shards/.metadata", "stepped.json"}
        for name, facts in written.items():
            assert facts == facts_of((bucket / "learners" / name).read_bytes()), name
        other = nn.Linear(3, 2)
        own = torch.optim.AdamW(other.parameters(), lr=0.2)
        load_sharded(bucket / "learners", other, {"policy": own})
        assert torch.equal(other.weight, model.weight) and own.state and own.param_groups[0]["lr"] == 0.2
        assert save_sharded(tmp_path / "same", model, {"policy": optimizer}).keys() == written.keys()
    finally:
        dist.destroy_process_group()


def test_a_run_behind_a_uri_goes_on_from_another_machine(
    bucket: StoragePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run_directory(bucket / "mine", "unused", None)
    with run.claimed(Settings()):
        RowLog(run).add({"iteration": 1})
    assert (bucket / "mine" / "metrics.jsonl").read_text() == '{"iteration": 1}\n'
    with pytest.raises(SettingsError, match="holds a run already; continue it with --resume"):
        new_run_directory(bucket / "mine", "unused", None)
    with pytest.raises(SettingsError, match="no complete checkpoint of vlarl train"):
        open_run_directory(bucket / "mine")
    write(run.checkpoints(keep=1), 1)

    monkeypatch.setenv("HOME", str(tmp_path / "other_home"))
    found = open_run_directory(bucket / "mine")
    assert found.read_rows() == [{"iteration": 1}] and found.settings() == Settings()
    assert found.path != run.path and found.place == run.place
    (bucket / "mine" / "metrics.jsonl").unlink()
    assert run_at(bucket / "mine").read_rows() == [], "the copy is made anew"
