"""Who is who among a run's processes, for py-spy and for tests that kill: `processes.json` in the run's directory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlarl_rllib.process.lost_output import LOST
from vlarl_rllib.process.own_files import replace_file


def write_processes(
    directory: Path,
    *,
    runners: Mapping[int, Any],
    learners: Sequence[int],
    engines: Sequence[int],
    reward_worker: int | None,
) -> None:
    """Write the process ids, this one as the Algorithm's.

    Args:
        runners: by number, its own and its environments'.
    """
    processes = {
        "algorithm": os.getpid(),
        "runners": {str(index): pids for index, pids in runners.items()},
        "learners": learners,
        "engines": engines,
        "reward_worker": reward_worker,
    }
    file = directory / "processes.json"
    with LOST.counting(file.name):
        directory.mkdir(parents=True, exist_ok=True)
        replace_file(file, json.dumps(processes, indent=2))
