"""What the Algorithm tells of an iteration: numbers of its row, as gauges that stay until the next one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlarl_rllib.observability.metrics import iteration_row
from vlarl_rllib.telemetry.recorder import Telemetry
from vlarl_rllib.telemetry.table import POLICY_GAUGES


def tell_iteration(telemetry: Telemetry, result: dict[str, Any]) -> None:
    """Tell what `Ledger.close_iteration` has put into RLlib's results."""
    row = iteration_row(result)
    for name in ("iteration", "policy_version", *POLICY_GAUGES):
        telemetry.set(name, row[name])
    telemetry.set("learning_rate", row["applied"]["lr"])
    _tell_each(telemetry, "iteration_seconds", "phase", row["seconds"])
    _tell_each(telemetry, "faults", "kind", row["faults"])
    _tell_each(telemetry, "success_rate", "task", row["success_rate_by_task"])
    telemetry.count("sync_bytes", row["sync_bytes"])
    for evaluation in (row["initial_evaluation"], row["evaluation"]):
        if evaluation:
            telemetry.set("evaluation_success_rate", evaluation["success_rate"])


def _tell_each(telemetry: Telemetry, name: str, label: str, values: Mapping[str, float]) -> None:
    for value, number in values.items():
        telemetry.set(name, number, **{label: value})
