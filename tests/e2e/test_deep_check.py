"""`vlarl doctor CONFIG --deep` on a small plan."""

import pytest
import yaml
from command_helpers import CONFIG

from vlarl_rllib.commands.deep_check import run_deep_check
from vlarl_rllib.settings import Settings


def test_a_few_decisions_tell_whether_the_sampler_follows_the_learner(
    ray_session: None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_deep_check(Settings.from_dict(yaml.safe_load(CONFIG))) == 0
    out = capfd.readouterr().out
    assert out.count("self-test: ratio 1 +- ") == out.count("self-test of updated weights: ratio 1 +- ") == 1
    assert "so the sampler has the new weights" in out and "FAILED" not in out
