"""Collecting demonstrations: what is kept, in which order, and what is told where the expert fails."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest

if importlib.util.find_spec("tensorflow_datasets") is None:
    pytest.skip("RLDS data need the `data` extra", allow_module_level=True)

from vlarl_rllib.data import RLDSDataset
from vlarl_rllib.data.collect import CollectRequest, collect, play, starts
from vlarl_rllib.data.experts import make_expert
from vlarl_rllib.envs.registry import training_and_held_out_states
from vlarl_rllib.envs.tabletop import POSITION_STEP
from vlarl_rllib.models.openvla.family import FAMILY as OPENVLA
from vlarl_rllib.types import EnvSpec, Start

SPEC = EnvSpec(name="synthetic", image_size=28, max_steps=6)


def test_successes_are_kept_in_an_order_that_does_not_depend_on_the_processes(tmp_path: Path) -> None:
    told = []
    request = CollectRequest(
        SPEC, family=OPENVLA, tasks=(0, 2), episodes=6, out=tmp_path / "two", noise=0.25, seed=3, num_processes=2
    )
    path = collect(request, lambda kept, played: told.append((kept, played)))
    assert told[-1][0] == 6 and [played for _, played in told] == list(range(1, len(told) + 1))
    data = RLDSDataset(path)
    assert data.num_episodes == 6
    expected = list(islice((demo for start in starts(request) if (demo := play(SPEC, start, 0.25, (1.0,)))), 6))
    np.testing.assert_allclose(
        data.actions[:, :6], np.concatenate([demo.actions[:, :6] for demo in expected]), atol=1e-6
    )
    assert {data[i]["instruction"] for i in range(len(data))} == {"point at the red square", "point at the blue square"}


def test_held_out_starts_are_never_played_and_tasks_take_turns() -> None:
    request = CollectRequest(SPEC, family=OPENVLA, tasks=(1, 3), episodes=100, out=Path("unused"))
    chosen = list(starts(request))
    assert [start.task_id for start in chosen[:4]] == [1, 3, 1, 3]
    held_out = set(training_and_held_out_states(SPEC, 1)[1])
    assert not held_out & {start.initial_state for start in chosen}
    assert len({start.seed for start in chosen}) == len(chosen) == 500


def test_an_expert_that_fails_is_told(tmp_path: Path) -> None:
    hopeless = CollectRequest(SPEC, family=OPENVLA, tasks=(0,), episodes=2, out=tmp_path, noise=50.0)
    with pytest.raises(RuntimeError, match=r"the expert succeeded in \d of 10 episodes of synthetic; lower the noise"):
        collect(hopeless)
    many = CollectRequest(SPEC, family=OPENVLA, tasks=(0,), episodes=100, out=tmp_path / "many", noise=50.0)
    with pytest.raises(RuntimeError, match=r"in \d of 40 episodes"):  # not 500
        collect(many)
    with pytest.raises(ValueError, match="libero has no scripted expert; synthetic, tabletop have"):
        make_expert("libero")


def test_the_tabletops_expert_is_noisy_and_nearly_always_kept() -> None:
    request = CollectRequest(
        EnvSpec(name="tabletop", image_size=28),
        family=OPENVLA,
        tasks=tuple(range(18)),
        episodes=24,
        out=Path("unused"),
        noise=0.2,
    )
    played = [
        play(request.spec, start, request.noise, request.paces) for start in islice(starts(request), request.episodes)
    ]
    kept = [demonstration for demonstration in played if demonstration is not None]
    assert len(kept) >= 18
    assert len({demonstration.instruction for demonstration in kept}) >= 14


def test_with_noise_the_experts_own_action_is_recorded_and_a_slow_pace_takes_more_steps() -> None:
    spec = EnvSpec(name="tabletop", image_size=28, max_steps=80)
    start = next(starts(CollectRequest(spec, family=OPENVLA, tasks=(3,), episodes=1, out=Path("unused"), seed=1)))
    noisy, fast = play(spec, start, 0.2, (1.0,)), play(spec, start, 0.0, (1.0,))
    assert noisy is not None and fast is not None
    assert set(np.unique(noisy.actions[:, :3] * 4 % 1)) == {0.0}  # quarters: the expert's, without the noise
    assert fast.states is not None and fast.states.shape == (len(fast.actions), 8)
    # Where the gripper is moves as the actions say: the first, at most a quarter of a full one off.
    moved = (fast.states[1] - fast.states[0])[:3] / POSITION_STEP
    assert np.abs(moved - fast.actions[0, :3]).max() < 0.25 and np.abs(fast.actions[0, :3]).max() > 0.5
    np.testing.assert_allclose(fast.states[:, 3:6], np.tile([np.pi, 0.0, 0.0], (len(fast.states), 1)), atol=0.05)
    slow = [
        demo for seed in range(4) if (demo := play(spec, Start(3, start.initial_state, seed), 0.0, (0.25,))) is not None
    ]
    assert np.mean([len(demo.actions) for demo in slow]) > len(fast.actions)


FOREIGN_PACKAGE = """
from vlarl_rllib.data.experts import SyntheticExpert
from vlarl_rllib.envs.synthetic import SyntheticEnv

