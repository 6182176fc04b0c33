"""A long run under random kills: every part dies again and again, and the run goes on as if it had not.

VLARL_CHAOS_KILLS (50, and 10 where sampling runs ahead) kills with seed VLARL_CHAOS_SEED (drawn and printed), one after
the other has been mended. Prints the seconds from each kill to the end of the first iteration that knows of it.
"""

import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from vlarl_rllib.rewards.classifier import ClassifierConfig, SuccessClassifier

KILLS = os.environ.get("VLARL_CHAOS_KILLS")
NUM_KILLS = {"sync": 50, "async": 10}
SEED = int(os.environ.get("VLARL_CHAOS_SEED", str(random.SystemRandom().randrange(10**6))))
CHECKPOINT_EVERY = 3
STEPS = 2 * 2 * 24
"""Of an iteration of all runners."""
PATIENCE_SECONDS = 300.0
CONFIG = """
env: {{name: synthetic, tasks: [0, 1], num_envs: 2, num_processes: 2, max_steps: 10}}
rollout: {{num_runners: 2, steps_per_iteration: 24, async_mode: {ahead}}}
learners: {{num: 2, micro_batch_size: 32, timeout_seconds: 60}}
training: {{minibatch_size: 48, lr: 1.0e-5, old_log_probs: {old_log_probs}}}
rewards: {{process: 0.1, judge: "{judge}"}}
evaluation: {{episodes: 0}}
run: {{iterations: 100000, max_restarts: 50, checkpoint_every: {checkpoint_every}, seed: 3, dashboard: false}}
"""
COUNTED_AS: dict[str, tuple[str, ...]] = {
    "environment": ("env_deaths",),
    "runner": ("runner_restarts",),
    "engine": ("engine_restarts",),
    "reward worker": ("reward_worker_restarts",),
    "learner": ("learner_restarts", "trial_restarts"),  # the second where they are lost twice in one iteration
    "frozen learner": ("learner_restarts", "trial_restarts"),
    "trial": ("trial_restarts",),
    "driver": (),
}
"""What may die, and the faults that it is counted as; a killed driver counts nothing any more."""
WEIGHTS = {
    "environment": 3,
    "runner": 3,
    "engine": 3,
    "reward worker": 2,
    "learner": 3,
    "frozen learner": 1,
    "trial": 2,
    "driver": 2,
}
COSTS_EPISODES_ONLY = ("environment", "runner", "engine", "reward worker")


class Run:
    """`vlarl train`, and what it leaves in its directory."""

    def __init__(self, root: Path, mode: str) -> None:
        self.root, self.path, self.mode = root, root / "run", mode
        SuccessClassifier(ClassifierConfig(28, ("reach", "push"))).save(root / "judge")
        ahead = mode == "async"
        config = CONFIG.format(
            judge=root / "judge",
            checkpoint_every=CHECKPOINT_EVERY,
            ahead=str(ahead).lower(),
            old_log_probs="recompute" if ahead else "behaviour",
        )
        (root / "config.yaml").write_text(config)
        self.output = (root / "output.txt").open("w")
        self.seen: list[dict[str, Any]] = []
        """Every row in the order it was written, those that were played again too."""
        self._lines: set[str] = set()
        self.start(str(root / "config.yaml"), "--run-dir", str(self.path))

    def start(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "vlarl_rllib", "train", *arguments]
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "VLARL_TEST_SESSION": str(os.getpid())}
        environment.pop("RAY_ADDRESS", None)
        self.process = subprocess.Popen(command, stdout=self.output, stderr=subprocess.STDOUT, env=environment)

    def new_rows(self) -> list[dict[str, Any]]:
        """Rows written since the last call.

        An iteration that was played again has other times, so no two rows are alike.
        """
        file = self.path / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        new = [json.loads(line) for line in lines if line not in self._lines]
        self._lines.update(lines)
        self.seen += new
        return new

    def wait_for(self, what: str, *, faults: tuple[str, ...] = (), above: int = -1) -> list[dict[str, Any]]:
        """New rows up to one that counts more than `above` of these faults."""
        rows: list[dict[str, Any]] = []
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            rows += self.new_rows()
            if rows and count(rows[-1], faults) > above:
                return rows
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        tail = "\n".join((self.root / "output.txt").read_text().splitlines()[-15:])
        pytest.fail(f"after {what} (seed {SEED}): exit code {self.process.poll()}, rows {len(rows)}\n{tail}")

    def pick(self, kind: str, rng: random.Random) -> int | None:
        """A live process of that kind."""
        if kind == "driver":
            return self.process.pid
        roles = json.loads((self.path / "processes.json").read_text())
        pids = {
            "environment": [pid for runner in roles["runners"].values() for pid in runner["environments"]],
            "runner": [runner["runner"] for runner in roles["runners"].values()],
            "engine": roles["engines"],
            "reward worker": [roles["reward_worker"]],
            "learner": roles["learners"],
            "frozen learner": roles["learners"],
            "trial": [roles["algorithm"]],
        }[kind]
        alive = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
        return rng.choice(alive) if alive else None


