"""Which transport a name means, what its facts change for the learner, and how it is swept up."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.weights import probe_transport
from tests.weights.probe_transport import OBJECT_STORE
from vlarl_rllib.learner import fsdp
from vlarl_rllib.learner.sharded_policy import ShardedPolicy
from vlarl_rllib.models.family import load_family
from vlarl_rllib.models.openvla.presets import PRESETS, build_model
from vlarl_rllib.models.presets import preset_facts
from vlarl_rllib.process.plugins import added_by_packages
from vlarl_rllib.settings import Settings
from vlarl_rllib.settings.transports import PARTS
from vlarl_rllib.weights import find_transport
from vlarl_rllib.weights.protocol import WeightTransport

SECONDS = 60


@pytest.fixture
def process_group() -> Iterator[None]:
    fsdp.init_process_group(torch.device("cpu"), 0, 1, dist.HashStore(), SECONDS)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("name", "copied"), [("LendingTransport", True), ("BorrowingTransport", False)])
def test_what_is_lent_does_not_change_with_the_learner(name: str, copied: bool, process_group: None):
    settings = Settings.from_dict({"weights": {"transport": f"{probe_transport.__name__}:{name}"}})
    model = build_model(PRESETS["tiny"])
    policy = ShardedPolicy(
        model,
        None,
        load_family("openvla"),
        preset_facts("tiny").actions,
        settings,
        device=torch.device("cpu"),
        rank=0,
        world_size=1,
        lr=1.0,
        weight_decay=0.0,
        if_diverged="",
    )
    assert policy.publish(1).num_tensors > 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    policy.publish(2)
    first, second = policy._publisher.versions.values()
    assert all(torch.equal(first[name], second[name]) != copied for name in first)


def test_an_installed_package_adds_a_transport(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "my_cluster-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: my-cluster\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(
        f"[vlarl_rllib.transports]\nfast = {OBJECT_STORE}\nshared_memory = their_cluster:Own\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    added_by_packages.cache_clear()
    try:
        assert Settings.from_dict({"weights": {"transport": "fast"}}).weights.transport == "fast"
        transport = find_transport("fast")
        assert (type(transport).__name__, transport.name) == ("ObjectStoreTransport", "fast")
        assert find_transport("auto").name == "shared_memory"  # the package's own
        with pytest.raises(ValueError, match="'slow': choose one of auto, fast, shared_memory, or name a class"):
            find_transport("slow")
    finally:
        monkeypatch.undo()
        added_by_packages.cache_clear()


def test_settings_ask_for_what_the_contract_asks_for():
    assert set(PARTS) == WeightTransport.__abstractmethods__ | set(WeightTransport.__annotations__)


SWEEP = f"""
import sys
from vlarl_rllib.weights import sweeper
sweep = sweeper("{probe_transport.__name__}:LitteringTransport")
before = set(sys.modules)
sweep()
assert (late := set(sys.modules) - before) <= {{"traceback"}}, late
"""


def test_sweeping_imports_nothing_and_ends_nobodys_command():
    done = subprocess.run([sys.executable, "-c", SWEEP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "what is left of transport tests.weights.probe_transport:LitteringTransport" in done.stderr
