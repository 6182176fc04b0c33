"""`vlarl bench NAME`: measures, prints the table, and writes JSON."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from vlarl_rllib.process.console import make_console, saying_so, shown
from vlarl_rllib.process.own_files import replace_file
from vlarl_rllib.settings import Settings


def run_bench(name: str, settings: Settings, *, json_file: Path | None, profile: bool) -> None:
    """Measure and tell.

    Args:
        name: of `bench.BENCHMARKS`.
        settings: as `bench.setup.prepared` returned them.
    """
    console = make_console()
    with saying_so(f"the measurements of {name}"):
        measure = importlib.import_module(f"vlarl_rllib.bench.{name}").measure
        result = measure(settings, profile)
    for table in result.tables():
        console.print(table)
    if result.counted:
        console.print(result.counted_in_words())
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(json_file, json.dumps(result.to_dict(), indent=2) + "\n")
        console.print(f"wrote {shown(json_file)}")
