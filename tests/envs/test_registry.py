"""Facts about suites, and the registry, without a simulator."""

import subprocess
import sys

import pytest

from vlarl_rllib.envs import (
    EnvSpec,
    horizon,
    make_env,
    num_initial_states,
    num_tasks,
    split_initial_states,
    task_instructions,
    training_and_held_out_states,
)
from vlarl_rllib.envs.registry import ENVIRONMENTS, num_held_out_states


def test_facts_need_no_simulator() -> None:
    code = (
        "import sys, vlarl_rllib.envs as envs\n"
        "assert 'gymnasium' not in sys.modules and 'numpy' not in sys.modules\n"
        "envs.task_instructions('libero_10'); envs.num_initial_states('libero_10', 3); envs.horizon('libero_10')\n"
        "heavy = {'mujoco', 'robosuite', 'libero', 'torch', 'ray', 'cv2', 'numba'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("suite", "tasks", "steps"),
    [
        ("libero_spatial", 10, 220),
        ("libero_object", 10, 280),
        ("libero_goal", 10, 300),
        ("libero_10", 10, 520),
        ("libero_90", 90, 400),
    ],
)
def test_standard_suites(suite: str, tasks: int, steps: int) -> None:
    assert num_tasks(suite) == tasks
    assert horizon(suite) == steps
    assert {num_initial_states(suite, task) for task in range(0, tasks, 3)} == {50}


def test_instructions_are_liberos() -> None:
    from libero.libero import benchmark

    for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"):
        assert task_instructions(suite) == [task.language for task in benchmark.task_maps[suite].values()]
    assert task_instructions("libero_10")[8] == "put both moka pots on the stove"


def test_unknown_names_list_the_choices() -> None:
    with pytest.raises(ValueError, match="choose one of libero, tabletop, synthetic"):
        make_env(EnvSpec(name="libreo"))
    with pytest.raises(ValueError, match="has no class Missing"):
        make_env(EnvSpec(name="vlarl_rllib.envs.synthetic:Missing"))
    with pytest.raises(ValueError, match="libero_spatial, libero_object"):
        num_tasks("libero_spatia")
    with pytest.raises(ValueError, match="0 to 9"):
        num_initial_states("libero_goal", 10)


def test_the_facts_are_the_classes_own() -> None:
    for name, facts in ENVIRONMENTS.items():
        for suite, tasks in facts.tasks.items():
            assert len(task_instructions(suite, name=name)) == num_tasks(suite, name=name) == tasks
            spec = EnvSpec(name=name, suite=suite)
            assert len(training_and_held_out_states(spec, 0)[1]) == num_held_out_states(spec, 0) == facts.num_held_out


def test_a_class_can_be_named_by_its_module() -> None:
    assert make_env(EnvSpec(name="vlarl_rllib.envs.synthetic:SyntheticEnv")).max_steps == 20


@pytest.mark.parametrize(("count", "held_out"), [(50, 10), (10, 2), (3, 1), (2, 1)])
def test_held_out_starts_are_disjoint_from_training(count: int, held_out: int) -> None:
    training, evaluation = split_initial_states(count)
    assert len(evaluation) == held_out
    assert sorted(training + evaluation) == list(range(count))
    assert not set(training) & set(evaluation)


def test_one_start_cannot_be_divided() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        split_initial_states(1)


def test_starts_of_a_task() -> None:
    training, held_out = training_and_held_out_states(EnvSpec(name="libero", suite="libero_object"), 4)
    assert training == tuple(range(40)) and held_out == tuple(range(40, 50))
