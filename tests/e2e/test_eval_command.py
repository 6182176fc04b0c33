"""`vlarl eval` as a user meets it: exact counts of a policy whose outcome is known, and going on after every kind of
end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from vlarl_rllib.envs.synthetic import SyntheticEnv
from vlarl_rllib.evaluation import EvaluationRequest, session, workers
from vlarl_rllib.evaluation.output import open_evaluation
from vlarl_rllib.models.family import load_family, read_facts
from vlarl_rllib.models.presets import write_checkpoint
from vlarl_rllib.rollout.evaluation import EvaluationRound
from vlarl_rllib.types import EnvSpec

MAX_STEPS = 6
ROUND_SECONDS = 0.1
"""So that something is left to play when a test ends the evaluation."""
COMMAND = (
    f"from vlarl_rllib.evaluation import session; session.ROUND_SECONDS = {ROUND_SECONDS}; from vlarl_rllib.cli "
    "import main; main()"
)
ACTION_BIN = 130
"""Of every number of the constant action: a little right of and below the centre."""

Outcome = dict[tuple[int, int], tuple[bool, int]]
"""(success, steps) by (task, trial)."""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, np.ndarray]:
    """A checkpoint whose greedy action is always the same, and that action.

    Nothing is added to the residual stream and every token has the same embedding, so the head always sees the same
    vector; it knows one token.
    """
    directory = tmp_path_factory.mktemp("constant")
    write_checkpoint("tiny", directory)
    facts = read_facts(str(directory))
    token = facts.actions.token_ids.stop - ACTION_BIN
    weights = load_file(directory / "model.safetensors")
    for name, tensor in weights.items():
        if name.startswith("language_model.") and name.endswith(
            ("o_proj.weight", "down_proj.weight", "lm_head.weight")
        ):
            tensor.zero_()
        if name.endswith("embed_tokens.weight"):
            tensor.fill_(1.0)
    weights["language_model.lm_head.weight"][token] = torch.ones(())
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    codec = load_family("openvla").codec(facts, facts.action_statistics("libero_spatial"))
    return str(directory), codec.decode(np.full(7, token))[0]


def expected(request: EvaluationRequest, action: np.ndarray) -> Outcome:
    """The same episodes, step by step with the constant action."""
    found: Outcome = {}
    env = SyntheticEnv(EnvSpec(name="synthetic", image_size=28, max_steps=MAX_STEPS))
    for start in request.starts():
        env.reset(seed=start.seed, options={"task_id": start.task_id, "initial_state": start.initial_state})
        for step in range(1, MAX_STEPS + 1):
            _, _, terminated, truncated, info = env.step(action)
            if terminated or truncated:
                found[start.task_id, start.initial_state] = info["success"], step
                break
    assert 0.2 < np.mean([success for success, _ in found.values()]) < 0.8, (
        "an outcome that is always the same tests nothing"
    )
    return found


def episodes(out: Path) -> list[dict[str, Any]]:
    file = out / "episodes.jsonl"
    return (
        [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if file.exists()
        else []
    )


def outcome(out: Path) -> Outcome:
    """What was recorded; no episode twice."""
    rows = episodes(out)
    found = {(row["task"], row["trial"]): (row["success"], row["steps"]) for row in rows}
    assert len(found) == len(rows), "an episode was counted twice"
    return found


class Command:
    """`vlarl eval` in a process of its own, with short rounds."""

    def __init__(self, checkpoint: str, out: Path) -> None:
        self.out = out
        arguments = [
            "eval",
            checkpoint,
            "--env",
            "synthetic",
            "--engine",
            "torch",
            "--tasks",
            "0,2",
            "--trials",
            "40",
            "--max-steps",
            str(MAX_STEPS),
        ]
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "VLARL_TEST_SESSION": self.mark}
        environment.pop("RAY_ADDRESS", None)
        self.before = len(episodes(out))
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments, "--out", str(out)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True,
        )  # fmt: skip

    mark = f"{os.getpid()}-evaluation"

    def wait_for_episodes(self, more: int) -> None:
        deadline = time.monotonic() + 120
        while (
            len(episodes(self.out)) < self.before + more and self.process.poll() is None and time.monotonic() < deadline
        ):
            time.sleep(0.01)
        assert self.process.poll() is None, self.process.communicate()[0]

    def end(self, seconds: float = 120) -> str:
        return self.process.communicate(timeout=seconds)[0]

    def left_behind(self) -> list[str]:
        """Command lines of live processes that it started, a little later.

        Mostly they are gone in 3 s. But an agent of Ray whose raylet got no SIGTERM reports that to the GCS before it
        ends (ray/_private/process_watcher.py), and where the GCS is dead too that waits for Ray's reconnection
        time-out, 60 s.
        """
        deadline = time.monotonic() + 90
        while (found := list(self._alive())) and time.monotonic() < deadline:
            time.sleep(0.2)
        return found

    def _alive(self) -> Iterator[str]:
        for process in psutil.process_iter(["cmdline", "status"]):
            try:
                if (
                    process.info["status"] != psutil.STATUS_ZOMBIE
                    and process.environ().get("VLARL_TEST_SESSION") == self.mark
                ):
                    yield " ".join(process.info["cmdline"])
            except (psutil.AccessDenied, psutil.NoSuchProcess):
                continue


@pytest.mark.timeout(400)
def test_an_evaluation_goes_on_after_ctrl_c_and_a_kill_and_counts_right(
    policy: tuple[str, np.ndarray], tmp_path: Path
) -> None:
    checkpoint, action = policy
    out = tmp_path / "evaluation"

    interrupted = Command(checkpoint, out)
    interrupted.wait_for_episodes(1)
    os.killpg(interrupted.process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    output = interrupted.end()
    assert interrupted.process.returncode == 130, output
    first = episodes(out)
    assert 0 < len(first) < 80 and f"plays the other {80 - len(first)} episodes" in output
    assert f"incomplete: {len(first)} of 80 episodes" in (out / "report.md").read_text()
    assert interrupted.left_behind() == []

    killed = Command(checkpoint, out)
    killed.wait_for_episodes(1)
    killed.process.kill()
    killed.end()
    second = episodes(out)
    assert len(first) < len(second) < 80, "the kill came too late to test anything"
    assert killed.left_behind() == [], "a killed driver left processes"
    with (out / "episodes.jsonl").open("a") as file:
        file.write('{"task": 0, "tr')  # as if it had been killed while it wrote

    last = Command(checkpoint, out)
    output = last.end()
    assert last.process.returncode == 0, output
    assert f"80 episodes, {len(second)} of them played before" in output
    assert episodes(out)[: len(second)] == second and second[: len(first)] == first, "what was finished has changed"
    request = EvaluationRequest(checkpoint, env="synthetic", tasks=(0, 2), trials=40)
    wanted = expected(request, action)
    assert outcome(out) == wanted
    results = json.loads((out / "results.json").read_text())
    assert results["complete"] and results["overall"]["standard"]["successes"] == sum(
        success for success, _ in wanted.values()
    )
    assert sorted(path.name[:17] for path in (out / "videos").iterdir()) == ["task_00_trial_000", "task_02_trial_000"]
    assert last.left_behind() == []


class Killer(session.Watch):
    """Kills one process after the other, each once a few more episodes have been played."""

    def __init__(self, running: list[workers.Workers]) -> None:
        self.running = running
        self.victims = ["environment", "runner", "engine"]
        self.rounds = self.env_deaths = 0
        self.restarts: dict[str, int] = {}

    def keep_going(self, played: EvaluationRound) -> bool:
        self.rounds += 1
        self.env_deaths += played.env_deaths
        if self.victims and played.results:
            os.kill(self.pid(self.victims.pop(0)), signal.SIGKILL)
        return True

    def pid(self, victim: str) -> int:
        (found,) = self.running
        runner = found.calls._runner_pids[1]
        if victim == "environment":
            return next(
                child.pid for child in psutil.Process(runner).children() if "vlarl_rllib.envs.worker" in child.cmdline()
            )
        return runner if victim == "runner" else found.pool.pids[0]

    def mended(self, restarts: Any) -> None:
        self.restarts = dict(restarts)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_each_start_is_played_once_though_every_part_dies(
    ray_session: None, policy: tuple[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On real vLLM, with four tasks on two processes of one model each."""
    running: list[workers.Workers] = []
    start_workers = workers.start_workers

    @contextmanager
    def remember(*arguments: Any) -> Iterator[workers.Workers]:
        with start_workers(*arguments) as started:
            running.append(started)
            yield started

    monkeypatch.setattr(workers, "start_workers", remember)
    monkeypatch.setattr(session, "ROUND_SECONDS", 0.3)
    checkpoint, action = policy
    request = EvaluationRequest(
        checkpoint, env="synthetic", trials=25, max_steps=MAX_STEPS, num_envs=3, num_processes=2, videos=0
    )
    killer = Killer(running)
    with open_evaluation(tmp_path / "evaluation", request.question()) as directory:
        result = session._evaluate(request, directory, killer)
    assert (
        killer.victims == []
        and killer.restarts == {"runner_restarts": 1, "engine_restarts": 1}
        and killer.env_deaths >= 1
    )
    assert outcome(directory.path) == expected(request, action)
    assert result.complete and result.standard.episodes == 100 and result.held_out.episodes == 0
