"""What fakes of RLlib's EnvRunnerGroup have in common: runners by number, of which some are not healthy."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any


class FakeGroup:
    """`make(index, pid)` makes a runner; process ids count from 1."""

    def __init__(self, num: int, rng: random.Random, make: Callable[[int, int], Any]) -> None:
        self.rng, self._make, self.pids, self.deaths = rng, make, 0, 0
        self.runners = {index: self.new(index) for index in range(1, num + 1)}
        self.healthy = set(self.runners)

    def new(self, index: int) -> Any:
        self.pids += 1
        return self._make(index, self.pids)

    def lose(self, index: int) -> None:
        """It dies, and another one takes its place."""
        self.deaths += 1
        self.healthy.discard(index)
        self.runners[index] = self.new(index)

    def healthy_worker_ids(self) -> list[int]:
        return sorted(self.healthy)

    def num_healthy_remote_workers(self) -> int:
        return len(self.healthy)

    def num_remote_workers(self) -> int:
        return len(self.runners)

    def restore(self) -> None:
        self.healthy = set(self.runners)