def count(row: dict[str, Any], faults: tuple[str, ...]) -> int:
    return sum(row["faults"][fault] for fault in faults)


def check_cost(kind: str, before: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """A kill costs unfinished episodes, or where it is a learner's or the driver's, at most the iterations since the
    checkpoint."""
    for previous, row in itertools.pairwise([before, *rows]):
        assert row["logprob_gap_max"] < 1e-4, f"{kind}: sampled with other weights than the learner's: {row}"
        assert row["staleness_max"] <= 1, f"{kind}: learned from a policy that is too old: {row}"
        assert row["policy_version"] > previous["policy_version"], (
            f"{kind}: {previous['policy_version']} -> {row['policy_version']}"
        )
        lost = previous["iteration"] + 1 - row["iteration"]
        assert 0 <= lost <= (0 if kind in COSTS_EPISODES_ONLY else CHECKPOINT_EVERY), f"{kind}: {lost} iterations lost"


def check_repeats(rows: list[dict[str, Any]]) -> int:
    """What was played again since the same checkpoint took the same actions, unless an episode was lost on the way;
    returns how many."""
    disturbances = ("env_deaths", "runner_restarts", "dropped_steps")
    played: dict[int, list[float]] = defaultdict(list)
    env_steps = {0: 0}
    quiet_since = -1
    for previous, row in itertools.pairwise(rows):
        env_steps[previous["iteration"]] = previous["env_steps"]
        if row["iteration"] != previous["iteration"] + 1 or previous["iteration"] % CHECKPOINT_EVERY == 0:
            quiet_since = count(previous, disturbances)
        if count(row, disturbances) == quiet_since and row["env_steps"] - env_steps[row["iteration"] - 1] == STEPS:
            played[row["iteration"]].append(row["token_checksum"])
    for iteration, checksums in played.items():
        assert len(set(checksums)) == 1, f"iteration {iteration} took other actions when it was played again"
    return sum(len(checksums) - 1 for checksums in played.values())


@pytest.fixture(params=NUM_KILLS)
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Run]:
    run = Run(tmp_path, request.param)
    yield run
    run.process.kill()


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_run_under_random_kills(run: Run) -> None:
    num_kills = int(KILLS or NUM_KILLS[run.mode])
    print(f"\n{num_kills} kills, {run.mode}, seed {SEED}, {run.root}")
    rng = random.Random(SEED)
    seconds: dict[str, list[float]] = defaultdict(list)
    iteration_seconds: list[float] = []
    run.wait_for("the start")
    while sum(map(len, seconds.values())) < num_kills:
        began = time.monotonic()
        rows = run.wait_for("a quiet iteration")
        iteration_seconds.append((time.monotonic() - began) / len(rows))
        time.sleep(rng.uniform(0, 1.5 * iteration_seconds[-1]))
        rows += run.new_rows()
        kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        if (pid := run.pick(kind, rng)) is None:
            continue
        before = rows[-1]
        os.kill(pid, signal.SIGSTOP if kind == "frozen learner" else signal.SIGKILL)
        killed = time.monotonic()
        if kind == "driver":
            run.process.wait()
            before = ([before, *run.new_rows()])[-1]
            run.start("--resume", "--run-dir", str(run.path))
        new = run.wait_for(
            f"the kill of {kind} {pid}",
            faults=COUNTED_AS[kind],
            above=count(before, COUNTED_AS[kind]) if COUNTED_AS[kind] else -1,
        )
        seconds[kind].append(time.monotonic() - killed)
        check_cost(kind, before, new)
        print(
            f"{sum(map(len, seconds.values())):3} {kind:15} {seconds[kind][-1]:6.1f} s, then iteration "
            f"{new[-1]['iteration']}",
            flush=True,
        )

    run.process.terminate()
    assert run.process.wait(120) == 0, (run.root / "output.txt").read_text()[-2000:]
    run.new_rows()
    if run.mode == "sync":
        print(f"\n{check_repeats(run.seen)} of {len(run.seen)} iterations were played again with the same actions")
    else:
        print(f"\n{len(run.seen)} iterations, at most {max(row['staleness_max'] for row in run.seen)} update(s) behind")
    print(f"median quiet iteration {statistics.median(iteration_seconds):.1f} s")
    print(f"{'killed':15} {'times':>5} {'median':>8} {'longest':>8}")
    for kind, values in seconds.items():
        print(f"{kind:15} {len(values):5} {statistics.median(values):6.1f} s {max(values):6.1f} s")
    print("faults:", json.loads((run.path / "summary.json").read_text())["faults"])
    for checkpoint in (run.path / "checkpoints").iterdir():
        assert not checkpoint.name.startswith("."), f"{checkpoint.name} was left"
