"""The light reader of a checkpoint's JSON files says what the model's own configuration says."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from vlarl_rllib.models.family import ActionFormat, read_facts
from vlarl_rllib.models.openvla import OpenVLAConfig
from vlarl_rllib.models.openvla.actions import ActionTokenizer, dataset_statistics
from vlarl_rllib.models.presets import write_checkpoint
from vlarl_rllib.models.statistics import check_action_statistics
from vlarl_rllib.runs.preflight import check_model
from vlarl_rllib.settings import SettingsError

GOLDEN_S = Path(__file__).parents[1] / "data" / "golden" / "S"


@pytest.mark.parametrize("source", ["golden", "preset"])
def test_facts_are_the_configurations(source: str, tmp_path: Path) -> None:
    directory = GOLDEN_S
    if source == "preset":
        write_checkpoint("tiny", tmp_path)
        directory = tmp_path
    facts = read_facts(str(directory))
    towers = directory / "vision_towers.json"
    extra = {"vision_towers": json.loads(towers.read_text())} if towers.exists() else {}
    config = OpenVLAConfig.from_pretrained(directory, **extra)
    assert facts.image_size == config.image_size
    assert facts.actions == ActionFormat(1, 7, config.action_token_ids)
    for key in ("libero_spatial", "libero_goal"):
        assert facts.action_statistics(key) == config.action_statistics(key)


SEVEN = {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}
NAN, INFINITE = float("nan"), float("inf")
BROKEN = {
    "NaN": (
        SEVEN | {"q01": [0.0, NAN] + [0.0] * 5},
        "action.q01 is [0.0, nan, 0.0, 0.0, 0.0, 0.0, 0.0], must be 7 finite numbers",
    ),
    "infinite": (SEVEN | {"q99": [INFINITE] * 7}, "action.q99 is [inf, "),
    "too large": (SEVEN | {"q99": [1e308] * 7}, "action.q99 is [1e+308, "),
    "six numbers": (
        SEVEN | {"q99": [1.0] * 6},
        "action.q99 is [1.0, 1.0, 1.0, 1.0, 1.0, 1.0], must be 7 finite numbers",
    ),
    "missing": ({"q01": [0.0] * 7}, "action.q99 is None, must be 7 finite numbers"),
    "texts": (SEVEN | {"q01": ["0"] * 7}, "action.q01 is ['0', "),
    "turned round": (
        SEVEN | {"q99": [1.0, -2.0] + [1.0] * 5},
        "action: q99 is -2.0 and q01 -1.0 at number 1, must not be lower",
    ),
    "half a mask": (SEVEN | {"mask": [True] * 3}, "action.mask is [True, True, True], must be 7 booleans"),
    "a mask of numbers": (SEVEN | {"mask": [1] * 7}, "action.mask is [1, "),
    "no object": ([0.0] * 7, "action is list, must be an object with q01 and q99"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("file", ["config.json", "dataset_statistics.json"])
def test_statistics_that_scale_no_action_are_told_with_file_and_key(name: str, file: str, tmp_path: Path) -> None:
    action, message = BROKEN[name]
    directory = shutil.copytree(GOLDEN_S, tmp_path / "S")
    broken = {"mine_no_noops": {"action": action}}
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(
        json.dumps(config | {"norm_stats": config["norm_stats"] | (broken if file == "config.json" else {})})
    )
    (directory / "dataset_statistics.json").write_text(json.dumps({} if file == "config.json" else broken))
    check_model(str(directory), "libero_goal")  # what is not used may be broken
    with pytest.raises(SettingsError) as caught:
        check_model(str(directory), "mine")
    assert f"{directory / file}: mine_no_noops: {message}" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="mine_no_noops: action"):
        OpenVLAConfig.from_pretrained(directory).action_statistics("mine")


def test_a_dimension_that_never_changes_is_scaled_to_its_constant() -> None:
    actions = np.full((20, 7), 0.25, np.float32)
    actions[:, 0] = np.linspace(-1, 1, 20)
    statistics = dataset_statistics(actions, 1)["action"]
    check_action_statistics(statistics, "computed")
    np.testing.assert_allclose(ActionTokenizer.unnormalize(np.full(7, -0.7), statistics)[1:6], 0.25)
    check_action_statistics(SEVEN | {"q99": [1.0] * 6 + [-2.0]}, "a gripper that is not scaled")


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def sharded(directory: Path, *names: Any) -> None:
    (directory / "model.safetensors").unlink()
    save_file({"a": np.zeros(3, np.float32)}, directory / "part-1.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(enumerate(names))}))


def change_config(directory: Path, **values: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | values))


DAMAGED = {
    "cut short": (lambda root: cut(root / "model.safetensors", 5000), "model.safetensors is "),
    "cut in its header": (
        lambda root: cut(root / "model.safetensors", 100),
        "model.safetensors is no whole safetensors file",
    ),
    "empty": (lambda root: cut(root / "model.safetensors", 0), "model.safetensors is no whole safetensors file"),
    "one byte less": (
        lambda root: cut(root / "model.safetensors", (root / "model.safetensors").stat().st_size - 1),
        "model.safetensors is damaged",
    ),
    "a header that lies": (
        lambda root: (root / "model.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}"),
        "model.safetensors is no whole safetensors file (it has 10 bytes and its header claims 1152921504606846976)",
    ),
    "another format": (
        lambda root: (root / "model.safetensors").rename(root / "pytorch_model.bin"),
        "has no model.safetensors; weights in another",
    ),
    "a missing shard": (
        lambda root: sharded(root, "part-1.safetensors", "part-2.safetensors"),
        "part-2.safetensors is missing",
    ),
    "a shard elsewhere": (
        lambda root: sharded(root, "../part-1.safetensors"),
        "names '../part-1.safetensors', which is no safetensors file of",
    ),
    "a shard of another format": (
        lambda root: sharded(root, "pytorch_model.bin"),
        "names 'pytorch_model.bin', which is no safetensors file",
    ),
    "no shards": (lambda root: sharded(root), "has no weight_map of file names"),
    "an adapter beside it": (
        lambda root: (root / "adapter_config.json").write_text("{}"),
        "holds an adapter (adapter_config.json) beside the model",
    ),
    "weights of another name": (
        lambda root: change_config(root, transformers_weights="adapter_model.bin"),
        "transformers_weights is 'adapter_model",
    ),
    "attention from the hub": (
        lambda root: change_config(root, text_config={"attn_implementation": "someone/kernel"}),
        "text_config.attn_implementation is 'someone/kernel', which would run code from elsewhere",
    ),
    "sizes that are none": (lambda root: change_config(root, image_sizes=["large"]), "its sizes cannot be read"),
    "no ids": (lambda root: change_config(root, n_action_bins=10**6), "1000000 bins of"),
    "statistics that are a list": (
        lambda root: change_config(root, norm_stats=[1]),
        "norm_stats is list, must be an object",
    ),
    "half a statistics file": (
        lambda root: cut(root / "dataset_statistics.json", 50),
        "dataset_statistics.json cannot be read",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_checkpoint_is_told_before_anything_starts(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGED[name]
    directory = shutil.copytree(GOLDEN_S, tmp_path / "S")
    damage(directory)
    with pytest.raises(SettingsError, match=r"^model\.path: ") as caught:
        check_model(str(directory), "libero_goal")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_shards_and_a_second_format_beside_them_are_no_mistake(tmp_path: Path) -> None:
    directory = shutil.copytree(GOLDEN_S, tmp_path / "S")
    sharded(directory, "part-1.safetensors", "part-1.safetensors")
    (directory / "pytorch_model.bin").write_bytes(b"whatever")
    check_model(str(directory), "libero_goal")
