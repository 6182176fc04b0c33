"""Settings that are refused: one line with key, value, rule and remedy."""

from pathlib import Path
from typing import Any

import pytest

from vlarl_rllib.settings import Settings, SettingsError


def settings(**sections: dict[str, Any]) -> Settings:
    return Settings.from_dict(sections)


GROUPS: dict[str, Any] = {"rollout": {"group_size": 4, "episodes_per_iteration": 8}, "training": {"advantages": "rloo"}}

WRONG: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a misspelt key": ({"training": {"gama": 1}}, ("training.gama: unknown key", "did you mean training.gamma?")),
    "a key like no other": (
        {"rewards": {"dense": True}},
        ("rewards.dense: unknown key", "keys of rewards are success"),
    ),
    "a key of another section": ({"model": {"lr": 1e-5}}, ("model.lr: unknown key", "did you mean training.lr?")),
    "a key below a nested section": (
        {"learners": {"fsdp": {"offload": True}}},
        ("learners.fsdp.offload: unknown key", "cpu_offload"),
    ),
    "a misspelt section": ({"modle": {}}, ("modle: unknown key", "did you mean model?")),
    "an unknown section": ({"lr": 3}, ("lr: unknown key", "sections are", "training")),
    "a key below an optional section": (
        {"model": {"lora": {"ranks": 8}}},
        ("model.lora.ranks: unknown key", "did you mean model.lora.rank?"),
    ),
    "quantised without adapters": ({"model": {"quantization": "4bit"}}, ("model.quantization: 4bit", "set model.lora")),
    "quantised and sharded": (
        {"model": {"quantization": "8bit", "lora": {}}, "learners": {"num": 2}},
        ("model.quantization: 8bit", "set learners.num to 1"),
    ),
    "quantised and offloaded": (
        {"model": {"quantization": "8bit", "lora": {}}, "learners": {"gpus": 1, "fsdp": {"cpu_offload": True}}},
        ("model.quantization: 8bit", "cpu_offload to false"),
    ),
    "eight-bit floats on a CPU": (
        {"engines": {"quantization": "fp8"}, "training": {"old_log_probs": "recompute"}},
        ("engines.quantization: fp8", "set engines.gpus"),
    ),
    "eight-bit floats whose log-probs are taken for the learner's": (
        {"engines": {"quantization": "fp8", "gpus": 1}},
        ("engines.quantization: fp8", "set training.old_log_probs to recompute"),
    ),
    "another number of bits": (
        {"model": {"lora": {}, "quantization": "2bit"}},
        ("model.quantization: '2bit'", "'8bit' or '4bit'"),
    ),
    "no task to show": ({"collect": {"tasks": []}}, ("collect.tasks: [] is not allowed", "at least 1 item")),
    "a critic's path without a critic": (
        {"model": {"critic_path": "mini"}},
        ("model.critic_path: 'mini'", "set model.critic to separate"),
    ),
    "an empty section": ({"model": None}, ("model: None", "valid dictionary")),
    "a wrong type": ({"training": {"lr": "fast"}}, ("training.lr: 'fast'", "valid number", "learning rate")),
    "a fraction of a runner": ({"rollout": {"num_runners": 1.5}}, ("rollout.num_runners: 1.5", "valid integer")),
    "out of range": ({"training": {"gamma": 1.5}}, ("training.gamma: 1.5", "less than or equal to 1")),
    "not a number": ({"training": {"lr": float("nan")}}, ("training.lr: nan", "finite")),
    "above vLLM's limit": ({"rollout": {"temperature": 2.5}}, ("rollout.temperature: 2.5", "less than or equal to 2")),
    "a misspelt choice": (
        {"env": {"suite": "libero_spatail"}},
        ("env.suite: 'libero_spatail'", "libero_spatial", "libero_90"),
    ),
    "more tasks than there are": (
        {"env": {"tasks": 11}},
        ("env.tasks: 11 is more than the 10 tasks", "libero_spatial", "null for all"),
    ),
    "a task out of range": ({"env": {"tasks": [10]}}, ("env.tasks: 10", "libero_spatial", "0 to 9")),
    "a task of no environment": ({"env": {"name": "synthetic", "tasks": [4]}}, ("env.tasks: 4", "synthetic", "0 to 3")),
    "a negative task": ({"env": {"tasks": [-1]}}, ("env.tasks.0: -1", "greater than or equal to 0")),
    "a task twice": ({"env": {"tasks": [1, 1]}}, ("env.tasks: [1, 1]", "twice", "list each once")),
    "more tasks than models": (
        {"env": {"tasks": [0, 1, 2]}},
        ("env.tasks: 3 tasks", "hold 2", "raise env.models_per_process"),
    ),
    "more processes than slots": (
        {"env": {"num_processes": 5}},
        ("env.num_processes: 5", "env.num_envs = 4", "at most one"),
    ),
    "a minibatch too large": (
        {"training": {"minibatch_size": 513}},
        ("training.minibatch_size: 513", "512 steps", "rollout.steps_per_iteration"),
    ),
    "a mesh of other size": (
        {"learners": {"num": 2, "fsdp": {"mesh": [2, 2]}}},
        ("learners.fsdp.mesh: [2, 2]", "2 learner(s)", "use [1, -1]"),
    ),
    "a mesh without learners": (
        {"learners": {"fsdp": {"mesh": [-1, -1]}}},
        ("learners.fsdp.mesh: [-1, -1]", "use [1, -1]"),
    ),
    "an unknown transport": (
        {"weights": {"transport": "pigeon"}},
        ("weights.transport: 'pigeon'", "or name a class as module:Class"),
    ),
    "a direct transport without engines": (
        {"engines": {"num": 0}, "learners": {"num": 1}, "weights": {"transport": "nixl"}},
        ("weights.transport: nixl needs engines, and engines.num is 0; set it to 1 or more, or use auto",),
    ),
    "a direct transport without learners of their own": (
        {"learners": {"num": 0}, "weights": {"transport": "nixl"}},
        ("weights.transport: nixl needs learners in actors; set learners.num to 1 or more, or use auto",),
    ),
    "one card's transport on CPUs": (
        {"weights": {"transport": "cuda_ipc"}},
        ("weights.transport: cuda_ipc moves weights within a GPU; set engines.gpus and learners.gpus to shares",),
    ),
    "two dtypes": (
        {"engines": {"dtype": "bfloat16"}},
        ("engines.dtype: bfloat16", "model.dtype float32", "training.old_log_probs to recompute"),
    ),
    "values of engines for a critic that they have not": (
        {"model": {"critic": "separate"}, "training": {"values": "engine"}},
        ("training.values: engine", "model.critic is separate; set that to shared_head, or values to learner"),
    ),
    "values of engines for nobody": (
        {
            "training": {"values": "engine", "advantages": "grpo"},
            "rollout": {"episodes_per_iteration": 4, "group_size": 2},
        },
        ("training.values: engine", "training.advantages is grpo; set values to learner, or advantages to gae"),
    ),
    "values of engines beside a pass over everything": (
        {"training": {"values": "engine", "old_log_probs": "recompute"}},
        ("training.values: engine", "training.old_log_probs recompute", "set that to behaviour, or values to learner"),
    ),
    "GPUs without engines": ({"engines": {"num": 0, "gpus": 1}}, ("engines.gpus: 1", "set engines.num to at least 1")),
    "a budget for nothing": (
        {"learners": {"activation_memory_budget": 0.5}},
        ("learners.activation_memory_budget: 0.5", "set learners.compile: true"),
    ),
    "graphs without GPU": (
        {"learners": {"cuda_graphs": True}},
        ("learners.cuda_graphs: true", "set learners.gpus and learners.num: 1"),
    ),
    "offload without GPU": (
        {"learners": {"fsdp": {"cpu_offload": True}}},
        ("learners.fsdp.cpu_offload: true", "set learners.gpus"),
    ),
    "an evaluation of nothing": (
        {"evaluation": {"every": 2, "episodes": 0}},
        ("evaluation.every: 2", "raise episodes"),
    ),
    "warm-up all the way": (
        {"training": {"critic_warmup_iterations": 10}},
        ("training.critic_warmup_iterations: 10", "less than run.iterations = 10"),
    ),
    "groups of steps": (
        {"rollout": {"group_size": 4}},
        ("rollout.group_size: 4", "rollout.episodes_per_iteration to a multiple of 4"),
    ),
    "half a group": (
        {"rollout": {"group_size": 4, "episodes_per_iteration": 6}},
        ("rollout.group_size: 4", "a multiple of 4"),
    ),
    "a filter without groups": (
        {"rollout": {"filter_groups": True}},
        ("rollout.filter_groups: true", "rollout.group_size to at least 2"),
    ),
    "relative to nobody": (
        {"training": {"advantages": "grpo"}},
        ("training.advantages: grpo", "rollout.group_size to at least 2"),
    ),
    "a critic that nobody asks": (
        {**GROUPS, "model": {"critic": "separate"}},
        ("model.critic: separate", "shared_head"),
    ),
    "warm-up of no critic": (
        {"rollout": GROUPS["rollout"], "training": {"advantages": "rloo", "critic_warmup_iterations": 1}},
        ("training.critic_warmup_iterations: 1", "advantages is rloo"),
    ),
    "values of no critic": (
        {**GROUPS, "rewards": {"value_shaping": 1.0}},
        ("rewards.value_shaping: 1", "a trained critic"),
    ),
    "a process reward without a judge": (
        {"rewards": {"process": 0.5}},
        ("rewards.process: 0.5 needs a judge", "set rewards.judge"),
    ),
    "a judge without a weight": (
        {"rewards": {"judge": "judge"}},
        ("rewards.judge: '/", "/judge'", "rewards.process 0", "set a weight"),
    ),
    "a copy of no judge": (
        {"rewards": {"judge_cpu_copy": True}},
        ("rewards.judge_cpu_copy: True has no effect", "set a weight and a judge"),
    ),
    "GPUs without a judge": (
        {"rewards": {"judge_gpus": 0.5}},
        ("rewards.judge_gpus: 0.5", "no judge", "set rewards.process and rewards.judge"),
    ),
    "a judge without CPUs": (
        {"rewards": {"process": 1, "judge": "judge", "judge_cpus": 0}},
        ("rewards.judge_cpus: 0", "greater than 0"),
    ),
    "CPUs under placement": (
        {"placement": {"runners": {"resources": {"cpu": 2}}}},
        ("placement.runners.resources: cpu", "rollout.cpus_per_runner", "leave cpu out"),
    ),
    "nothing of a resource": (
        {"placement": {"engines": {"resources": {"farm": 0}}}},
        ("placement.engines.resources.farm: 0", "0.0001"),
    ),
    "a resource that is no amount": (
        {"placement": {"engines": {"resources": {"farm": True}}}},
        ("placement.engines.resources.farm: True", "valid number"),
    ),
    "a role that there is not": (
        {"placement": {"runner": {}}},
        ("placement.runner: unknown key", "did you mean placement.runners?"),
    ),
    "another strategy": ({"placement": {"strategy": "spread"}}, ("placement.strategy: 'spread'", "'SPREAD'")),
    "one node with two values of a label": (
        {
            "placement": {
                "strategy": "STRICT_PACK",
                "runners": {"labels": {"zone": "a"}},
                "engines": {"labels": {"zone": "b"}},
            }
        },
        ("placement.strategy: STRICT_PACK", "placement.runners.labels want zone: a", "zone: b", "use PACK"),
    ),
    "a reward that is no number": ({"rewards": {"success": float("inf")}}, ("rewards.success: inf", "finite")),
}


def assert_one_line(message: str, parts: tuple[str, ...]) -> None:
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line_with_key_rule_and_remedy(case: str) -> None:
    values, parts = WRONG[case]
    with pytest.raises(SettingsError) as caught:
        Settings.from_dict(values)
    assert_one_line(str(caught.value), parts)
    assert str(caught.value).startswith(parts[0])


def test_dtypes_may_differ_where_the_gap_is_corrected() -> None:
    assert settings(engines={"dtype": "bfloat16"}, training={"old_log_probs": "recompute"}).engines.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("a: [", ("not valid YAML",)),
        ("- 1", ("holds list", "sections such as `model:`")),
        ("3", ("holds int",)),
        ("false", ("holds bool",)),
        ("[]", ("holds list",)),
        ("run:\n\tseed: 1", ("not valid YAML",)),
    ],
)
def test_a_file_that_holds_no_sections_is_named(tmp_path: Path, content: str, parts: tuple[str, ...]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(content)
    with pytest.raises(SettingsError) as caught:
        Settings.from_yaml(file)
    assert_one_line(str(caught.value), (str(file), *parts))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(SettingsError, match=r"^no/such\.yaml: no such file; give the path of a YAML file"):
        Settings.from_yaml("no/such.yaml")
