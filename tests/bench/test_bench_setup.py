"""What is measured where nothing is said, and the model that is made for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlarl_rllib.bench import BENCHMARKS
from vlarl_rllib.bench.setup import bench_settings, prepared
from vlarl_rllib.models.openvla import OpenVLAConfig, random_7b
from vlarl_rllib.settings import Settings


def gpus(number: int) -> Callable[[], int]:
    return lambda: number


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("number", [0, 1], ids=["cpu", "gpu"])
def test_each_has_settings_of_its_own(name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlarl_rllib.bench.setup.count_gpus", gpus(number))
    settings = bench_settings(name, None, ["rollout.steps_per_iteration=32"])
    assert settings.rollout.steps_per_iteration == 32
    assert (settings.engines.gpus + settings.learners.gpus > 0) == bool(number)
    assert settings.model.dtype == settings.engines.dtype == ("bfloat16" if number else "float32")
    assert settings.env.name == ("libero" if name == "env" else "synthetic")


def test_a_config_is_what_is_measured(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("env: {name: synthetic}\nevaluation: {every: 2}\nrun: {wandb: mine}\n")
    settings = bench_settings("update", tmp_path / "run.yaml", ["model.path=small"])
    assert (settings.model.path, settings.evaluation.episodes, settings.run.wandb) == ("small", 0, None)


def small(text_config: dict[str, Any], **others: Any) -> OpenVLAConfig:
    """A config of the same vocabulary and little else."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}
    tower = {"embed_dim": 32, "depth": 2, "num_heads": 1}
    towers = {"featurizer": tower, "fused_featurizer": tower}
    return OpenVLAConfig(text_config=text_config | sizes, vision_towers=towers, image_sizes=[28, 28], **others)


def test_random_7b_is_a_checkpoint_that_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(random_7b, "OpenVLAConfig", small)
    wanted = Settings.from_dict({"model": {"path": "random-7b"}, "env": {"name": "synthetic"}})
    settings = prepared("update", wanted)
    directory = Path(settings.model.path)
    assert directory.parent == tmp_path / ".cache" / "vlarl" / "models"
    assert [file.name for file in directory.parent.iterdir()] == ["random-7b"], "something half made is left"
    written = (directory / "config.json").stat().st_mtime_ns
    assert prepared("rollout", wanted) == settings and (directory / "config.json").stat().st_mtime_ns == written

    from vlarl_rllib.models.family import family_of

    family = family_of(str(directory))
    model, facts = family.load(str(directory)), family.read_facts(str(directory))
    assert facts.actions.token_ids == range(31744, 32000) == model.action_token_ids
    assert "libero_spatial" in facts.norm_stats and family.processor(str(directory)).prompt_ids("open the drawer")
