"""docs/metrics.md against the code, both ways: what it names is there, and what is there it names."""

import re
from pathlib import Path

from vlarl_rllib.telemetry.table import METRICS

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_the_page_explains_the_exported_metrics_with_their_labels() -> None:
    lines = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `ray_vlarl_")]
    described = {line[0].strip("| `"): set(re.findall(r"`(\w+)`", line[1])) for line in lines}
    assert described == {metric.exported: set(metric.labels) for metric in METRICS.values()}
