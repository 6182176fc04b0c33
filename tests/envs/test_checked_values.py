"""Numbers between policy and simulator are checked: what is not finite never reaches a simulator, what is no frame
never a policy."""

from typing import Any

import numpy as np
import pytest

from vlarl_rllib.data import collect
from vlarl_rllib.data.collect import play
from vlarl_rllib.envs import EnvSpec
from vlarl_rllib.envs.slots import SlotTable
from vlarl_rllib.envs.synthetic import SyntheticEnv
from vlarl_rllib.types import Start

SPEC = EnvSpec(name="synthetic", image_size=32)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.array([np.nan] + [0.0] * 6), "is [nan, 0.0"),
        (np.array([0.0] * 6 + [np.inf]), "inf], must be finite"),
        (np.zeros(6), "has shape (6,)"),
    ],
)
def test_an_action_that_is_not_finite_never_reaches_a_simulator(
    action: np.ndarray, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = SlotTable(SPEC, max_models=1)
    table.reset(3, 1, 0, 0)
    monkeypatch.setattr(SyntheticEnv, "step", lambda self, action: pytest.fail("the simulator was asked"))
    with pytest.raises(ValueError, match=r"^slot 3, task 1: the policy's action") as caught:
        table.play(3, action[None])
    assert message in str(caught.value) and "\n" not in str(caught.value)


ODD_STEPS = {
    "a float image": "an image of float64 [32, 32, 3], must be uint8 [32, 32, 3]",
    "another size": "an image of uint8 [8, 8, 3], must be uint8 [32, 32, 3]",
    "no image": "an image of NoneType",
    "NaN": "the reward nan, must be a finite number",
    "two rewards": "the reward array([0., 0.]), must be a finite number",
    "a text": "terminated = 'no', must be True or False",
    "no success": "info['success'] = None, must be True or False",
    "four things": "tuple, must be (observation, reward, terminated, truncated, info)",
}


@pytest.mark.parametrize("suite", ODD_STEPS)
def test_what_a_registered_environment_returns_is_checked(suite: str) -> None:
    table = SlotTable(EnvSpec(name="probe_env:OddEnv", suite=suite, image_size=32), max_models=1)
    table.reset(0, 2, 0, 0)
    with pytest.raises(ValueError, match=r"^slot 0, task 2: probe_env:OddEnv\.step returned") as caught:
        table.play(0, np.zeros((1, 7)))
    assert ODD_STEPS[suite] in str(caught.value)


@pytest.mark.parametrize(
    ("observation", "info", "message"),
    [
        (
            {"image": np.zeros((32, 32, 3))},
            {"instruction": "push", "task_id": 0, "initial_state": 0},
            "an image of float64",
        ),
        (None, {"instruction": None, "task_id": 0, "initial_state": 0}, "the instruction None, must be a text"),
        (None, {"instruction": "push", "initial_state": 0}, "task_id = None, must be a whole number"),
    ],
)
def test_what_a_reset_returns_is_checked(
    observation: Any, info: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = observation or {"image": np.zeros((32, 32, 3), np.uint8)}
    monkeypatch.setattr(SyntheticEnv, "reset", lambda self, **options: (frame, info))
    with pytest.raises(ValueError, match=r"^slot 0, task 0: synthetic\.reset returned") as caught:
        SlotTable(SPEC, max_models=1).reset(0, 0, 0, 0)
    assert message in str(caught.value)


def test_an_experts_action_that_is_not_finite_is_not_played(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lost:
        def act(self, env: Any) -> np.ndarray:
            return np.full(7, np.nan)

    monkeypatch.setattr(collect, "make_expert", lambda name, pace: Lost())
    monkeypatch.setattr(SyntheticEnv, "step", lambda self, action: pytest.fail("the simulator was asked"))
    with pytest.raises(ValueError, match=r"^synthetic task 1 start 2: the expert's action is \[nan, .*must be finite"):
        play(EnvSpec(name="synthetic", image_size=30), Start(1, 2, 3), 0.0, (1.0,))
