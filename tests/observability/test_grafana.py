"""The Grafana dashboard is made of the table of metrics."""

import json
import re

from vlarl_rllib.observability.grafana import dashboard, queries
from vlarl_rllib.telemetry.table import METRICS, Metric


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"ray_vlarl_\w+", expression))


def test_every_metric_has_a_panel_that_asks_for_it_by_its_exported_name() -> None:
    panels = [panel for panel in json.loads(json.dumps(dashboard()))["panels"] if panel["type"] != "row"]
    assert len(panels) == len(METRICS)
    for panel, metric in zip(panels, METRICS.values(), strict=True):
        assert metric.help in panel["description"]
        asked = set().union(*(names_in(target["expr"]) for target in panel["targets"]))
        assert metric.exported in {name.removesuffix("_bucket") for name in asked}


def test_panels_do_not_lie_on_each_other() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(taken) == len(set(taken))
    assert max(x for x, _ in taken) == 23, "Grafana's grid has 24 columns"


def asked(name: str) -> str:
    (expression, *_) = queries(METRICS[name]).values()
    return expression


def test_a_counter_is_shown_as_a_rate_and_a_share_of_its_slots() -> None:
    assert asked("decisions") == 'sum by (run, actor) (rate(ray_vlarl_decisions_total{run=~"$run"}[$__rate_interval]))'
    share = 'sum by (run) (rate(ray_vlarl_env_busy_seconds_total{run=~"$run"}[$__rate_interval]))'
    assert asked("env_busy_seconds") == share + ' / sum by (run) (ray_vlarl_slots{run=~"$run"})'


def test_a_histogram_is_shown_as_two_quantiles() -> None:
    metric: Metric = METRICS["engine_latency_seconds"]
    median, high = queries(metric).values()
    buckets = "rate(ray_vlarl_engine_latency_seconds_bucket"
    assert median.startswith("histogram_quantile(0.5, sum by (le, run, actor)") and buckets in median
    assert high.startswith("histogram_quantile(0.95, ")
