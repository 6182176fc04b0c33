"""Who is who among a run's processes, for py-spy and for tests that kill: `processes.json` in the run's directory."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from vlarl_rllib.process.lost_output import LOST
from vlarl_rllib.process.own_files import replace_file
from vlarl_rllib.process.storage import Place


def write_processes(
    directory: Place,
    *,
    runners: Mapping[int, Any],
    learners: Sequence[int],
    engines: Sequence[int],
    reward_worker: int | None,
    nodes: Mapping[str, str],
) -> None:
    """Write the process ids, this one as the Algorithm's; on two nodes the same number may be two processes.

    Args:
        runners: by number, its own and its environments'.
        nodes: of the actors, by what they are called: `runner-1`, `learner-0`, `engine-0`, `reward`.
    """
    processes = {
        "algorithm": os.getpid(),
        "runners": {str(index): pids for index, pids in runners.items()},
        "learners": learners,
        "engines": engines,
        "reward_worker": reward_worker,
        "nodes": {"algorithm": f"{socket.gethostname()} ({ray.util.get_node_ip_address()})", **nodes},
    }
    file = directory / "processes.json"
    with LOST.counting(file.name):
        directory.mkdir(parents=True, exist_ok=True)
        replace_file(file, json.dumps(processes, indent=2))
