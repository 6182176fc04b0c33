"""Commands: in this process, or in processes of their own, which tests interrupt, kill and look at from outside."""

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from vlarl_rllib.cli import main
from vlarl_rllib.runs.checkpoints import CheckpointStore

CONFIG = """
env: {name: synthetic, tasks: [0, 1], num_envs: 2, num_processes: 1, models_per_process: 2, max_steps: 8}
rollout: {steps_per_iteration: 16}
engines: {num: 0}
learners: {num: 0, micro_batch_size: 16}
training: {minibatch_size: 16}
evaluation: {episodes: 0}
run: {iterations: 1000, checkpoint_every: 5, dashboard: false}
"""
PATIENCE_SECONDS = 120.0


def run_here(*arguments: object) -> int:
    """The exit code of a `vlarl` in this process, which saves the imports and, where Ray runs already, its start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["vlarl", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


class Command:
    """A `vlarl` of its own session, whose output goes to a file, or to a pipe that the test closes.

    Args:
        root: where the run's directory, `name`, and the output go.
        variables: of the environment, beside this process's.
    """

    def __init__(
        self,
        root: Path,
        command: str,
        *arguments: str,
        name: str = "run",
        stdout: Any = None,
        cwd: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.path, self._output = root / name, root / f"{name}.txt"
        self.began, self.growth = time.monotonic(), list[tuple[float, int]]()
        self.session = f"{os.getpid()}-{root.name}-{name}"
        ours = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONSAFEPATH")}
        environment = {
            **ours,
            "RAY_AUTH_MODE": "disabled",
            "VLARL_TEST_SESSION": self.session,
            **(variables or {}),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vlarl_rllib", command, *arguments],
            stdout=stdout or self._output.open("a"), stderr=subprocess.STDOUT,
            cwd=cwd, env=environment, start_new_session=True,
        )  # fmt: skip

        if stdout is None:
            threading.Thread(target=self._watch_output, daemon=True).start()

    def _watch_output(self) -> None:
        size = 0
        while self.process.poll() is None:
            if (new := self._output.stat().st_size) > size:
                size = new
                self.growth.append((time.monotonic(), size))
            time.sleep(0.1)

    def longest_silence(self, end: str) -> float:
        """Seconds between two pieces of output, from the command's start to the line that holds `end`."""
        until = len(self.output[: self.output.index(end)].encode())
        times = [self.began]
        for when, size in self.growth:
            times.append(when)
            if size > until:
                break
        return max(later - earlier for earlier, later in itertools.pairwise(times))

    @property
    def output(self) -> str:
        return self._output.read_text()

    def rows(self) -> list[dict[str, Any]]:
        file = self.path / "metrics.jsonl"
        return (
            [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
        )

    def wait_until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def end(self, seconds: float = 60.0) -> int:
        """The exit code; fails where that takes longer, or where processes are left."""
        code = self.process.wait(seconds)
        self.leaves_nothing(15)
        return code

    def leaves_nothing(self, seconds: float) -> None:
        """Fails where processes are left after so long."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert left == []

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if (
                    process.status() != psutil.STATUS_ZOMBIE
                    and process.environ().get("VLARL_TEST_SESSION") == self.session
                ):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def child(self, name: str) -> psutil.Process:
        return next(child for child in psutil.Process(self.process.pid).children() if child.name() == name)

    def trial(self) -> int:
        return json.loads((self.path / "processes.json").read_text())["algorithm"]

    def summary(self) -> dict[str, Any]:
        return json.loads((self.path / "summary.json").read_text())

    def newest(self) -> int:
        newest = CheckpointStore(self.path / "checkpoints", 1).newest()
        return CheckpointStore.read_facts(newest)["iteration"] if newest else 0
