"""The self-test of the numerics, on numbers made by hand."""

import math
from typing import Any

import pytest

from vlarl_rllib.errors import SelfTestError
from vlarl_rllib.models.family import ActionFormat
from vlarl_rllib.observability.self_test import BFLOAT16, CLIP, FLOAT32, GAP, RATIO, SelfTest, expectation, judge
from vlarl_rllib.settings import Settings

ACTIONS = ActionFormat(num_actions=2, tokens_per_action=7, token_ids=range(256, 512))


def numbers(**changes: float) -> dict[str, float]:
    """What the learners of a float32 run log."""
    good = {
        "first_ratio_deviation": 5e-6, "first_clip_fraction": 0.0, "logprob_gap_mean": 6e-7, "logprob_gap_max": 3e-6,
        "logprob_gap_samples": 64.0, "applied_lr": 1e-5, "optimizer_steps": 4.0, "skipped_updates": 0.0,
    }  # fmt: skip
    return good | changes


def settings(**sections: dict[str, Any]) -> Settings:
    return Settings.from_dict(sections)


BFLOAT = {
    "model": {"dtype": "bfloat16"},
    "engines": {"dtype": "bfloat16"},
    "training": {"old_log_probs": "recompute"},
}


@pytest.mark.parametrize(
    ("sections", "changes", "failed"),
    [
        ({}, {}, ()),
        ({}, {"logprob_gap_mean": 1.01e-4}, (GAP,)),
        ({}, {"logprob_gap_mean": 6e-7, "logprob_gap_max": 1.01e-3}, (GAP,)),
        ({}, {"first_ratio_deviation": 2e-4}, (RATIO,)),
        # the sampler's log-probs below the line: 7 tokens that are 1e-4 off make a ratio of exp(7e-4)
        ({}, {"first_ratio_deviation": 7e-4, "logprob_gap_max": 1e-4}, ()),
        ({"training": {"ratio": "token"}}, {"first_ratio_deviation": 7e-4, "logprob_gap_max": 1e-4}, (RATIO,)),
        (
            {"training": {"ratio": "decision"}},
            {"first_ratio_deviation": 1.4e-3, "logprob_gap_max": 1e-4},
            (),
        ),  # 14 tokens
        (
            {"training": {"old_log_probs": "recompute"}},
            {"first_ratio_deviation": 7e-4, "logprob_gap_max": 1e-4},
            (RATIO,),
        ),
        ({}, {"first_clip_fraction": 0.001}, (CLIP,)),
        ({}, {"logprob_gap_mean": 0.3, "logprob_gap_max": 2.0, "first_ratio_deviation": 9.0}, (GAP,)),
        ({}, {"first_ratio_deviation": math.nan}, (RATIO,)),
        (BFLOAT, {"logprob_gap_mean": 1.5e-2, "logprob_gap_max": 6.8e-2, "first_ratio_deviation": 1.6e-2}, ()),
        (BFLOAT, {"logprob_gap_mean": 0.06, "logprob_gap_max": 0.2}, (GAP,)),
        (BFLOAT, {"first_ratio_deviation": 0.21}, (RATIO,)),
        # half the temperature doubles what rounding does to the logits
        ({"rollout": {"temperature": 0.5}}, {"logprob_gap_mean": 1.9e-4}, ()),
        ({"rollout": {"temperature": 0.5}}, {"logprob_gap_mean": 2.1e-4}, (GAP,)),
    ],
)
def test_each_number_has_a_bound(sections: Any, changes: dict[str, float], failed: tuple[str, ...]) -> None:
    assert judge(numbers(**changes), expectation(settings(**sections), ACTIONS)).failed == failed


def test_bounds_lie_between_what_was_measured_and_what_a_mistake_makes() -> None:
    """A temperature of 1.5 where 1 is meant, on the logits 0 and 3: log-probs 0.1269 and 0.0486 from 0."""
    wrong_temperature = math.log1p(math.exp(-2)) - math.log1p(math.exp(-3))
    assert 6e-7 < FLOAT32.gap_mean < 1e-3 and 1.5e-2 < BFLOAT16.gap_mean < wrong_temperature == pytest.approx(
        0.0783, abs=1e-4
    )


def test_told_at_the_start_and_of_the_first_updated_weights_and_of_what_fails_later() -> None:
    test = SelfTest(expectation(settings(), ACTIONS), warm_up=2)
    told = {iteration: test.take(iteration, numbers()) for iteration in range(1, 6)}
    assert [iteration for iteration, one in told.items() if one] == [1, 4], "iterations 1 and 2 train the critic alone"
    assert told[1]["told"] == (
        "self-test: ratio 1 +- 5.0e-06 (bound 1.2e-04), clipped 0 % (bound 0), log-prob gap mean 6.0e-07, max 3.0e-06 "
        "(bounds 1.0e-04, 1.0e-03): ok"
    )
    assert told[4]["told"].startswith("self-test of updated weights: ")
    later = test.take(6, numbers(logprob_gap_mean=0.2))
    assert later["failed"] == [GAP] and later["told"].startswith("self-test, iteration 6: ")
    assert "FAILED (log-prob gap); the sampler does not have the learner's newest weights" in later["told"]
    assert test.take(7, numbers(logprob_gap_mean=0.2)) == {"failed": [GAP], "told": None}, "counted, and told once"
    assert test.take(8, numbers()) is None


def test_weights_that_no_update_has_changed_are_no_test_of_their_travel() -> None:
    test = SelfTest(expectation(settings(), ACTIONS), warm_up=0)
    assert test.take(1, numbers(applied_lr=0.0)) and test.take(2, numbers(skipped_updates=4.0)) is None
    assert test.take(3, numbers()) is None
    assert test.take(4, numbers())["told"].startswith("self-test of updated weights: ")


@pytest.mark.parametrize(
    ("sections", "changes", "remedy"),
    [
        ({}, {"logprob_gap_mean": 0.2}, "see whether it is gone with engines.num: 0"),
        ({"engines": {"num": 0}}, {"logprob_gap_mean": 0.2}, "same tokens: set weights.checksum: true"),
        (
            {"model": {"dtype": "bfloat16"}, "training": {"old_log_probs": "recompute"}},
            {"logprob_gap_mean": 0.2},
            "set engines.dtype to model.dtype (bfloat16)",
        ),
        ({}, {"first_clip_fraction": 0.01}, "set training.old_log_probs: recompute"),
        ({}, {"first_ratio_deviation": 1.0}, "look for a layer that is random, like dropout"),
        (BFLOAT, {"first_ratio_deviation": 1.0}, "set model.dtype: float32, which tells rounding from a mistake"),
    ],
)
def test_a_failure_says_what_to_do(sections: Any, changes: dict[str, float], remedy: str) -> None:
    test = SelfTest(expectation(settings(**sections), ACTIONS), warm_up=0)
    told = test.take(1, numbers(**changes))["told"]
    assert remedy in told and "\n" not in told


@pytest.mark.parametrize("gap", [1.01, math.nan])
def test_a_gap_with_which_nothing_can_be_learned_ends_the_run(gap: float) -> None:
    test = SelfTest(expectation(settings(), ACTIONS), warm_up=0)
    with pytest.raises(SelfTestError, match=r"^self-test: .*FAILED \(log-prob gap\); sampler and learner disagree"):
        test.take(1, numbers(logprob_gap_mean=gap))
