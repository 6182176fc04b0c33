"""Which nodes have places for which actors: on clusters that are written down here. What Ray itself does is in
tests/rollout/test_placement_on_nodes.py."""

from typing import Any

import pytest

from vlarl_rllib.ray_compat import ClusterNode
from vlarl_rllib.runs import places
from vlarl_rllib.runs.places import check_places, lay, named, selects, waits_for_places, without_a_place
from vlarl_rllib.settings import Role, RuntimeArgs, Settings, SettingsError, calculate_runtime_args


def node(
    name: str, labels: dict[str, str] | None = None, free: dict[str, float] | None = None, **total: float
) -> ClusterNode:
    return ClusterNode(name, name, total, dict(total if free is None else free), labels or {})


def plan(**sections: Any) -> RuntimeArgs:
    return calculate_runtime_args(Settings.from_dict({"env": {"name": "synthetic", "num_envs": 8}} | sections), cores=2)


def where(plan: RuntimeArgs, *nodes: ClusterNode) -> dict[Role, list[str]]:
    """The nodes that each role's actors lie on."""
    laid = lay(plan, nodes)
    return {
        role: [
            nodes[number].address
            for bundle, number in zip(plan.bundles, laid, strict=True)
            if bundle.role is role and number is not None
        ]
        for role in Role
    }


def refused(plan: RuntimeArgs, *nodes: ClusterNode) -> str:
    with pytest.raises(SettingsError) as raised:
        check_places(plan, nodes)
    assert "\n" not in str(raised.value)
    return str(raised.value)


GPU_NODE = node("gpu", CPU=32, GPU=8)
CPU_NODE = node("cpu", CPU=64, farm=4)
BF16: dict[str, Any] = {"dtype": "bfloat16"}


# The modes


def test_colocated_engine_and_learner_share_one_gpu() -> None:
    modes = plan(engines={"num": 1, "gpus": 0.4}, learners={"num": 1, "gpus": 0.6})
    check_places(modes, [node("box", CPU=8, GPU=1)])
    assert where(modes, node("box", CPU=8, GPU=1))[Role.ENGINE] == ["box"]


def test_disaggregated_every_engine_and_learner_has_a_gpu() -> None:
    """Four engines and four learners on eight GPUs; not on seven."""
    modes = plan(engines={"num": 4, "gpus": 1}, learners={"num": 4, "gpus": 1, "fsdp": {"mesh": [1, 4]}})
    check_places(modes, [GPU_NODE])
    assert "the plan needs 8 GPU but the Ray cluster has 7" in refused(modes, node("box", CPU=32, GPU=7))


def test_runners_stand_on_nodes_without_gpus_where_they_ask_for_what_those_have() -> None:
    crew: dict[str, Any] = {
        "engines": {"num": 1, "gpus": 0.5},
        "learners": {"num": 1, "gpus": 0.5},
        "rollout": {"num_runners": 4, "cpus_per_runner": 8},
    }
    # PACK alone fills the node of the GPU first: 1 + 1 + 1 CPUs and three runners of 8 are 27 of 32
    assert where(plan(**crew), GPU_NODE, CPU_NODE)[Role.RUNNER] == ["gpu"] * 3 + ["cpu"]
    farmed = plan(**crew, placement={"runners": {"resources": {"farm": 1}}})
    found = where(farmed, GPU_NODE, CPU_NODE)
    assert found[Role.RUNNER] == ["cpu"] * 4
    assert found[Role.ENGINE] == found[Role.LEARNER] == ["gpu"]
    five = plan(**crew | {"rollout": {"num_runners": 5}}, placement={"runners": {"resources": {"farm": 1}}})
    assert refused(five, GPU_NODE, CPU_NODE).startswith(
        "placement: the nodes of the cluster have places for 4 of 5 x runner (1 CPU, farm 1); lower rollout.num_runners"
    )


def test_data_parallel_engines_are_one_for_each_gpu_of_two_nodes() -> None:
    nodes = [node("a", CPU=16, GPU=4), node("b", CPU=16, GPU=4)]
    modes = plan(
        engines={"num": 6, "gpus": 1},
        learners={"num": 2, "gpus": 1, "fsdp": {"mesh": [1, 2]}},
        placement={"strategy": "PACK"},
    )
    check_places(modes, nodes)
    found = where(modes, *nodes)
    assert len(found[Role.ENGINE]) == 6 and len(found[Role.LEARNER]) == 2 and len(set(found[Role.LEARNER])) == 1


# What can never be


def test_totals_are_not_enough() -> None:
    """Two nodes of 4 GPUs have 8, and no engine of 8."""
    wide = plan(engines={"num": 1, "gpus": 8}, learners={"num": 1})
    nodes = [node("10.0.0.1", CPU=8, GPU=4), node("10.0.0.2", CPU=16, GPU=4)]
    assert refused(wide, *nodes) == (
        "placement: no node of the cluster can hold engine (1 CPU, 8 GPU): the largest one, 10.0.0.1, has 8 CPU, "
        "4 GPU; lower engines.cpus or engines.gpus, or add a node (`vlarl doctor --cluster CONFIG` prints what fits "
        "where)"
    )


def test_memory_is_counted_too() -> None:
    needs = plan(placement={"runners": {"resources": {"memory": 64e9}}})
    said = refused(needs, node("a", CPU=8, memory=32e9), node("b", CPU=1, memory=16e9))
    assert "runner (1 CPU, 64 GB of memory)" in said and "largest one, a," in said


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (
            {"resources": {"farm": 1}},
            "none has the resource farm; start one with ray start --resources='{\"farm\": N}'",
        ),
        ({"labels": {"zone": "b"}}, "none has zone=b (its values are a); start one with ray start --labels=zone=..."),
        ({"labels": {"disk": "fast"}}, "none has disk=fast (no node has that label)"),
    ],
)
def test_what_no_node_has_is_named(place: dict[str, Any], said: str) -> None:
    assert said in refused(plan(placement={"runners": place}), node("a", {"zone": "a"}, CPU=8))


