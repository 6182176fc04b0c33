"""The process reward with a real reward worker: what it adds up to, and what a worker that dies, raises, hangs or lies
costs."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judge_helpers import SIDE, write_untrained_judge

from vlarl_rllib.rewards import ProcessReward, RewardEpisode, WeightedRewards, load_judge, make_rewards, safe_get_reward
from vlarl_rllib.rewards.process import LocalProcessReward, differences
from vlarl_rllib.rewards.worker import RewardService
from vlarl_rllib.settings import Settings

STEPS = 5
RESTART_SECONDS = 60.0
EPISODE = RewardEpisode(
    images=np.random.default_rng(0).integers(0, 256, (STEPS + 1, SIDE, SIDE, 3), dtype=np.uint8),
    tokens=np.full((STEPS, 7), 300),
    durations=np.ones(STEPS, np.int64),
    actions=np.zeros((STEPS, 7)),
    env_rewards=np.zeros(STEPS, np.float32),
    instruction="touch the red square",
    terminated=False,
)


def scripted_worker_class() -> type:
    """A class of this function, so that Ray ships it by value: it does what the instruction says."""
    from vlarl_rllib.rewards.worker import RewardWorker

    class BrokenJudge:
        def score(self, images: Any, instruction: str) -> Any:
            raise RuntimeError("CUDA error: device-side assert triggered")

    class ScriptedWorker(RewardWorker):
        def judge(self, images: Any, instruction: str) -> Any:
            if instruction == "raise":
                raise RuntimeError("CUDA out of memory")
            if instruction == "hang":
                time.sleep(3600)
            if instruction == "break":
                self._judge = BrokenJudge()
            if instruction == "slow":
                time.sleep(1.5)
            scores = super().judge(images, instruction)
            if instruction == "nan":
                scores[2] = float("nan")
            return scores[:-1] if instruction == "short" else scores

    import time

    return ScriptedWorker


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained_judge(tmp_path_factory.mktemp("judge"))


@pytest.fixture(scope="module")
def service(ray_session: None, judge: Path) -> Iterator[RewardService]:
    service = RewardService(
        str(judge), "cpu", actor_options={"num_cpus": 1}, patience_seconds=2.0, worker_class=scripted_worker_class()
    )
    service.wait_until_ready()
    yield service
    service.shutdown()


@pytest.fixture
def rewards(service: RewardService, judge: Path, tmp_path: Path) -> WeightedRewards:
    rewards = WeightedRewards(
        [(2.0, ProcessReward(str(judge), 10.0))], timeout_seconds=10.0, traceback_dir=tmp_path / "reward_errors"
    )
    rewards.attach(service.handle)
    return rewards


def expected(judge: Path, episode: RewardEpisode = EPISODE) -> np.ndarray:
    return 2.0 * np.diff(load_judge(judge).score(episode.images, episode.instruction))


def tracebacks(directory: Path) -> list[str]:
    return [file.read_text() for file in sorted((directory / "reward_errors").glob("reward_process_*.txt"))]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + RESTART_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def serves(service: RewardService, rewards: WeightedRewards) -> Callable[[], bool]:
    """Whether the worker itself answers again, as in the next round of sampling."""

    def condition() -> bool:
        service.ensure_alive()
        rewards.attach(service.handle)
        rewards.failures.clear()
        rewards(EPISODE)
        return not rewards.failures.total()

    return condition


def test_differences_add_up_to_the_last_score_minus_the_first_in_whatever_fragments(
    rewards: WeightedRewards, judge: Path
) -> None:
    scores = load_judge(judge).score(EPISODE.images, EPISODE.instruction)
    whole = rewards(EPISODE)
    assert whole.dtype == np.float32 and np.abs(whole).max() > 0
    np.testing.assert_allclose(whole, 2.0 * np.diff(scores), atol=1e-6)
    parts = [(0, 2), (2, 3), (3, 5)]
    fragments = [
        rewards(
            replace(EPISODE, images=EPISODE.images[a : b + 1], tokens=EPISODE.tokens[a:b], actions=EPISODE.actions[a:b])
        )
        for a, b in parts
    ]
    np.testing.assert_allclose(np.concatenate(fragments), whole, atol=1e-6)
    assert whole.sum() == pytest.approx(2.0 * (scores[-1] - scores[0]), abs=1e-6)
    assert not rewards.failures.total()


@pytest.mark.parametrize(
    ("instruction", "told"),
    [
        ("raise", "CUDA out of memory"),
        ("nan", "a judge's scores lie in [0, 1], got nan"),
        ("short", "a judge's scores of 5 decisions have shape (6,), got (5,)"),
    ],
)
def test_a_worker_that_raises_or_lies_costs_no_reward(
    rewards: WeightedRewards, judge: Path, tmp_path: Path, instruction: str, told: str
) -> None:
    episode = replace(EPISODE, instruction=instruction)
    np.testing.assert_array_equal(rewards(episode), expected(judge, episode).astype(np.float32))
    assert rewards.failures == {"reward_zeros": 0, "reward_cpu_retries": 1}
    (text,) = tracebacks(tmp_path)
    assert told in text and "Traceback" in text and repr(instruction) in text


def test_a_failure_is_called_as_the_worker_called_it(service: RewardService, judge: Path, tmp_path: Path) -> None:
    reward = ProcessReward(str(judge), 5.0)
    reward.attach(service.handle)
    result = safe_get_reward(reward, replace(EPISODE, instruction="raise"), timeout_seconds=5.0, traceback_dir=tmp_path)
    assert (result.source, result.error) == ("cpu_retry", "RuntimeError: CUDA out of memory")


def test_a_killed_worker_costs_no_reward_and_the_restarted_one_serves(
    service: RewardService, rewards: WeightedRewards, judge: Path, tmp_path: Path
) -> None:
    pid, restarts = service.pid, service.num_restarts
    os.kill(pid, signal.SIGKILL)
    np.testing.assert_array_equal(rewards(EPISODE), expected(judge).astype(np.float32))
    assert rewards.failures == {"reward_zeros": 0, "reward_cpu_retries": 1}
    (text,) = tracebacks(tmp_path)
    assert "ActorUnavailableError" in text or "ActorDiedError" in text
    wait_for(serves(service, rewards))
    service.ensure_alive()
    assert service.pid != pid and service.num_restarts == restarts + 1


def test_a_worker_whose_gpu_is_broken_ends_and_the_restarted_one_serves(
    service: RewardService, rewards: WeightedRewards, judge: Path
) -> None:
    service.ensure_alive()
    pid, episode = service.pid, replace(EPISODE, instruction="break")
    np.testing.assert_array_equal(rewards(episode), expected(judge, episode).astype(np.float32))
    assert rewards.failures == {"reward_zeros": 0, "reward_cpu_retries": 1}
    wait_for(serves(service, rewards))
    service.ensure_alive()
    assert service.pid != pid


def test_a_worker_that_hangs_costs_one_time_out_a_round_and_is_replaced(
    service: RewardService, rewards: WeightedRewards, judge: Path, tmp_path: Path
) -> None:
    impatient = WeightedRewards(
        [(2.0, ProcessReward(str(judge), 1.0))], timeout_seconds=1.0, traceback_dir=tmp_path / "reward_errors"
    )
    impatient.attach(service.handle)
    pid = service.pid
    episode = replace(EPISODE, instruction="hang")
    began = time.monotonic()
    for _ in range(5):
        np.testing.assert_array_equal(impatient(episode), expected(judge, episode).astype(np.float32))
    assert time.monotonic() - began < 4.0, "each call waited"
    assert impatient.failures == {"reward_zeros": 0, "reward_cpu_retries": 5}
    first, *others = tracebacks(tmp_path)
    assert (
        "the reward worker gave no answer within 0.9 s" in first
        and len(others) == 4
        and all("was late before" in text for text in others)
    )
    wait_for(serves(service, rewards))
    service.ensure_alive()
    assert service.pid != pid


def test_a_worker_that_is_behind_is_not_frozen(service: RewardService, judge: Path) -> None:
    service.ensure_alive()
    pid = service.pid
    for _ in range(4):  # as many runners, none of which waits
        reward = ProcessReward(str(judge), 0.2)
        reward.attach(service.handle)
        with pytest.raises(TimeoutError, match="no answer within"):
            reward(replace(EPISODE, instruction="slow"))
    began = time.monotonic()
    service.ensure_alive()
    assert time.monotonic() - began < 1.0 and service.pid == pid, "4 calls of 1.5 s, each within its patience"


def test_without_worker_and_without_judge_the_reward_is_zero(judge: Path, tmp_path: Path) -> None:
    directory = write_untrained_judge(tmp_path / "gone")
    rewards = WeightedRewards(
        [(1.0, ProcessReward(str(directory), 5.0))], timeout_seconds=5.0, traceback_dir=tmp_path / "reward_errors"
    )
    (directory / "model.safetensors").unlink()
    assert rewards(EPISODE).tolist() == [0.0] * STEPS
    assert rewards.failures == {"reward_zeros": 1, "reward_cpu_retries": 0}
    texts = tracebacks(tmp_path)
    assert len(texts) == 2 and "no reward worker is attached" in texts[0] and "has no model.safetensors" in texts[1]


def test_a_large_judge_is_copied_where_asked_alone(judge: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava", "vision_config": {}}')
    copied = [
        ProcessReward(str(directory), 5.0, copy).on_cpu() is not None
        for directory in (judge, tmp_path)
        for copy in (None, True, False)
    ]
    assert copied == [True, True, False, False, True, False]


@pytest.mark.parametrize("fails", [False, True])
def test_the_copy_on_the_cpu_is_loaded_once_also_where_that_fails(
    judge: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    loaded = []

    def load(directory: str) -> Any:
        loaded.append(directory)
        if fails:
            raise OSError("the disk is gone")
        return load_judge(directory)

    monkeypatch.setattr("vlarl_rllib.rewards.process.load_judge", load)
    copy = ProcessReward(str(judge), 5.0).on_cpu()
    assert isinstance(copy, LocalProcessReward) and not loaded
    for _ in range(2):
        if fails:
            with pytest.raises(RuntimeError, match="cannot be loaded here: OSError: the disk is gone"):
                copy(EPISODE)
        else:
            copy(EPISODE)
    assert loaded == [str(judge)]


def test_a_worker_whose_judge_cannot_be_loaded_is_told_and_no_actor_is_left(
    ray_session: None, judge: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        RewardService(str(tmp_path / "absent"), "cpu", actor_options={"num_cpus": 1})
    directory = write_untrained_judge(tmp_path / "lost")
    service = RewardService(str(directory), "cpu", actor_options={"num_cpus": 1})
    (directory / "model.safetensors").unlink()  # between the check and the worker's start
    with pytest.raises(RuntimeError, match=r"the reward worker does not start: .*has no model\.safetensors"):
        service.wait_until_ready()


def test_settings_choose_it(judge: Path, tmp_path: Path) -> None:
    chosen = Settings.from_dict({"rewards": {"success": 0.0, "process": 2.0, "judge": str(judge)}}).rewards
    rewards = make_rewards(chosen, range(256, 512), tmp_path)
    np.testing.assert_allclose(rewards(EPISODE), expected(judge), atol=1e-6)  # on the CPU: no worker is attached
    assert rewards.failures["reward_cpu_retries"] == 1


def test_differences_refuse_what_is_no_score() -> None:
    assert differences(np.array([0.25, 1.0, 0.5]), 2).tolist() == [0.75, -0.5]
    for scores, message in (
        ([0.0, 1.5, 0.0], r"lie in \[0, 1\], got 0 to 1.5"),
        ([0.0, float("nan"), 0.0], r"lie in \[0, 1\], got nan to nan"),
        ([0.0, 1.0], r"shape \(3,\), got \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            differences(np.array(scores), 2)
