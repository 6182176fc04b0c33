"""What docs/tune.md shows in Python, on a smaller config."""

import re
from pathlib import Path

import pytest

from vlarl_rllib import VLAPPO, VLAPPOConfig
from vlarl_rllib.runs.directory import RunDirectory
from vlarl_rllib.settings import Settings

PAGE = (Path(__file__).parents[2] / "docs" / "tune.md").read_text()
SMALL = {
    "env": {"name": "synthetic", "tasks": [0, 1], "num_envs": 2, "num_processes": 1, "models_per_process": 2},
    "rollout": {"steps_per_iteration": 4},
    "engines": {"num": 0},
    "learners": {"num": 0},
    "training": {"minibatch_size": 8},
    "evaluation": {"episodes": 2, "every": 2},
}
EXPERIMENT, SCRIPT = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.slow
def test_the_script_finds_a_best_trial_and_builds_its_algorithm(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VLAPPOConfig, "from_yaml", lambda path: VLAPPOConfig.from_settings(Settings.from_dict(SMALL)))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(SCRIPT, "tune.md", "exec"), names)
    algorithm = names["algorithm"]
    assert isinstance(algorithm, VLAPPO) and algorithm.iteration == 4
    algorithm.stop()
    trials = [trial for trial in (tmp_path / "runs" / "script").iterdir() if trial.is_dir()]
    assert [len(RunDirectory(trial).read_rows()) for trial in trials] == [4, 4]


def test_an_experiment_is_a_tuner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to `fit`, which test_tune_command.py calls."""
    monkeypatch.setattr("ray.tune.Tuner.fit", lambda tuner: (_ for _ in ()).throw(InterruptedError(tuner)))
    lines = EXPERIMENT.replace("tune_experiments/", f"{Path(__file__).parents[2]}/tune_experiments/")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InterruptedError):
        exec(compile(lines, "tune.md", "exec"), {})
    assert (tmp_path / "runs" / "mine" / "tuner.pkl").is_file()
