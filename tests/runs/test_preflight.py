"""What is checked, and what is only remarked on, before Ray starts."""

import re
from pathlib import Path
from typing import Any

import pytest

from vlarl_rllib.envs.registry import suites
from vlarl_rllib.runs.doubts import doubts, sft_doubts
from vlarl_rllib.runs.preflight import check, check_model, check_quickstart, check_sft
from vlarl_rllib.settings import Settings, SettingsError, transports


@pytest.mark.parametrize("suite", suites("libero"))
def test_a_preset_has_the_statistics_of_every_suite(suite: str) -> None:
    settings = Settings.from_dict({"env": {"suite": suite}})
    check_model(settings.model.path, settings.unnorm_key)
    assert doubts(settings) == []


@pytest.mark.parametrize(
    ("sections", "remark"),
    [
        (
            {"model": {"unnorm_key": "libero_goal"}, "env": {"suite": "libero_10"}},
            "libero_10 is played with the action statistics of libero_goal",
        ),
        ({"model": {"path": "openvla-7b"}}, "libero_spatial is played with the action statistics of bridge_orig"),
        (
            {"model": {"path": "openvla-7b-finetuned-libero-spatial"}, "env": {"suite": "libero_goal"}},
            "of libero_spatial; set env.suite",
        ),
        ({"model": {"path": "openvla-7b-finetuned-libero-10"}, "env": {"suite": "libero_10"}}, None),
        ({"model": {"unnorm_key": "libero_spatial_no_noops"}}, None),
        ({"model": {"unnorm_key": "libero_goal"}, "env": {"name": "synthetic"}}, None),
    ],
)
def test_another_suites_statistics_are_worth_a_line(sections: dict[str, Any], remark: str | None) -> None:
    found = doubts(Settings.from_dict(sections))
    assert len(found) == (remark is not None)
    assert all(remark in line and "\n" not in line for line in found)


def test_an_adaptive_curriculum_that_misses_failures_is_worth_a_line() -> None:
    (found,) = doubts(Settings.from_dict({"curriculum": {"kind": "adaptive"}}))
    assert (
        found.startswith("curriculum.kind: adaptive counts whole episodes")
        and "set rollout.episodes_per_iteration" in found
    )
    whole = {"curriculum": {"kind": "adaptive"}, "rollout": {"episodes_per_iteration": 2}}
    assert doubts(Settings.from_dict(whole)) == []
    tabletop = {"env": {"name": "tabletop", "tasks": 4, "models_per_process": 4}}
    (found,) = doubts(Settings.from_dict(whole | tabletop))
    assert "each of the 3,200 starts" in found and "set curriculum.starts_per_task" in found
    assert (
        doubts(Settings.from_dict(whole | tabletop | {"curriculum": {"kind": "adaptive", "starts_per_task": 50}})) == []
    )


def test_keys_without_an_effect_are_worth_a_line() -> None:
    idle = {"curriculum": {"rule": "power", "temperature": 0.2}, "training": {"importance_cap": 3}}
    assert doubts(Settings.from_dict(idle | {"rewards": {"malformed": 1}})) == [
        "training.importance_cap has no effect with old_log_probs behaviour",
        "rewards.malformed has no effect with samplers that choose among the action tokens alone",
        "curriculum.rule has no effect with kind fixed",
        "curriculum.temperature has no effect with kind fixed",
    ]
    used = {"rollout": {"episodes_per_iteration": 2}, "curriculum": idle["curriculum"] | {"kind": "adaptive"}}
    assert doubts(Settings.from_dict(used | {"training": idle["training"] | {"old_log_probs": "recompute"}})) == []


