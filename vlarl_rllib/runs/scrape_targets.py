"""Where Prometheus finds the Ray that a command has started: a file of its own, as long as that Ray lives.

Ray itself writes such a file only with its dashboard, in a directory that is another one each time, and its link to the
newest of them leads to one Ray, however many run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlarl_rllib.process.lost_output import LOST
from vlarl_rllib.process.own_files import replace_file
from vlarl_rllib.process.surroundings import user_directory


def targets_directory() -> Path:
    """Where the files are, one for each Ray; `vlarl dashboard` names it to Prometheus."""
    return user_directory() / "prometheus"


@contextmanager
def scrape_target() -> Iterator[None]:
    """Around the life of a Ray that this process has started."""
    import ray

    file: Path | None = None
    with LOST.counting("Prometheus's list of targets"):
        directory = targets_directory()
        directory.mkdir(mode=0o700, exist_ok=True)
        living_targets()
        nodes = [node for node in ray.nodes() if node["Alive"]]
        targets = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes]
        file = directory / f"{os.getpid()}.json"
        replace_file(file, json.dumps([{"targets": targets, "labels": {"job": "ray"}}]), mode=0o600)
    try:
        yield
    finally:
        if file is not None:
            with LOST.counting(str(file)):
                file.unlink(missing_ok=True)


def living_targets() -> list[Path]:
    """The files of Rays that live; those of processes that were killed are removed."""
    living = []
    for file in targets_directory().glob("*.json"):
        if _is_ours(file):
            living.append(file)
        else:
            file.unlink(missing_ok=True)
    return living


def _is_ours(file: Path) -> bool:
    """Whether the process that the file is named after lives, and is this user's."""
    try:
        os.kill(int(file.stem), 0)
    except (OSError, ValueError):
        return False
    return True
