"""Checkpoints in an object store: S3 as moto serves it on this machine. pip install 'moto[s3,server]' has it run."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from urllib.request import Request, urlopen

import pytest
import torch
import torch.distributed as dist
from torch import nn

from vlarl_rllib.learner.checkpoint import load_sharded, save_sharded
from vlarl_rllib.process.storage import StoragePath
from vlarl_rllib.runs.checkpoints import CheckpointStore
from vlarl_rllib.runs.sealing import note_shards

PATIENCE_SECONDS = 60.0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoragePath]:
    pytest.importorskip("moto", reason="moto[s3,server] is not installed; it is not in the lock")
    output = tmp_path_factory.mktemp("moto") / "output.txt"
    with output.open("w") as log:
        server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", "0"], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while "Running on http://" not in output.read_text():
            assert server.poll() is None and time.monotonic() < deadline, output.read_text()
            time.sleep(0.2)
        address = output.read_text().partition("Running on http://")[2].split()[0]
        with suppress(OSError):
            urlopen(Request(f"http://{address}/lab", method="PUT")).close()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
            patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
            yield StoragePath(f"s3://lab/runs/mine?endpoint_override={address}&scheme=http&region=us-east-1")
    finally:
        server.kill()


def test_a_checkpoint_in_an_object_store_appears_whole_or_not_at_all(run: StoragePath) -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        model, other = nn.Linear(3, 2), nn.Linear(3, 2)
        store = CheckpointStore(run / "checkpoints", keep=1)
        for iteration in (1, 2):
            with store.writing(iteration) as directory:
                (directory / "learners").mkdir()
                note_shards(directory, [save_sharded(directory / "learners", model, {})])
                store.write_facts(
                    directory, iteration=iteration, policy_version=1, settings={}, models={}, algorithm={}
                )
                assert directory not in store.list()
        with pytest.raises(OSError, match="no room"), store.writing(3):
            raise OSError("no room")
        newest = store.newest()
        assert newest is not None and [newest] == store.list() and store.read_facts(newest)["iteration"] == 2
        load_sharded(newest / "learners", other, {})
        assert torch.equal(other.weight, model.weight)
    finally:
        dist.destroy_process_group()