@pytest.mark.parametrize(
    ("env", "center_crop", "augment", "remark"),
    [
        ("libero", None, True, None),
        (
            "libero",
            None,
            False,
            "learns from whole frames and will see central crops when it acts in libero; set it and "
            "model.center_crop alike",
        ),
        ("libero", True, True, None),
        ("libero", False, False, None),
        (
            "libero",
            True,
            False,
            "learns from whole frames and will see central crops when it acts in libero; set it and "
            "model.center_crop alike",
        ),
        (
            "libero",
            False,
            True,
            "learns from crops and will see whole frames when it acts in libero; set it and model.center_crop alike",
        ),
        (
            "tabletop",
            True,
            True,
            "learns from crops and will see whole frames when it acts in tabletop; set sft.augment to false",
        ),
        ("tabletop", True, False, None),
    ],
)
@pytest.mark.parametrize("base", ["tiny", "openvla-7b"])  # the latter's own frames are whole
def test_other_pictures_in_learning_than_in_acting_are_worth_a_line(
    env: str, center_crop: bool | None, augment: bool, remark: str | None, base: str
) -> None:
    sections = {"env": {"name": env}, "model": {"path": base, "center_crop": center_crop}, "sft": {"augment": augment}}
    found = sft_doubts(Settings.from_dict(sections))
    assert len(found) == (remark is not None)
    assert all(line.startswith("sft.augment: ") and line.endswith(remark) for line in found)


def test_too_few_episodes_and_a_split_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlarl_rllib.runs.preflight.check_tensorflow_datasets", lambda what: None)
    (tmp_path / "dataset_info.json").write_text('{"splits": [{"name": "train", "shardLengths": ["1", "2"]}]}')
    monkeypatch.setattr("vlarl_rllib.data.rlds.check_metadata", lambda path: None)
    check_sft(Settings.from_dict({"sft": {"data": str(tmp_path), "split": "train[:50%]"}, "learners": {"num": 2}}))
    with pytest.raises(SettingsError, match=r"^sft.split: 'trian' is no split of .*, which has train; choose one"):
        check_sft(Settings.from_dict({"sft": {"data": str(tmp_path), "split": "trian"}}))
    with pytest.raises(SettingsError, match=r"^learners.num: 4 learners cannot share the 3 episode\(s\) of train in "):
        check_sft(Settings.from_dict({"sft": {"data": str(tmp_path)}, "learners": {"num": 4}}))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({}, "sft.data: missing; give the directory of an RLDS data set"),
        ({"sft": {"data": "/absent"}}, "sft.data: /absent: no data set below it"),
        (
            {"sft": {"batch_size": 32}, "learners": {"num": 3}},
            "sft.batch_size: 32 does not divide over 3 learners; use a multiple",
        ),
        ({"model": {"path": "./absent"}}, "model.path: no such directory '/"),
    ],
)
def test_mistakes_before_supervised_fine_tuning(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match="^" + re.escape(message)) as caught:
        check_sft(Settings.from_dict(sections))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"model": {"unnorm_key": "libero_goal"}},
            "model.unnorm_key: 'libero_goal' is not what the demonstrations' statistics will be called; set it to",
        ),
        ({"evaluation": {"episodes": 0}}, "evaluation.episodes: 0 would leave nothing to show"),
        ({"env": {"name": "libero"}}, "env.name: 'libero' has no scripted expert; choose one of synthetic, tabletop"),
        ({"sft": {"batch_size": 32}, "learners": {"num": 3}}, "sft.batch_size: 32 does not divide"),
    ],
)
def test_mistakes_before_a_quickstart(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    settings = Settings.from_dict({"env": {"name": "synthetic"}, "model": {"unnorm_key": "synthetic"}} | sections)
    with pytest.raises(SettingsError, match="^" + re.escape(message)) as caught:
        check_quickstart(settings, tmp_path)
    assert "\n" not in str(caught.value)


def test_an_earlier_quickstart_is_left_alone(tmp_path: Path) -> None:
    settings = Settings.from_dict({"env": {"name": "synthetic"}, "model": {"unnorm_key": "synthetic"}})
    check_quickstart(settings, tmp_path)
    (tmp_path / "demonstrations").mkdir()
    with pytest.raises(SettingsError, match="holds an earlier quickstart; give another directory, or remove it"):
        check_quickstart(settings, tmp_path)


def test_a_transport_that_is_not_installed_is_said_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(transports, "nixl_is_installed", lambda: False)
    settings = Settings.from_dict({"env": {"name": "synthetic"}, "weights": {"transport": "nixl"}})
    with pytest.raises(SettingsError, match=r"weights.transport: nixl needs the package nixl .* or use auto"):
        check(settings)
