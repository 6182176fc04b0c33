"""`vlarl bench NAME`: measures, prints the table, and writes JSON."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlarl_rllib.process.console import make_console, saying_so, shown
from vlarl_rllib.process.own_files import replace_file
from vlarl_rllib.settings import Settings

CHATTY = ("ray", "bitsandbytes")
"""Loggers that explain to developers what nobody here has chosen, where actors of a run keep it in their logs."""


def run_bench(name: str, settings: Settings, *, json_file: Path | None, profile: bool) -> None:
    """Measure and tell.

    Args:
        name: of `bench.BENCHMARKS`.
        settings: as `bench.setup.prepared` returned them.
    """
    console = make_console()
    with saying_so(f"the measurements of {name}"), quiet_libraries():
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


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without progress bars of each model that is loaded, and without warnings of `CHATTY`."""
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar

    before = {name: logging.getLogger(name).level for name in CHATTY}
    disable_progress_bar()
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        enable_progress_bar()
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
