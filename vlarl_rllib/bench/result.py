"""What a benchmark found: rows of the product, of a plain loop and of the measured ceiling, as a table and as JSON."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Column, Table

from vlarl_rllib.process.source_revision import source_revision
from vlarl_rllib.runs.versions import installed_versions
from vlarl_rllib.settings import Settings

PRODUCT, PLAIN, CEILING, PART = "product", "plain", "ceiling", "part"
"""Kinds of rows: this package's own code path; the loop that one would write without it; what the machine allows, by a
measured rate and counted work; and what one of them is made of."""
DEFINITIONS = (
    "environment steps: actions that an environment has played; calls: decisions, which are replies of the policy, of "
    "one action or several; trained samples: decisions that a forward and backward pass has gone through, once an "
    "epoch. Each by the wall time of what the row names."
)
"""Of the three rates, wherever they are printed."""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table."""

    name: str
    kind: str
    value: float
    unit: str
    over_plain: float | None = None
    """Value by that of the plain loop; for rates."""
    of_ceiling: float | None = None
    """Value by that of the ceiling; for rates."""
    memory_gb: float | None = None
    """Largest that the process with the model took, in 1e9 bytes: of its GPU, as torch allocated it, or resident."""

    @property
    def cells(self) -> tuple[str, ...]:
        """As the table shows it."""
        return (
            self.name,
            self.kind,
            f"{self.value:.4g}",
            self.unit,
            "" if self.over_plain is None else f"{self.over_plain:.3g}",
            "" if self.of_ceiling is None else f"{self.of_ceiling:.3g}",
            "" if self.memory_gb is None else f"{self.memory_gb:.2f}",
        )


@dataclass(frozen=True, slots=True)
class Operation:
    """A line of the profile."""

    name: str
    milliseconds: float
    """Of its own, a step."""
    calls: float | None = None
    """A step; None of a phase."""


@dataclass
class Result:
    """Of one benchmark."""

    benchmark: str
    settings: dict[str, Any]
    device: str
    """What the model ran on."""
    rows: list[Row] = field(default_factory=list)
    counted: dict[str, float] = field(default_factory=dict)
    """What ceilings are computed from: FLOPs and bytes, by what they are of; and the measured rate of products."""
    profile: list[Operation] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, benchmark: str, settings: Settings, device: str) -> Result:
        machine = {
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 2),
            "processor": platform.processor() or platform.machine(),
            "revision": source_revision(),
            "versions": installed_versions(),
        }
        return cls(benchmark, settings.to_dict(), device, machine=machine)

    def add(
        self,
        name: str,
        kind: str,
        value: float,
        unit: str,
        *,
        plain: float | None = None,
        ceiling: float | None = None,
        memory_gb: float | None = None,
    ) -> None:
        """A row.

        Args:
            plain, ceiling: rates in the same unit, that this one is compared with.
        """
        over_plain, of_ceiling = (value / other if other else None for other in (plain, ceiling))
        self.rows.append(Row(name, kind, value, unit, over_plain, of_ceiling, memory_gb))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def tables(self) -> list[Table]:
        """The rows, and the profile where there is one."""
        title = f"{self.benchmark}: {self.settings['model']['path']} on {self.device}"
        rows = Table(
            Column("what", overflow="fold"), "kind", Column("rate", justify="right"), "",
            *(Column(name, justify="right") for name in ("x plain", "of ceiling", "GB")),
            title=title, title_justify="left", caption=DEFINITIONS, caption_justify="left",
        )  # fmt: skip
        for row in self.rows:
            rows.add_row(*row.cells)
        if not self.profile:
            return [rows]
        profile = Table(
            Column("operation", overflow="fold"), Column("ms a step", justify="right"),
            Column("calls a step", justify="right"), title="where the time goes", title_justify="left",
        )  # fmt: skip
        for operation in self.profile:
            calls = "" if operation.calls is None else f"{operation.calls:.1f}"
            profile.add_row(operation.name, f"{operation.milliseconds:.3f}", calls)
        return [rows, profile]

    def counted_in_words(self) -> str:
        """A line; empty where nothing was counted."""
        return "counted: " + "; ".join(f"{name} {value:.4g}" for name, value in self.counted.items())


def phases(seconds: Mapping[str, float], steps: float) -> list[Operation]:
    """Seconds by name, over so many steps, as a profile: the largest first."""
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return [Operation(name, value / steps * 1e3) for name, value in ordered]
