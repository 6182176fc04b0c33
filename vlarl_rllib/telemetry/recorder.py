"""How a part of a run tells its metrics: it adds to numbers in memory, and a thread hands them to Ray once a second.

    telemetry = Telemetry("my_run", "libero_spatial", "runner-1")
    telemetry.count("episodes", task="3", outcome="success")
    telemetry.watch(lambda: telemetry.total("decisions", engine.num_decisions))

Ray forgets a gauge that nobody has set for twenty seconds, and an iteration may take longer: so the thread sets each
one again and again, until `close`. Nothing here can fail for those who call it, however Ray is.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import ray
from ray.util import metrics as ray_metrics

from vlarl_rllib.process.lost_output import LOST
from vlarl_rllib.telemetry.table import COMMON_LABELS, METRICS, PREFIX, Kind

logger = logging.getLogger(__name__)

REPORT_SECONDS = 1.0
MAX_OBSERVATIONS = 10_000
"""Of histograms between two reports; where there are more, the oldest are left out."""

Key = tuple[str, tuple[tuple[str, str], ...]]
"""Name of a metric, and its labels beside those that all have."""


class Telemetry:
    """What one part of a run, such as a runner or an engine, tells.

    Args:
        run: the label of that name, as `suite` and `actor` are.
    """

    def __init__(self, run: str, suite: str, actor: str) -> None:
        self.num_failures = 0
        """Reports of one number that failed, again and again where it always does."""
        self._failed: set[Any] = set()
        """Metrics and sources that failed once or more; each counts once as lost output."""
        self._labels = dict(zip(COMMON_LABELS, (run, suite, actor), strict=True))
        self._lock, self._reporting = threading.Lock(), threading.Lock()
        self._counts: dict[Key, float] = defaultdict(float)
        self._totals: dict[Key, float] = {}
        self._values: dict[Key, float] = {}
        self._observations: deque[tuple[Key, float]] = deque(maxlen=MAX_OBSERVATIONS)
        self._sources: list[Callable[[], None]] = []
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="vlarl-telemetry", daemon=True).start()

    def count(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Add to a counter."""
        with self._lock:
            self._counts[_key(name, labels)] += amount

    def total(self, name: str, total: float, **labels: str) -> None:
        """Add to a counter what a total has grown by since this was last called; one that is smaller began anew."""
        key = _key(name, labels)
        with self._lock:
            known = self._totals.get(key, 0.0)
            self._counts[key] += total - known if total >= known else total
            self._totals[key] = total

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge, which stays so until it is set again."""
        with self._lock:
            self._values[_key(name, labels)] = value

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Put a value into a histogram."""
        self._observations.append((_key(name, labels), value))

    @contextmanager
    def timed(self, name: str, **labels: str) -> Iterator[None]:
        """Add to a counter the seconds that pass inside."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.count(name, time.perf_counter() - began, **labels)

    def watch(self, source: Callable[[], None]) -> None:
        """Have `source` called before each report, in the thread, to set and add what nobody needs to tell at once."""
        self._sources.append(source)

    def follow(self, run: str, suite: str) -> None:
        """From now on the numbers are another run's; what was told before is the former one's, and its gauges end."""
        if (self._labels["run"], self._labels["suite"]) == (run, suite):
            return
        self.report()
        with self._lock:
            self._labels |= {"run": run, "suite": suite}
            self._values.clear()

    def close(self) -> None:
        """Report once more, and no more: gauges end."""
        if not self._closed.is_set():
            self._closed.set()
            self.report()

    def report(self) -> None:
        """Hand everything to Ray now."""
        with self._reporting:
            self._report()

    def _report(self) -> None:
        for source in self._sources:
            self._try(source, source)
        if not ray.is_initialized():
            return
        with self._lock:
            labels, values = dict(self._labels), dict(self._values)
            counts = {key: amount for key, amount in self._counts.items() if amount > 0}
            self._counts.clear()
        observations = [self._observations.popleft() for _ in range(len(self._observations))]
        for key, amount in counts.items():
            self._try(key[0], _record, Kind.COUNTER, key, amount, labels)
        for key, value in values.items():
            self._try(key[0], _record, Kind.GAUGE, key, value, labels)
        for key, value in observations:
            self._try(key[0], _record, Kind.HISTOGRAM, key, value, labels)

    def _run(self) -> None:
        while not self._closed.wait(REPORT_SECONDS):
            self.report()

    def _try(self, what: Any, function: Callable[..., None], *args: Any) -> None:
        try:
            function(*args)
        except Exception as error:  # the boundary: whatever is the matter with a metric, the run goes on
            self.num_failures += 1
            if what not in self._failed:
                self._failed.add(what)
                LOST.count += 1
                logger.warning("a metric is lost: %s: %s: %s", what, type(error).__name__, error)


def watch_gpu_memory(telemetry: Telemetry) -> None:
    """Tell what this process holds of its GPU, once torch uses one."""

    def read() -> None:
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            telemetry.set("gpu_memory_bytes", torch.cuda.memory_allocated(), state="allocated")
            telemetry.set("gpu_memory_bytes", torch.cuda.memory_reserved(), state="reserved")

    telemetry.watch(read)


def _key(name: str, labels: dict[str, str]) -> Key:
    return name, tuple(labels.items())


def _record(kind: Kind, key: Key, value: float, labels: dict[str, str]) -> None:
    name, own = key
    instrument, tags = _instrument(name), labels | dict(own)
    if kind is Kind.COUNTER:
        instrument.inc(value, tags)
    elif kind is Kind.GAUGE:
        instrument.set(value, tags)
    else:
        instrument.observe(value, tags)


@cache
def _instrument(name: str) -> Any:
    """Ray's, one of each in a process."""
    metric = METRICS[name]
    arguments: dict[str, Any] = {"description": metric.help, "tag_keys": (*COMMON_LABELS, *metric.labels)}
    if metric.kind is Kind.COUNTER:
        return ray_metrics.Counter(PREFIX + name, **arguments)
    if metric.kind is Kind.GAUGE:
        return ray_metrics.Gauge(PREFIX + name, **arguments)
    return ray_metrics.Histogram(PREFIX + name, boundaries=list(metric.bounds), **arguments)
