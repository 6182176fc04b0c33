"""The directory of an experiment, before Ray starts."""

from pathlib import Path

import pytest
import yaml

from vlarl_rllib.errors import SettingsError
from vlarl_rllib.runs.experiments import new_experiment, open_experiment

EXPERIMENT = {"config": {"env": {"name": "synthetic"}}, "seeds": [0, 1]}


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """As Tune leaves it."""
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    (tmp_path / "tuner.pkl").write_bytes(b"")
    (tmp_path / "experiment_state-2026-01-01_00-00-00.json").write_text("{}")
    return tmp_path


def test_an_experiment_is_opened_and_not_written_over(begun: Path) -> None:
    directory, experiment = open_experiment(begun)
    assert directory == begun and experiment.num_trials == 2
    with pytest.raises(SettingsError, match="holds an experiment already; go on with it by --restore"):
        new_experiment(begun)


def test_one_that_was_killed_before_its_first_trial_starts_again_in_place(begun: Path) -> None:
    next(begun.glob("experiment_state-*.json")).unlink()
    with pytest.raises(SettingsError, match="holds no experiment that was begun"):
        open_experiment(begun)
    assert new_experiment(begun) == begun


def test_a_state_that_a_kill_has_cut_is_passed_over(begun: Path) -> None:
    newest = begun / "experiment_state-2026-01-02_00-00-00.json"
    newest.write_text('{"checkpoints": [')
    open_experiment(begun)
    (older,) = begun.glob("experiment_state-*.json")
    assert older.name == "experiment_state-2026-01-01_00-00-00.json"
    older.write_text("")
    with pytest.raises(SettingsError, match="no whole experiment_state"):
        open_experiment(begun)


def test_somebody_elses_state_is_not_read(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getuid", lambda: 12345)
    with pytest.raises(SettingsError, match="belongs to another user, and reading Tune's state runs what is in it"):
        open_experiment(begun)


def test_a_directory_of_a_run_is_anothers(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(SettingsError, match=r"holds a metrics\.jsonl, which is another's"):
        new_experiment(tmp_path)
