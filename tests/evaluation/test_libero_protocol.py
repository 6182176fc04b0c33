"""The protocol: which episodes there are, what they depend on, and mistakes before anything starts."""

import os
from pathlib import Path
from typing import Any

import pytest

from vlarl_rllib.envs.libero_tasks import HORIZONS
from vlarl_rllib.evaluation import EvaluationRequest
from vlarl_rllib.models.presets import write_checkpoint
from vlarl_rllib.runs.checkpoints import CheckpointStore
from vlarl_rllib.runs.sealing import seal
from vlarl_rllib.settings import SettingsError
from vlarl_rllib.types import Start


def test_the_defaults_are_the_published_protocol() -> None:
    for suite, steps in HORIZONS.items():
        request = EvaluationRequest("openvla-7b", suite=suite)
        starts = request.starts()
        tasks = 90 if suite == "libero_90" else 10
        assert len(starts) == len(set(starts)) == 50 * tasks
        assert {(start.task_id, start.initial_state) for start in starts} == {
            (task, trial) for task in range(tasks) for trial in range(50)
        }
        question = request.question()
        assert (question["max_steps"], question["unnorm_key"], question["center_crop"], question["fast_render"]) == (
            steps,
            suite,
            True,
            False,
        )
        assert request.deviations() == []


def test_the_action_statistics_are_those_the_policy_was_trained_with(tmp_path: Path) -> None:
    assert EvaluationRequest("small", env="tabletop").statistics == "tabletop"
    assert EvaluationRequest("tiny", suite="libero_goal", unnorm_key="libero_10").statistics == "libero_10"
    checkpoint = tmp_path / "run" / "checkpoints" / "iteration_000001"
    checkpoint.mkdir(parents=True)
    settings = {"model": {"path": "tiny", "unnorm_key": "libero_object"}}
    CheckpointStore.write_facts(checkpoint, iteration=1, policy_version=2, settings=settings, models={}, algorithm={})
    seal(checkpoint)
    assert EvaluationRequest(str(tmp_path / "run"), suite="libero_goal").statistics == "libero_object"


def test_an_episodes_seed_is_a_function_of_seed_and_trial() -> None:
    request = EvaluationRequest("tiny", suite="libero_goal", tasks=(2, 5), trials=3)
    seeds = {start.initial_state: start.seed for start in request.starts()}
    assert len(set(seeds.values())) == 3
    assert EvaluationRequest("tiny", suite="libero_goal", tasks=(5,), trials=2).starts() == [
        Start(5, trial, seeds[trial]) for trial in (0, 1)
    ]
    other = EvaluationRequest("tiny", suite="libero_goal", tasks=(5,), trials=3, seed=8)
    assert not {start.seed for start in other.starts()} & set(seeds.values())


def test_held_out_starts_are_the_last_fifth_of_a_tasks_states() -> None:
    held_out = EvaluationRequest("tiny", suite="libero_10").held_out()
    assert held_out == {task: frozenset(range(40, 50)) for task in range(10)}


def test_whatever_differs_from_the_protocol_is_told() -> None:
    request = EvaluationRequest(
        "tiny", suite="libero_goal", tasks=(0,), trials=2, max_steps=5, fast_render=True, center_crop=False
    )
    assert [part.split()[0] for part in request.deviations()] == ["1", "2", "episodes", "fast", "no"]
    assert EvaluationRequest("tiny", suite="libero_goal", max_steps=300).deviations() == []


def test_ten_tasks_fit_two_processes_with_one_model_each() -> None:
    request = EvaluationRequest("tiny", suite="libero_spatial", num_envs=4, num_processes=2)
    settings = request.settings(request.starts())
    assert settings.task_ids == [0, 1] and settings.env.models_per_process == 1
    assert (settings.env.num_envs, settings.env.num_processes) == (4, 2)
    left = [start for start in request.starts() if start.task_id > 7]
    assert request.settings(left).task_ids == [8, 9], "slots begin where there is something left"
    assert request.settings(left[:1]).env.num_envs == 4


