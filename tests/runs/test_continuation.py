"""What of a config may change where a run goes on from a checkpoint."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vlarl_rllib.errors import SettingsError
from vlarl_rllib.models.fingerprint import fingerprint, model_fingerprints
from vlarl_rllib.runs.checkpoints import CheckpointStore
from vlarl_rllib.runs.continuation import check_resume, check_resume_from
from vlarl_rllib.settings import Settings

GIVEN: dict[str, dict[str, Any]] = {
    "env": {"name": "synthetic", "tasks": [0, 1], "models_per_process": 2},
    "model": {"path": "tiny", "lora": {"rank": 8}},
    "training": {"lr": 1e-4},
    "run": {"seed": 3, "iterations": 5},
}


def settings_with(**changes: Mapping[str, Any]) -> Settings:
    return Settings.from_dict(
        GIVEN | {section: GIVEN.get(section, {}) | dict(keys) for section, keys in changes.items()}
    )


def write_facts(directory: Path, settings: Settings) -> None:
    models = model_fingerprints(settings)
    CheckpointStore.write_facts(
        directory, iteration=2, policy_version=3, settings=settings.to_dict(), models=models, algorithm={}
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of a run of `GIVEN`, with what depends on the machine filled in, as a run has it."""
    settings = settings_with(env={"num_processes": 1}, model={"path": "/elsewhere/" + fingerprint("tiny")})
    write_facts(tmp_path, settings)
    return tmp_path


def test_the_config_as_it_was_goes_on(checkpoint: Path) -> None:
    check_resume(checkpoint, settings_with())
    check_resume_from(checkpoint, settings_with())


@pytest.mark.parametrize(
    "limits",
    [{"iterations": 9}, {"checkpoint_every": 1}, {"keep_checkpoints": 7}, {"max_restarts": 0}, {"dashboard": False}],
)
def test_limits_of_a_run_may_be_edited(checkpoint: Path, limits: dict[str, Any]) -> None:
    check_resume(checkpoint, settings_with(run=limits))


def test_actors_may_lie_elsewhere(checkpoint: Path) -> None:
    check_resume(checkpoint, settings_with(placement={"strategy": "SPREAD", "runners": {"resources": {"farm": 1}}}))


def test_weights_may_travel_another_way(checkpoint: Path) -> None:
    check_resume(checkpoint, settings_with(weights={"transport": "object_store"}))


@pytest.mark.parametrize(
    ("section", "keys", "said"),
    [
        ("run", {"seed": 4}, "run.seed: 4 in config.yaml, but the run was made with 3"),
        ("training", {"lr": 1e-3}, "training.lr: 0.001 in config.yaml, but the run was made with 0.0001"),
        ("env", {"tasks": [2]}, r"env.tasks: \[2\] in config.yaml, but the run was made with \[0, 1\]"),
        ("env", {"num_processes": 2}, "env.num_processes: 2"),
        ("model", {"path": "mini"}, "model.path: 'mini'"),
        ("learners", {"num": 2}, "learners.num: 2"),
    ],
)
def test_a_resume_is_refused_by_the_key_that_was_edited(
    checkpoint: Path, section: str, keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingsError, match=said) as error:
        check_resume(checkpoint, settings_with(**{section: keys}))
    assert "--resume-from" in str(error.value) and "\n" not in str(error.value)


def test_a_new_run_may_change_all_but_what_the_weights_fit_together_with(checkpoint: Path) -> None:
    changes = {
        "training": {"lr": 0.0, "clip_high": 0.5, "minibatch_size": 8},
        "run": {"seed": 9},
        "env": {"tasks": [3]},
        "learners": {"num": 2},
    }
    check_resume_from(checkpoint, settings_with(**changes, model={"center_crop": False}))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"path": "small"}, "model.path: 'small', but the weights of .* were trained with '/elsewhere/tiny-"),
        ({"lora": {"rank": 4}}, "model.lora.rank: 4, but the weights of .* were trained with 8"),
        ({"lora": {"rank": 8, "targets": ["q_proj"]}}, "model.lora.targets"),
        ({"lora": None}, "model.lora.rank: None"),
        ({"critic": "separate"}, "model.critic: 'separate', but the weights of .* were trained with 'shared_head'"),
    ],
)
def test_another_model_is_refused_by_name(checkpoint: Path, model: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        check_resume_from(checkpoint, settings_with(model=model))


def test_a_model_is_known_by_its_content(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "openvla"}')
    weights = model / "model.safetensors"
    weights.write_bytes(bytes(1000))
    settings = settings_with(model={"path": str(model)})
    place = tmp_path / "checkpoint"
    place.mkdir()
    write_facts(place, settings)
    moved = tmp_path / "moved"
    shutil.copytree(model, moved)
    check_resume(place, settings_with(model={"path": str(moved)}))  # the same, elsewhere
    weights.write_bytes(bytes(999) + b"1")
    with pytest.raises(
        SettingsError,
        match=r"model.path: '.*model as it is now', but the weights of checkpoint were trained with '.* as it "
        r"was then'",
    ):
        check_resume_from(place, settings)


def test_a_warm_up_that_would_be_over_is_refused(checkpoint: Path) -> None:
    check_resume_from(checkpoint, settings_with(training={"critic_warmup_iterations": 4}))
    with pytest.raises(
        SettingsError, match=r"critic_warmup_iterations: 1 would be over, .* behind iteration 2; set it to 3 for 1 more"
    ):
        check_resume_from(checkpoint, settings_with(training={"critic_warmup_iterations": 1}))