def test_a_label_leaves_fewer_nodes() -> None:
    wide = plan(rollout={"cpus_per_runner": 8}, placement={"runners": {"labels": {"zone": "!a"}}})
    said = refused(wide, node("one", {"zone": "a"}, CPU=64), node("two", CPU=4))
    assert "the largest one with its labels, two, has 4 CPU; lower rollout.cpus_per_runner" in said
    both = plan(placement={"runners": {"labels": {"zone": "a", "disk": "fast"}}})
    said = refused(both, node("one", {"zone": "a"}, CPU=64), node("two", {"disk": "fast"}, CPU=4))
    assert "no node has all its labels" in said


def test_a_custom_resource_that_is_too_small_is_what_is_to_be_lowered() -> None:
    said = refused(plan(placement={"runners": {"resources": {"farm": 3}}}), node("one", CPU=64, farm=2))
    assert "runner (1 CPU, farm 3): the largest one, one, has 64 CPU, farm 2; lower placement.runners.resources" in said


def test_strict_strategies_are_counted_in_nodes() -> None:
    nodes = [node("a", CPU=2), node("b", CPU=3)]
    packed = plan(placement={"strategy": "STRICT_PACK"})
    assert refused(packed, *nodes).startswith(
        "placement.strategy: STRICT_PACK needs one node with 4 CPU; the largest one, b"
    )
    spread = plan(engines={"num": 0}, placement={"strategy": "STRICT_SPREAD"})
    said = refused(spread, *nodes)
    assert said.startswith("placement.strategy: STRICT_SPREAD needs a node for each of 3 actors, and the 2 node(s)")
    check_places(spread, [*nodes, node("c", CPU=1)])


def test_nodes_are_matched_and_not_only_counted() -> None:
    """Two actors that both need the one large node."""
    spread = plan(
        engines={"num": 0},
        learners={"num": 0, "cpus": 4},
        rollout={"cpus_per_runner": 4},
        placement={"strategy": "STRICT_SPREAD"},
    )
    assert "can hold 1;" in refused(spread, node("a", CPU=8), node("b", CPU=2))
    check_places(spread, [node("a", CPU=8), node("b", CPU=4)])


def test_shares_of_gpus_are_counted_by_gpu_as_ray_does() -> None:
    """Measured with Ray 2.60: PACK puts three actors of 0.6 on a node of two GPUs, where the third finds no GPU, again
    and again; SPREAD puts two on each. Five find no place on four GPUs at all."""
    nodes = [node("a", CPU=8, GPU=2), node("b", CPU=8, GPU=2)]
    shares: dict[str, Any] = {"engines": {"num": 4, "gpus": 0.4}, "learners": {"num": 4, "gpus": 0.6}}
    said = refused(plan(**shares), *nodes)
    assert "counts its GPUs in sum, finds no place for" in said and "set placement.strategy to SPREAD" in said
    spread = plan(**shares, placement={"strategy": "SPREAD"})
    check_places(spread, nodes)
    assert sorted(where(spread, *nodes)[Role.LEARNER]) == ["a", "a", "b", "b"]
    five = plan(engines={"num": 0}, learners={"num": 5, "gpus": 0.6}, placement={"strategy": "SPREAD"})
    assert "have places for 4 of 5 x learner" in refused(five, *nodes)


# What waits


def test_what_others_use_is_waited_for_by_name() -> None:
    crew = plan(engines={"num": 2, "gpus": 1}, learners={"num": 1})
    busy = [node("a", CPU=8, GPU=2, free={"CPU": 3.0, "GPU": 1.0})]
    check_places(crew, busy)
    assert named(without_a_place(crew, busy)) == "learner (1 CPU), engine (1 CPU, 1 GPU)"


def test_a_group_that_waits_is_told_with_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    crew = plan(engines={"num": 1, "gpus": 1}, learners={"num": 1})
    asked: list[Any] = []
    unplaced: list[int] | None = [0, 1, 2, 3]

    def unplaced_bundles(bundles: Any) -> list[int] | None:
        asked.append(bundles)
        return unplaced

    monkeypatch.setattr(places, "unplaced_bundles", unplaced_bundles)
    monkeypatch.setattr(places, "cluster_nodes", lambda: [node("10.0.0.1", CPU=8, GPU=1, free={"CPU": 8.0})])
    assert waits_for_places(crew) == "a place for: engine (1 CPU, 1 GPU) (free: 10.0.0.1: 8 CPU)"
    assert asked == [[bundle.resources for bundle in crew.bundles]]
    unplaced = [1]  # its node was lost
    monkeypatch.setattr(places, "cluster_nodes", lambda: [node("10.0.0.1", CPU=8, free={"CPU": 0.0})])
    assert waits_for_places(crew) == "a place for: runner (1 CPU) (free: 10.0.0.1: 0 CPU)"
    unplaced = None
    assert waits_for_places(crew) is None


# Labels


@pytest.mark.parametrize(
    ("selector", "value", "taken"),
    [
        ("a", "a", True), ("a", "b", False), ("a", None, False), ("!a", "b", True),
        ("!a", "a", False), ("!a", None, True),
        ("in(a, b)", "b", True), ("in(a,b)", "b", True), ("in(a, b)", "c", False), ("!in(a, b)", "c", True),
        ("!in(a, b)", "a", False), ("!in(a, b)", None, True),
    ],
)  # fmt: skip
def test_selectors_of_labels(selector: str, value: str | None, taken: bool) -> None:
    assert selects(selector, value) == taken