def test_slots_are_not_more_than_episodes_by_default() -> None:
    request = EvaluationRequest("tiny", suite="libero_spatial", tasks=(0,), trials=1)
    settings = request.settings(request.starts())
    assert (settings.env.num_envs, settings.env.num_processes) == (1, 1)
    cores = len(os.sched_getaffinity(0))
    request = EvaluationRequest("tiny", suite="libero_spatial")
    assert request.settings(request.starts()).env.num_envs >= min(2, cores)


def test_the_type_follows_the_device() -> None:
    assert EvaluationRequest("tiny").compute_type == "float32"
    assert EvaluationRequest("tiny", gpus=1.0).compute_type == "bfloat16"
    assert EvaluationRequest("tiny", gpus=1.0, dtype="float32").compute_type == "float32"


def test_a_checkpoint_that_is_written_anew_is_another_question(tmp_path: Path) -> None:
    write_checkpoint("tiny", tmp_path)

    def question() -> dict[str, Any]:
        return EvaluationRequest(str(tmp_path), env="synthetic").question()

    before = question()
    assert question() == before and before["checkpoint"] == str(tmp_path)
    write_checkpoint("tiny", tmp_path, seed=1)
    after = question()
    assert {key for key in before if before[key] != after[key]} == {"checkpoint_files"}


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no suite": ({"suite": None}, "--suite: missing; choose one of libero_spatial"),
    "an unknown suite": (
        {"suite": "libero_spatail"},
        "--suite: 'libero_spatail' does not exist, .* did you mean libero_spatial?",
    ),
    "a suite for an environment without": (
        {"env": "synthetic"},
        "--suite: 'libero_goal' means nothing to --env synthetic",
    ),
    "an unknown environment": (
        {"env": "metaworld"},
        "--env: 'metaworld' does not exist, choose one of libero, tabletop, synthetic",
    ),
    "an unknown engine": ({"engine": "vlm"}, "--engine: 'vlm' does not exist, .* did you mean vllm?"),
    "an unknown type": ({"dtype": "float16"}, "--dtype: 'float16' does not exist"),
    "a task out of range": ({"tasks": (3, 10)}, "--tasks: 10 is not a task of libero_goal, whose tasks are 0 to 9"),
    "a negative task": ({"tasks": (-1,)}, "--tasks: -1 is not a task"),
    "a task twice": ({"tasks": (3, 3)}, "--tasks: 3,3 names a task twice"),
    "no task": ({"tasks": ()}, "--tasks: empty"),
    "too many trials": ({"trials": 51}, "--trials: 51 must be between 1 and 50"),
    "no trial": ({"trials": 0}, "--trials: 0 must be between 1 and 50"),
    "no slot": ({"num_envs": 0}, "--num-envs: 0 must be at least 1"),
    "no step": ({"max_steps": 0}, "--max-steps: 0 must be at least 1"),
    "a negative seed": ({"seed": -1}, "--seed: -1 must be at least 0"),
    "negative videos": ({"videos": -1}, "--videos: -1 must be at least 0"),
    "more processes than slots": ({"num_envs": 2, "num_processes": 3}, "--num-processes: 3 is more than --num-envs 2"),
    "a GPU for torch": ({"engine": "torch", "gpus": 1.0}, "--engine: torch samples on the CPU"),
    "no such GPU": ({"gpus": 1.0}, r"--gpus: 1 GPU\(s\) are needed but this machine shows none"),
    "no such checkpoint": ({"checkpoint": "./absent"}, "CHECKPOINT: no such run or directory '/.*/absent'"),
    "a checkpoint without these statistics": (
        {"unnorm_key": "bridge"},
        "--unnorm-key: 'bridge' is not in preset 'tiny'; choose from libero_10",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    options, message = MISTAKES[case]
    with pytest.raises(SettingsError, match=message) as error:
        EvaluationRequest(**{"checkpoint": "tiny", "suite": "libero_goal", "tasks": (0,), **options}).check()
    assert "\n" not in str(error.value)


def test_no_renderer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlarl_rllib.envs import rendering

    def nothing() -> None:
        raise RuntimeError("install libegl1 or libosmesa6")

    monkeypatch.setattr(rendering, "choose_gl_backend", nothing)
    with pytest.raises(SettingsError, match="libero cannot render here: install libegl1"):
        EvaluationRequest("tiny", suite="libero_goal").check()
    EvaluationRequest("tiny", env="synthetic").check()
