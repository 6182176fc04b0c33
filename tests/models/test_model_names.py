"""What names and paths mean, and that they mean the same from everywhere."""

import os
from pathlib import Path
from typing import Any

import pytest

from vlarl_rllib.evaluation.libero_protocol import EvaluationRequest
from vlarl_rllib.models.presets import HUB_MODELS, presets, resolve_model
from vlarl_rllib.runs.directory import RunDirectory
from vlarl_rllib.runs.preflight import check_model
from vlarl_rllib.settings import Settings, SettingsError, known_keys
from vlarl_rllib.settings.published import PRESET_NAMES, absolute_unless_name, is_model_name

PATH_KEYS = ("model.path", "model.critic_path", "model.lora.adapter", "rewards.judge", "sft.data")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that has directories called like a preset, a published name and two owners."""
    for name in ("tiny", "openvla-7b", "openvla/openvla-7b", "someone/model", "plain", "runs/one/model"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs" / "latest").symlink_to("one")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


NAMES = ("tiny", "mini", "openvla-7b", "openvla/openvla-7b", "other/model", "tyni")
PATHS = {
    "./tiny": "tiny",
    "./openvla-7b": "openvla-7b",
    "someone/model": "someone/model",
    "someone/absent": "someone/absent",
    "runs/absent": "runs/absent",
    "runs/latest/model": "runs/one/model",
    "plain": "plain",
    ".": "",
    "..": "..",
    "a/b/c": "a/b/c",
    "~/model": "home/model",
    "~": "home",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_stay(name: str, place: Path) -> None:
    assert is_model_name(name) and absolute_unless_name(name) == name


@pytest.mark.parametrize("path", PATHS)
def test_paths_become_absolute(path: str, place: Path) -> None:
    assert absolute_unless_name(path) == os.path.realpath(place / PATHS[path])


def test_the_presets_are_known_without_their_sizes() -> None:
    assert tuple(presets()) == PRESET_NAMES


def with_key(key: str, value: str) -> dict[str, Any]:
    sections: dict[str, Any] = {"model": {"critic": "separate"}} if key == "model.critic_path" else {}
    if key == "rewards.judge":
        sections["rewards"] = {"process": 1}
    *parents, leaf = key.split(".")
    below = sections
    for parent in parents:
        below = below.setdefault(parent, {})
    below[leaf] = value
    return sections


def value_of(settings: Settings, key: str) -> str:
    value: Any = settings
    for part in key.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("key", PATH_KEYS)
@pytest.mark.parametrize(
    ("typed", "meant"), [("./sub", "sub"), ("~/sub", "home/sub"), ("runs/latest/model", "runs/one/model")]
)
def test_every_path_of_a_run_is_kept_absolute(
    key: str, typed: str, meant: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.from_dict(with_key(key, typed))
    assert value_of(settings, key) == str(place / meant)
    run = RunDirectory(place / "runs" / "new")
    with run.claimed(settings):
        monkeypatch.chdir("/")
        assert run.settings() == settings


def test_no_path_is_forgotten() -> None:
    assert sorted(
        key for key, text in known_keys().items() if text.startswith(("Directory", "Checkpoint,", "Preset"))
    ) == sorted(PATH_KEYS)


def test_a_preset_is_the_preset_everywhere(place: Path) -> None:
    (place / "tiny" / "config.json").write_text("{}")
    check_model("tiny", "libero_spatial")
    assert "tiny-" in Path(resolve_model("tiny", place / "cache")).name
    assert resolve_model("openvla-7b") == HUB_MODELS["openvla-7b"]
    request = EvaluationRequest("tiny", env="synthetic")
    request.check()
    assert request.policy_path == "tiny"
    with pytest.raises(SettingsError, match=r"model_type is None, must be 'openvla'"):
        check_model("./tiny", "libero_spatial")


def test_evaluating_a_directory_asks_for_the_same_from_everywhere(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = EvaluationRequest("plain", env="synthetic").policy_path
    monkeypatch.chdir("runs")
    assert EvaluationRequest("../plain", env="synthetic").policy_path == here == str(place / "plain")
