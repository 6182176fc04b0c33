"""The light reader of a checkpoint's JSON files says what the model's own configuration says."""

import json
from pathlib import Path

import pytest

from vlarl_rllib.models.checkpoint_facts import read_checkpoint_facts
from vlarl_rllib.models.openvla import OpenVLAConfig
from vlarl_rllib.models.presets import write_checkpoint

GOLDEN_S = Path(__file__).parents[1] / "data" / "golden" / "S"


@pytest.mark.parametrize("source", ["golden", "preset"])
def test_facts_are_the_configurations(source: str, tmp_path: Path) -> None:
    directory = GOLDEN_S
    if source == "preset":
        write_checkpoint("tiny", tmp_path)
        directory = tmp_path
    facts = read_checkpoint_facts(str(directory))
    towers = directory / "vision_towers.json"
    extra = {"vision_towers": json.loads(towers.read_text())} if towers.exists() else {}
    config = OpenVLAConfig.from_pretrained(directory, **extra)
    assert (facts.image_size, facts.action_vocab_size, facts.num_bins) == (config.image_size, config.action_vocab_size, config.n_action_bins)
    for key in ("libero_spatial", "libero_goal"):
        assert facts.action_statistics(key) == config.action_statistics(key)
