"""What a runner tells of its loop, whose counts begin anew after each call."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

from vlarl_rllib.rollout.contribution import REWARD_FAULTS, Contribution
from vlarl_rllib.rollout.telemetry import RunnerTelemetry
from vlarl_rllib.types import EpisodeResult


class FakeTelemetry:
    """Adds up what a Telemetry would hand to Ray."""

    def __init__(self) -> None:
        self.counts: Counter[Any] = Counter()
        self.values: dict[str, float] = {}
        self._totals: dict[Any, float] = {}

    def watch(self, source: Any) -> None:
        """Nothing: the runner's calls are enough here."""

    def count(self, name: str, **labels: str) -> None:
        self.counts[name, *labels.values()] += 1

    def observe(self, name: str, value: float, **labels: str) -> None:
        self.counts[name, value, *labels.values()] += 1

    def set(self, name: str, value: float) -> None:
        self.values[name] = value

    def total(self, name: str, total: float, **labels: str) -> None:
        key = (name, *labels.values())
        known = self._totals.get(key, 0.0)
        self.counts[key] += total - known if total >= known else total
        self._totals[key] = total


def make_loop() -> Any:
    loop = SimpleNamespace(env_seconds=0.0, sampler_seconds=0.0, env_deaths=0, env_steps=Counter())

    def forget_counts() -> None:
        loop.env_seconds = loop.sampler_seconds = 0.0
        loop.env_deaths = 0

    loop.forget_counts = forget_counts
    return loop


def test_seconds_are_told_once_whenever_the_loop_counts_anew() -> None:
    told, loop = FakeTelemetry(), make_loop()
    runner = RunnerTelemetry(told, loop, num_slots=4)  # type: ignore[arg-type]
    failures = dict.fromkeys(REWARD_FAULTS, 0)
    for seconds in (2.0, 3.0):  # the second time more than the first: nothing looks as if it had begun anew
        loop.env_seconds += seconds
        loop.env_steps[7, "training"] += 5
        sums = runner.take_sums(Contribution(seconds=9.0), dropped=1, failures=failures)
        assert (sums["env_seconds"], sums["rollout_seconds"], sums["dropped_steps"]) == (seconds, 9.0, 1.0)
    assert told.counts["env_busy_seconds",] == 5.0
    assert told.counts["env_steps", "7", "training"] == 10
    assert told.values == {"slots": 4}


def test_episodes_are_told_by_task_and_outcome() -> None:
    told = FakeTelemetry()
    runner = RunnerTelemetry(told, make_loop(), num_slots=1)  # type: ignore[arg-type]
    runner.tell_of([EpisodeResult(3, 0, 12, True, 1.0), EpisodeResult(3, 1, 20, False, 0.0)])
    assert told.counts["episodes", "3", "success"] == told.counts["episodes", "3", "failure"] == 1
    assert told.counts["episode_length_steps", 12, "3"] == told.counts["episode_length_steps", 20, "3"] == 1
