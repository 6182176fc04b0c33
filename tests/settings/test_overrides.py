"""`--set section.key=value`: what it changes, and what is told where it cannot."""

from pathlib import Path

import pytest

from vlarl_rllib.settings import Settings, SettingsError


def overridden(tmp_path: Path, *overrides: str) -> Settings:
    file = tmp_path / "config.yaml"
    file.write_text("training: {lr: 2.0e-5, gamma: 0.9}\n")
    return Settings.from_yaml(file, overrides)


def test_overrides_are_yaml_and_leave_the_rest_alone(tmp_path: Path) -> None:
    result = overridden(
        tmp_path,
        "training.lr=1e-6",
        "env.tasks=[2, 3]",
        "env.fast_render=true",
        "training.vf_clip=null",
        "learners.fsdp.mesh=[-1, 1]",
        "run.wandb=a=b",
    )
    assert (result.training.lr, result.training.gamma, result.training.vf_clip) == (1e-6, 0.9, None)
    assert (result.env.tasks, result.env.fast_render) == ([2, 3], True)
    assert result.learners.fsdp.mesh == (-1, 1)
    assert result.run.wandb == "a=b"


def test_the_last_override_wins(tmp_path: Path) -> None:
    assert overridden(tmp_path, "run.seed=1", "run.seed=2").run.seed == 2


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.lr", ("--set training.lr:", "section.key=value", "training.lr=1e-5")),
        ("=3", ("--set =3:", "section.key=value")),
        ("training.lr=[1", ("--set training.lr=[1:", "not valid YAML")),
        ("training.lr.rate=3", ("--set training.lr.rate=3:", "lr is a value, not a section")),
        ("training.clip_hi=3", ("training.clip_hi: unknown key", "did you mean training.clip_high?")),
        ("training.lr=", ("training.lr: None", "valid number")),
        ("training=3", ("training: 3", "valid dictionary")),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError) as caught:
        overridden(tmp_path, override)
    assert "\n" not in str(caught.value) and all(part in str(caught.value) for part in parts)
