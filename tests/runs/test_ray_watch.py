"""What a run is told of nodes that are going to be taken away, with a cluster of words; a real one:
tests/e2e/test_jobs.py."""

import time
from collections.abc import Iterator
from queue import Queue

import pytest
import ray

from vlarl_rllib.process.signals import END
from vlarl_rllib.runs import ray_watch

NODES = [{"NodeID": name, "NodeManagerAddress": f"10.0.0.{number}"} for number, name in enumerate("abc", start=1)]


@pytest.fixture
def draining(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float | None]]:
    """Nodes that are drained, where the run works on a and b."""
    found: dict[str, float | None] = {}
    monkeypatch.setattr(ray_watch, "draining_nodes", lambda: found)
    monkeypatch.setattr(ray_watch, "nodes_in_use", lambda: {"a", "b"})
    monkeypatch.setattr(ray, "nodes", lambda: [node | {"Alive": True} for node in NODES])
    return found


def test_a_node_of_others_is_none_of_the_runs_business(draining: dict[str, float | None]) -> None:
    assert ray_watch._drain_notice() is None
    draining["c"] = time.time() + 60
    assert ray_watch._drain_notice() is None
    draining["b"] = time.time() + 60.4
    assert ray_watch._drain_notice() == "the node at 10.0.0.2 is going to be taken away in 60 s"
    draining["b"] = None
    assert ray_watch._drain_notice() == "the node at 10.0.0.2 is going to be taken away"


def test_the_notice_asks_for_an_end_once(draining: dict[str, float | None], monkeypatch: pytest.MonkeyPatch) -> None:
    told = Queue[str]()
    monkeypatch.setattr(ray_watch, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(ray_watch, "PROCESSES", ())  # the tests' own Ray is none of it
    monkeypatch.setattr(ray, "get_runtime_context", lambda: type("Context", (), {"get_node_id": lambda self: "a"})())
    draining["a"] = None
    with END.listening(), END.polled(told.put), ray_watch.ray_watched():
        assert told.get(timeout=10) == "the node at 10.0.0.1 is going to be taken away"
        time.sleep(0.3)
        assert END.code == 75 and told.empty()