class DrawerEnv(SyntheticEnv):
    INSTRUCTIONS = ("open the drawer", "close the drawer", "leave the drawer alone")
"""


def test_an_installed_package_adds_an_environment_and_its_expert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    (site / "my_robots-1.0.dist-info").mkdir(parents=True)
    (site / "my_robots-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: my-robots\nVersion: 1.0\n")
    (site / "my_robots-1.0.dist-info" / "entry_points.txt").write_text(
        "[vlarl_rllib.environments]\ndrawer = my_robots:DrawerEnv\nlost = their_robots:Env\n"
        "[vlarl_rllib.experts]\ndrawer = my_robots:SyntheticExpert\n"
    )
    (site / "my_robots.py").write_text(FOREIGN_PACKAGE)
    monkeypatch.setenv("PYTHONPATH", str(site))

    def vlarl(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "vlarl_rllib", *arguments], capture_output=True, text=True)

    config = tmp_path / "config.yaml"
    config.write_text(
        "{env: {name: drawer, tasks: [1], num_processes: 1}, collect: {episodes: 6, tasks: all, image_size: 40}}"
    )
    done = vlarl("collect", str(config), "--out", str(tmp_path / "data"))
    assert done.returncode == 0, done.stderr
    data = RLDSDataset(tmp_path / "data" / "drawer")
    assert data[0]["image"].shape == (40, 40, 3)
    assert {data[i]["instruction"] for i in range(len(data))} == {
        "open the drawer",
        "close the drawer",
        "leave the drawer alone",
    }

    for override, message in (
        ("env.name=drawr", "env.name: 'drawr' is not allowed: choose one of drawer, lost, libero, tabletop, synthetic"),
        ("env.name=lost", "env.name is 'lost', but their_robots cannot be imported"),
        ("collect.tasks=[3]", "collect.tasks: 3 is not a task of drawer, whose tasks are 0 to 2"),
    ):
        refused = vlarl("collect", str(config), "--out", str(tmp_path / "more"), "--set", override)
        assert refused.returncode == 2 and message in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_workers_that_still_import_end_quietly_with_their_parent(tmp_path: Path, ending: signal.Signals) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("{env: {name: synthetic, tasks: [0], num_processes: 2}, collect: {episodes: 100000}}")
    command = [sys.executable, "-m", "vlarl_rllib", "collect", str(config), "--out", str(tmp_path / "data")]
    parent = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    workers: list[psutil.Process] = []
    try:
        while len(workers) < 2:
            assert parent.poll() is None, parent.communicate()[0]
            workers = [
                child for child in psutil.Process(parent.pid).children() if "spawn_main" in " ".join(child.cmdline())
            ]
            time.sleep(0.01)
        if ending == signal.SIGINT:
            os.killpg(parent.pid, ending)  # a terminal sends it to the whole group
        else:
            parent.send_signal(ending)
        output, _ = parent.communicate(timeout=60)
    finally:
        parent.kill()  # it would collect on, beside all other tests
    assert parent.returncode == (130 if ending == signal.SIGINT else -ending), output
    assert "Traceback" not in output
    assert psutil.wait_procs(workers, timeout=30)[1] == []
