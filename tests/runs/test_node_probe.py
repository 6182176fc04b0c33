"""What nodes are asked, without a cluster."""

from pathlib import Path
from typing import Any

import pytest

from vlarl_rllib.models.presets import cache_name
from vlarl_rllib.runs.node_probe import Lack, Needs, look
from vlarl_rllib.runs.nodes import _needs, _roles
from vlarl_rllib.settings import Role, Settings, calculate_runtime_args


def node(labels: dict[str, str] | None = None, **resources: float) -> dict[str, Any]:
    return {"Resources": resources, "Labels": labels or {}}


def test_a_node_that_has_everything_lacks_nothing(tmp_path: Path) -> None:
    probe = tmp_path / ".probe"
    probe.write_text("")
    needs = Needs(
        paths={"rewards.judge": str(tmp_path)},
        modules={"json": "env.name"},
        presets={"tiny": cache_name("tiny")},
        environment="synthetic",
        probe=str(probe),
    )
    assert look(needs) == []


def test_each_lack_names_its_setting(tmp_path: Path) -> None:
    needs = Needs(
        paths={"model.lora.adapter": str(tmp_path / "adapter")},
        modules={"no_such_package.envs": "env.name"},
        presets={"tiny": "tiny-0123"},
        probe=str(tmp_path / "run" / ".probe"),
    )
    found = look(needs)
    assert [lack.subject for lack in found] == ["model.lora.adapter", "--run-dir", "env.name", "vlarl_rllib"]
    assert found[0].fault == f"{tmp_path / 'adapter'} is missing" and isinstance(found[0], Lack)


def test_a_directory_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = tmp_path / ".probe"
    probe.write_text("")

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)  # root may write anywhere
    assert [lack.fault for lack in look(Needs(probe=str(probe)))] == [
        f"{tmp_path} cannot be written to (Permission denied)"
    ]


def test_asked_are_nodes_that_may_get_an_actor_for_what_it_needs(tmp_path: Path) -> None:
    settings = Settings.from_dict(
        {
            "env": {"name": "synthetic"},
            "model": {"path": str(tmp_path)},
            "rollout": {"cpus_per_runner": 2},
            "learners": {"num": 1, "gpus": 1},
            "rewards": {"process": 0.1, "judge": str(tmp_path / "judge")},
            "placement": {"engines": {"labels": {"kind": "in(A100, H100)"}}, "runners": {"labels": {"kind": "!farm"}}},
        }
    )
    bundles = calculate_runtime_args(settings, cores=1).bundles
    assert _roles(node(CPU=0.5), bundles) == set()
    assert _roles(node({"kind": "farm"}, CPU=8.0), bundles) == {Role.ALGORITHM, Role.REWARD_WORKER}
    assert _roles(node({"kind": "A100"}, CPU=8.0), bundles) == {
        Role.ALGORITHM, Role.REWARD_WORKER, Role.RUNNER, Role.ENGINE
    }  # fmt: skip
    assert Role.LEARNER in _roles(node(CPU=8.0, GPU=1.0), bundles)

    reads = {"--resume-from": tmp_path / "checkpoint"}
    assert set(_needs({Role.ENGINE}, settings, None, reads).paths) == {"model.path"}
    assert _needs({Role.RUNNER}, settings, None, reads).environment == "synthetic"
    assert set(_needs({Role.LEARNER}, settings, tmp_path, reads).paths) == {"model.path", "--resume-from"}
    assert set(_needs({Role.REWARD_WORKER}, settings, None, reads).paths) == {"rewards.judge"}
