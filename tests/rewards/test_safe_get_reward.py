"""A reward may raise, hang, die or return nonsense; the caller gets a number, a count and a file that tells."""

import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from vlarl_rllib.rewards import Reward, RewardEpisode, WeightedRewards, base, safe_get_reward

EPISODE = RewardEpisode(
    images=np.zeros((4, 8, 8, 3), np.uint8),
    tokens=np.full((3, 7), 300),
    durations=np.ones(3, np.int64),
    actions=np.zeros((3, 7)),
    env_rewards=np.array([0.0, 0.0, 1.0], np.float32),
    instruction="push the bowl",
    terminated=True,
)


class Scripted(Reward):
    """Does what it is told."""

    name = "scripted"

    def __init__(self, action, cpu: "Reward | None" = None) -> None:
        super().__init__()
        self.action, self.cpu, self.calls = action, cpu, 0

    def __call__(self, episode: RewardEpisode) -> np.ndarray:
        self.calls += 1
        return self.action(episode)

    def on_cpu(self) -> Reward | None:
        return self.cpu


def raises(error: BaseException):
    def action(episode: RewardEpisode) -> np.ndarray:
        raise error

    return action


def get(reward: Reward, directory: Path, timeout_seconds: float = 5.0):
    return safe_get_reward(reward, EPISODE, timeout_seconds=timeout_seconds, traceback_dir=directory)


def files(directory: Path) -> list[str]:
    return sorted(path.read_text() for path in directory.glob("reward_scripted_*.txt"))


def test_a_reward_that_works_is_passed_on(tmp_path: Path) -> None:
    result = get(Scripted(lambda episode: [1, 2.5, -3]), tmp_path / "errors")
    assert result.value.tolist() == [1.0, 2.5, -3.0] and result.value.dtype == np.float32
    assert (result.source, result.error) == ("ok", None)
    assert not (tmp_path / "errors").exists()


@pytest.mark.parametrize(
    ("action", "error"),
    [
        (
            raises(RuntimeError("CUDA error: an illegal memory access\nsecond line")),
            "RuntimeError: CUDA error: an illegal memory access",
        ),
        (raises(SystemExit(3)), "RuntimeError: SystemExit: 3"),
        (lambda episode: [1.0, float("nan"), 0.0], "ValueError: 1 of 3 rewards are not finite"),
        (lambda episode: 1.0, r"ValueError: a reward of 3 decisions has shape (3,), got ()"),
        (lambda episode: None, "ValueError: a reward of 3 decisions has shape (3,), got ()"),
    ],
    ids=["raises", "exits", "nan", "one number", "nothing"],
)
def test_what_fails_is_zero_and_told(action, error: str, tmp_path: Path) -> None:
    result = get(Scripted(action), tmp_path)
    assert result.value.tolist() == [0.0, 0.0, 0.0] and result.source == "zero"
    assert result.error == error
    (text,) = files(tmp_path)
    assert "reward scripted, 3 decisions, instruction 'push the bowl'" in text and "Traceback" in text


def test_a_failure_is_tried_again_on_the_cpu(tmp_path: Path) -> None:
    result = get(
        Scripted(raises(RuntimeError("CUDA out of memory")), cpu=Scripted(lambda episode: episode.env_rewards)),
        tmp_path,
    )
    assert result.value.tolist() == [0.0, 0.0, 1.0] and result.source == "cpu_retry"
    assert result.error == "RuntimeError: CUDA out of memory" and len(files(tmp_path)) == 1
    both = get(Scripted(raises(RuntimeError("first")), cpu=Scripted(raises(RuntimeError("second")))), tmp_path)
    assert (both.source, both.error) == ("zero", "RuntimeError: first") and len(files(tmp_path)) == 3


def test_one_that_hangs_is_given_up_and_after_some_times_not_called(tmp_path: Path) -> None:
    release = threading.Event()
    reward = Scripted(lambda episode: release.wait(60) and episode.env_rewards)
    began = time.monotonic()
    for _ in range(base.MAX_HUNG_CALLS):
        result = get(reward, tmp_path, timeout_seconds=0.1)
        assert (
            result.source == "zero" and result.error == "TimeoutError: no answer within rewards.timeout_seconds = 0.1"
        )
    assert time.monotonic() - began < 5
    assert (
        "3 earlier calls still hang" in get(reward, tmp_path, timeout_seconds=60).error
        and reward.calls == base.MAX_HUNG_CALLS
    )
    release.set()
    for thread in reward.hung:
        thread.join(5)
    assert get(reward, tmp_path).source == "ok", "called again once it no longer hangs"


def test_tracebacks_have_an_end_and_a_full_disk_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_written", Counter())
    for _ in range(base.MAX_ALIKE + 5):
        assert get(Scripted(raises(RuntimeError("again"))), tmp_path).source == "zero"
    assert len(files(tmp_path)) == base.MAX_ALIKE
    assert get(Scripted(raises(RuntimeError("another one"))), tmp_path).source == "zero"
    assert len(files(tmp_path)) == base.MAX_ALIKE + 1, "what failed before hides nothing"
    for number in range(base.MAX_TRACEBACKS):
        get(Scripted(raises(RuntimeError(f"failure {number}"))), tmp_path)
    assert len(files(tmp_path)) == base.MAX_TRACEBACKS
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(base, "_written", Counter())
    assert get(Scripted(raises(RuntimeError("again"))), tmp_path / "file" / "below").source == "zero"


def test_a_sum_counts_what_failed_and_goes_on(tmp_path: Path) -> None:
    rewards = [
        (2.0, Scripted(lambda episode: episode.env_rewards)),
        (1.0, Scripted(raises(RuntimeError("lost")))),
        (0.5, Scripted(raises(RuntimeError("lost")), cpu=Scripted(lambda episode: np.ones(3)))),
    ]
    total = WeightedRewards(rewards, timeout_seconds=5.0, traceback_dir=tmp_path)
    assert total(EPISODE).tolist() == [0.5, 0.5, 2.5]
    assert total(EPISODE).tolist() == [0.5, 0.5, 2.5]
    assert total.failures == {"reward_zeros": 2, "reward_cpu_retries": 2}


def test_a_weighted_reward_that_is_too_large_to_add_up_is_zero(tmp_path: Path) -> None:
    large = Scripted(lambda episode: np.full(3, 1e20))
    rewards = WeightedRewards(
        [(1e15, large), (1e30, large), (2.0, Scripted(lambda episode: np.ones(3)))],
        timeout_seconds=5.0,
        traceback_dir=tmp_path,
    )
    assert rewards(EPISODE).tolist() == [2.0] * 3
    assert rewards.failures["reward_zeros"] == 2


@pytest.mark.parametrize("value", [np.array([1.0, np.nan, 0.0]), np.array([1.0, np.inf, 0.0]), [1e300] * 3])
def test_a_reward_that_is_not_finite_is_zero_and_counted(tmp_path: Path, value) -> None:
    rewards = WeightedRewards([(1.0, Scripted(lambda episode: value))], timeout_seconds=5.0, traceback_dir=tmp_path)
    assert rewards(EPISODE).tolist() == [0.0] * 3
    assert rewards.failures["reward_zeros"] == 1
