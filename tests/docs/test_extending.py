"""docs/extending.md is a package: its blocks are written to files, put on the import path, and used."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from pages import ROOT, files_of

from vlarl_rllib.data.experts import make_expert
from vlarl_rllib.envs.base import check_observation, check_start, check_step
from vlarl_rllib.envs.registry import make_env, num_tasks, training_and_held_out_states
from vlarl_rllib.envs.vector import SlotProcesses
from vlarl_rllib.models.family import load_family
from vlarl_rllib.process.plugins import added_by_packages
from vlarl_rllib.rewards import RewardEpisode, safe_get_reward
from vlarl_rllib.rewards.weighted import make_reward
from vlarl_rllib.types import EnvSpec

FILES = files_of(ROOT / "docs" / "extending.md")
SPEC = EnvSpec("reach", image_size=28)
INCLUDED = {
    "my_robots/pointer.py": "tests/families/pointer_policy.py",
    "my_robots/weights.py": "tests/weights/object_store_transport.py",
}
"""Longer examples, which have tests of their own."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the package is installed, as pip would leave it."""
    site = tmp_path_factory.mktemp("site")
    for name, text in FILES.items():
        (site / name).parent.mkdir(exist_ok=True)
        (site / name).write_text(text)
    project = tomllib.loads(FILES["pyproject.toml"])["project"]
    information = site / "my_robots-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = [
        line
        for group, names in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in names.items()))
    ]
    (information / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return site


@pytest.fixture
def installed(site: Path) -> Iterator[None]:
    """The package in this process, and in those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        added_by_packages.cache_clear()
        yield
    added_by_packages.cache_clear()


@pytest.mark.parametrize(("name", "source"), INCLUDED.items())
def test_the_long_examples_are_the_tested_files(name: str, source: str) -> None:
    assert FILES[name] == (ROOT / source).read_text(), f"copy {source} into the page"


def test_the_expert_solves_every_task_from_every_start(installed: None) -> None:
    env, expert = make_env(SPEC), make_expert("reach", 1.0)
    for task in range(num_tasks("", name="reach")):
        training, held_out = training_and_held_out_states(SPEC, task)
        assert (len(training), len(held_out)) == (16, 4)
        for start in (*training, *held_out):
            observation, info = env.reset(seed=0, options={"task_id": task, "initial_state": start})
            check_observation(observation, SPEC.image_size, "reset")
            check_start(info, "reset")
            assert ("red", "blue")[task] in info["instruction"]
            steps, over = 0, False
            while not over:
                result = env.step(expert.act(env))
                check_step(result, SPEC.image_size, "step")
                steps, over = steps + 1, result[2] or result[3]
            assert result[2] and result[1] == 1.0 and 2 <= steps <= 10


def test_slots_share_the_environment(installed: None) -> None:
    """Three slots of one task in one process play as each would alone; the horizon cuts the one that stands still."""
    right, still = np.array([1.0, 0, 0, 0, 0, 0, 0]), np.zeros(7)
    processes = SlotProcesses(SPEC, [1, 1, 1], num_processes=1)
    frames: dict[int, list[np.ndarray]] = {0: [], 1: [], 2: []}
    ends = {}
    try:
        for slot in frames:
            processes.send_reset(slot, 1, initial_state=3 if slot < 2 else 4, seed=slot)
        while len(ends) < 3:
            for event in processes.poll(60.0):
                assert event.kind != "error", event
                frames[event.slot].append(event.image.copy())
                if event.kind == "step" and (event.terminated or event.truncated):
                    ends[event.slot] = event.truncated
                else:
                    processes.send_actions(event.slot, np.array([still if event.slot == 2 else right]))
    finally:
        processes.close()
    assert [frame.tolist() for frame in frames[0]] == [frame.tolist() for frame in frames[1]]
    assert ends[2] and len(frames[2]) == 16 and (frames[2][0] == frames[2][15]).all()
    assert (frames[0][0] != frames[2][0]).any() and (frames[0][0] != frames[0][1]).any()


def test_the_reward_scores_an_episode(installed: None, tmp_path: Path) -> None:
    actions = np.zeros((3, 7))
    actions[0, :6], actions[1, 0], actions[2, 6] = 0.5, -0.6, 1.0  # the gripper costs nothing
    episode = RewardEpisode(
        images=np.zeros((3, 28, 28, 3), np.uint8),
        tokens=np.full((2, 14), 100),
        durations=np.array([2, 1]),  # the first decision played two actions
        actions=actions,
        env_rewards=np.array([0.0, 0.0, 1.0], np.float32),
        instruction="move onto the red disc",
        terminated=True,
        gamma=0.5,
    )
    result = safe_get_reward(make_reward("gentle"), episode, timeout_seconds=10.0, traceback_dir=tmp_path / "errors")
    # -(0.25 + 0.5 * 0.36 / 6), and 0
    assert result.source == "ok" and result.value == pytest.approx([-0.28, 0.0])
    assert not (tmp_path / "errors").exists()


def test_the_family_says_what_its_checkpoint_is(installed: None, tmp_path: Path) -> None:
    family = load_family("pointer")
    sys.modules[type(family).__module__].write_checkpoint(tmp_path / "checkpoint")
    facts = family.read_facts(str(tmp_path / "checkpoint"))
    assert (facts.image_size, facts.actions.num_actions, facts.actions.num_tokens) == (28, 3, 21)
    codec = family.codec(facts, facts.action_statistics("pointing"))
    tokens, _ = codec.encode(np.full((1, 3, 7), 0.1))
    assert codec.decode(tokens[0]) == pytest.approx(np.full((3, 7), 0.0625)), "bin 8 of 16 reaches from 0 to 0.125"
    with pytest.raises(ValueError, match="a reply must be 21 action ids"):
        codec.decode(tokens[0][:20])


def test_a_run_uses_all_of_them(site: Path, tmp_path: Path) -> None:
    """The commands of the page, in processes of their own: the checkpoint, two iterations, the export."""
    files = {name: text for name, text in FILES.items() if name == "reach.yaml"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    page = (ROOT / "docs" / "extending.md").read_text()
    (make,) = [line for line in page.splitlines() if line.startswith("python -c ")]
    environment = os.environ | {"PYTHONPATH": str(site), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def run(command: str) -> str:
        assert command in page.splitlines()
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(make)
    run("vlarl train reach.yaml --run-dir runs/reach")
    rows = [json.loads(line) for line in (tmp_path / "runs/reach/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[-1]["policy_version"] == 3 and rows[-1]["sync_bytes"] > 0
    assert rows[-1]["reward_mean"] < 0, "the penalty counts"
    assert rows[-1]["faults"]["reward_zeros"] == 0
    settings = yaml.safe_load((tmp_path / "runs/reach/config.yaml").read_text())
    assert settings["weights"]["transport"] == "ray_objects" and settings["rewards"]["others"] == {"gentle": 0.1}
    run("vlarl export runs/reach exported")
    assert {file.name for file in (tmp_path / "exported").iterdir()} >= {"config.json", "model.safetensors"}
