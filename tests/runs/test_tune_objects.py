"""Tune's schedulers as an experiment makes them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from vlarl_rllib import rllib_compat
from vlarl_rllib.rllib_compat import successive_halving
from vlarl_rllib.runs.tune_objects import Clamp, _mutations
from vlarl_rllib.settings.experiment import Distribution


def trial(name: str, done: int) -> Any:
    last = {"training_iteration": done} if done else None
    return SimpleNamespace(trial_id=name, last_result=last, evaluated_params={})


def test_asha_knows_behind_a_restore_what_others_have_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rllib_compat, "trial_path", lambda trial: str(tmp_path / trial.trial_id))
    (tmp_path / "good").mkdir()
    rows = [{"iteration": iteration, "score": 0.9} for iteration in (1, 2)]
    (tmp_path / "good" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def decision(*, restored: bool) -> str:
        asha = successive_halving(
            "score", time_attr="training_iteration", metric="score", mode="max", max_t=8, grace_period=2,
            reduction_factor=2,
        )  # fmt: skip
        if restored:
            asha.on_trial_add(None, trial("good", done=2))
        new = trial("new", done=0)
        asha.on_trial_add(None, new)
        return str(asha.on_trial_result(None, new, {"training_iteration": 2, "score": 0.1}))

    assert decision(restored=False) == TrialScheduler.CONTINUE
    assert decision(restored=True) == TrialScheduler.STOP


def test_a_choice_stays_one_of_its_values() -> None:
    chosen = Distribution("choice", (0.2, 0.28, None))
    assert _mutations(chosen) == [0.2, 0.28, None], "a list, which Tune shifts along"
    config = {"sampled": {"training.vf_clip": None, "training.lr": 5.0}}
    clamp = Clamp({"training.vf_clip": chosen, "training.lr": Distribution("uniform", (0.1, 0.4))})
    assert clamp(config)["sampled"] == {"training.vf_clip": None, "training.lr": 0.4}
