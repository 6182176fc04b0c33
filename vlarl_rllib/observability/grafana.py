"""A Grafana dashboard of `telemetry.table.METRICS`, one panel for each metric."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from vlarl_rllib.telemetry.table import METRICS, Kind, Metric

UID = "vlarl-runs"
WINDOW = "$__rate_interval"
"""Grafana's name for a time in which there are at least four scrapes."""
SELECTED = '{run=~"$run"}'
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
QUANTILES = {"0.5": "median", "0.95": "95 %"}
PANELS_IN_A_LINE, HEIGHT = 3, 8
GRID_WIDTH = 24


def queries(metric: Metric) -> dict[str, str]:
    """What the panel of a metric asks Prometheus: the PromQL by what is said of a line beside its labels."""
    by = ", ".join(("run", *metric.by))
    name = metric.exported
    if metric.kind is Kind.GAUGE:
        return {"": f"{metric.fold} by ({by}) ({name}{SELECTED})"}
    if metric.kind is Kind.COUNTER:
        rate = f"sum by ({by}) (rate({name}{SELECTED}[{WINDOW}]))"
        share = f" / sum by (run) ({METRICS[metric.share_of].exported}{SELECTED})" if metric.share_of else ""
        return {"": rate + share}
    buckets = f"sum by (le, {by}) (rate({name}_bucket{SELECTED}[{WINDOW}]))"
    return {text: f"histogram_quantile({quantile}, {buckets})" for quantile, text in QUANTILES.items()}


def dashboard() -> dict[str, Any]:
    """The dashboard, as Grafana reads it from a file."""
    panels: list[dict[str, Any]] = []
    top = 0
    for row, metrics in groupby(METRICS.values(), key=lambda metric: metric.row):
        panels.append(_placed({"type": "row", "title": row, "collapsed": False}, len(panels), 0, top, GRID_WIDTH, 1))
        top += 1
        members = list(metrics)
        width = GRID_WIDTH // PANELS_IN_A_LINE
        for number, metric in enumerate(members):
            line, column = divmod(number, PANELS_IN_A_LINE)
            panels.append(_placed(_panel(metric), len(panels), column * width, top + line * HEIGHT, width, HEIGHT))
        top += -(-len(members) // PANELS_IN_A_LINE) * HEIGHT
    return {
        "uid": UID,
        "title": "vlarl runs",
        "tags": ["vlarl", "ray"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_datasource_choice(), _run_choice()]},
        "annotations": {"list": []},
        "panels": panels,
    }


def _placed(panel: dict[str, Any], number: int, x: int, y: int, width: int, height: int) -> dict[str, Any]:
    return {"id": number + 1, "gridPos": {"x": x, "y": y, "w": width, "h": height}, **panel}


def _panel(metric: Metric) -> dict[str, Any]:
    legend = " ".join(f"{{{{{label}}}}}" for label in ("run", *metric.by))
    return {
        "type": "timeseries",
        "title": metric.name.replace("_", " ") + (" a second" if metric.unit in ("ops", "Bps") else ""),
        "description": metric.help + (f". Needs {metric.needs}" if metric.needs else "") + ".",
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": {"unit": metric.unit, "custom": {"lineWidth": 2, "spanNulls": True}}},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": DATASOURCE,
                "expr": expression,
                "legendFormat": f"{legend} {text}".strip(),
            }
            for number, (text, expression) in enumerate(queries(metric).items())
        ],
    }


def _datasource_choice() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _run_choice() -> dict[str, Any]:
    query = f"label_values({METRICS['iteration'].exported}, run)"
    return {
        "name": "run",
        "label": "run",
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": "run"},
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
        "sort": 1,
    }
