"""What the recorder hands to Ray: totals become increments, gauges stay, and nothing that fails reaches the run."""

import ast
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vlarl_rllib.process.lost_output import LOST
from vlarl_rllib.telemetry import recorder
from vlarl_rllib.telemetry.recorder import Telemetry
from vlarl_rllib.telemetry.table import COMMON_LABELS, METRICS, Kind

PACKAGE = Path(recorder.__file__).parents[1]


class FakeInstrument:
    """Ray's Counter, Gauge or Histogram: keeps (value, labels)."""

    def __init__(self) -> None:
        self.told: list[tuple[float, dict[str, str]]] = []

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0, "Ray raises for anything else"
        self.told.append((value, tags))

    set = observe = inc


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeInstrument]:
    """Instruments by name, in place of Ray's; the thread is too slow to interfere."""
    instruments = {name: FakeInstrument() for name in METRICS}
    monkeypatch.setattr(recorder, "_instrument", lambda name: instruments[name])
    monkeypatch.setattr(recorder, "REPORT_SECONDS", 3600.0)
    monkeypatch.setattr(recorder.ray, "is_initialized", lambda: True)
    return instruments


@pytest.fixture
def telemetry(told: dict[str, FakeInstrument]) -> Iterator[Telemetry]:
    telemetry = Telemetry("a", "goal", "runner-1")
    yield telemetry
    telemetry.close()


def test_counts_add_up_and_totals_count_what_they_have_grown_by(
    telemetry: Telemetry, told: dict[str, FakeInstrument]
) -> None:
    for total in (3, 5, 2):  # 2: begun anew
        telemetry.total("decisions", total)
    telemetry.count("sync_bytes", 10)
    telemetry.count("sync_bytes", 1)
    telemetry.count("trained_samples", 0)
    telemetry.report()
    telemetry.report()
    labels = {"run": "a", "suite": "goal", "actor": "runner-1"}
    assert told["decisions"].told == [(7, labels)]
    assert told["sync_bytes"].told == [(11, labels)]
    assert told["trained_samples"].told == [], "Ray takes no increment of 0"


def test_a_gauge_is_set_again_until_the_end(telemetry: Telemetry, told: dict[str, FakeInstrument]) -> None:
    """Ray forgets one after twenty seconds."""
    telemetry.set("policy_version", 4)
    telemetry.report()
    telemetry.report()
    assert [value for value, _ in told["policy_version"].told] == [4, 4]
    telemetry.close()
    telemetry.close()
    assert len(told["policy_version"].told) == 3


def test_another_run_takes_over_without_the_former_ones_gauges(
    telemetry: Telemetry, told: dict[str, FakeInstrument]
) -> None:
    telemetry.set("policy_version", 4)
    telemetry.total("decisions", 3)
    telemetry.follow("b", "goal")
    telemetry.total("decisions", 5)
    telemetry.report()
    assert [(value, tags["run"]) for value, tags in told["decisions"].told] == [(3, "a"), (2, "b")]
    assert {tags["run"] for _, tags in told["policy_version"].told} == {"a"}


def test_what_fails_is_counted_and_the_rest_is_told(
    telemetry: Telemetry, told: dict[str, FakeInstrument], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("Ray has gone")

    monkeypatch.setattr(told["policy_version"], "set", broken)
    lost = LOST.count
    telemetry.watch(broken)
    telemetry.set("policy_version", 1)
    telemetry.set("iteration", 1)
    telemetry.set("no such metric", 1)
    telemetry.report()
    telemetry.report()
    assert telemetry.num_failures == 6 and LOST.count - lost == 3, "each thing counts once"
    assert len(told["iteration"].told) == 2


@pytest.mark.parametrize("in_use", [False, True])
def test_gpu_memory_is_told_once_torch_uses_a_gpu(
    telemetry: Telemetry, told: dict[str, FakeInstrument], monkeypatch: pytest.MonkeyPatch, in_use: bool
) -> None:
    cuda = SimpleNamespace(
        is_initialized=lambda: in_use, memory_allocated=lambda: 2 * 2**30, memory_reserved=lambda: 3 * 2**30
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    recorder.watch_gpu_memory(telemetry)
    telemetry.report()
    numbers = {tags["state"]: value for value, tags in told["gpu_memory_bytes"].told}
    assert numbers == ({"allocated": 2 * 2**30, "reserved": 3 * 2**30} if in_use else {})


def test_telling_costs_microseconds(telemetry: Telemetry) -> None:
    """A decision takes milliseconds. The least of some tries: the machine may be busy with something else."""

    def seconds_of_a_thousand() -> float:
        began = time.perf_counter()
        for _ in range(1000):
            telemetry.count("episodes", task="3", outcome="success")
        return time.perf_counter() - began

    assert min(seconds_of_a_thousand() for _ in range(5)) < 0.02


def told_in_code() -> Iterator[tuple[str, str, set[str]]]:
    """(method, metric, labels) of every call that tells a metric by its literal name."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and "telemetry" in ast.unparse(node.func.value)
                and node.args
                and isinstance(node.args[0], ast.Constant)
            ):
                yield node.func.attr, str(node.args[0].value), {keyword.arg or "" for keyword in node.keywords}


METHODS = {
    "count": Kind.COUNTER,
    "total": Kind.COUNTER,
    "timed": Kind.COUNTER,
    "set": Kind.GAUGE,
    "observe": Kind.HISTOGRAM,
}


def test_the_code_tells_what_the_table_says() -> None:
    calls = list(told_in_code())
    assert len(calls) > 20
    wrong = [
        (method, name, labels)
        for method, name, labels in calls
        if METRICS[name].kind is not METHODS[method] or labels != set(METRICS[name].labels)
    ]
    assert wrong == []


def test_the_tables_panels_show_labels_that_there_are() -> None:
    for metric in METRICS.values():
        assert set(metric.by) <= {*COMMON_LABELS, *metric.labels}, metric.name
        assert bool(metric.bounds) == (metric.kind is Kind.HISTOGRAM), metric.name
        assert not metric.share_of or METRICS[metric.share_of].kind is Kind.GAUGE
