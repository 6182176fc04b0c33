"""What a node of a cluster is asked before actors start on it. Imports little: it runs in a process made for it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from vlarl_rllib.process.storage import place_of


@dataclass(frozen=True)
class Needs:
    """What actors need of their node; picklable."""

    paths: Mapping[str, str] = field(default_factory=dict)
    """Path by the setting or option that names it."""
    modules: Mapping[str, str] = field(default_factory=dict)
    """Setting that names it, by module."""
    presets: Mapping[str, str] = field(default_factory=dict)
    """`presets.cache_name` by preset: a digest of the code that writes it is part of it."""
    environment: str | None = None
    """That is going to be drawn there."""
    probe: str | None = None
    """A file that the driver has written into the run's directory."""


@dataclass(frozen=True)
class Lack:
    """What a node has not got: `subject: fault on NODES; remedy`."""

    subject: str
    fault: str
    remedy: str


EVERYWHERE = "put it where all nodes find it, on storage that they share or as a copy"
SHARED = "give a directory on storage that all nodes share, such as NFS, or a URI such as s3://bucket/runs/mine"
SAME_PACKAGES = "install the same packages on all nodes"


def look(needs: Needs) -> list[Lack]:
    """What is missing here."""
    return [*_files(needs), *_code(needs), *_renderer(needs.environment)]


def _files(needs: Needs) -> Iterator[Lack]:
    for name, path in needs.paths.items():
        if not os.access(path, os.R_OK):
            yield Lack(name, f"{path} is missing", EVERYWHERE)
    if needs.probe is None:
        return
    probe = place_of(needs.probe)
    try:
        if not probe.is_file():
            yield Lack("--run-dir", f"what is written to {probe.parent} is not seen", SHARED)
            return
        probe.write_text("seen")
    except OSError as error:
        fault = f"{probe.parent} cannot be written to ({error.strerror or ' '.join(str(error).split())})"
        yield Lack("--run-dir", fault, "give a place that this user may write to from all nodes")


def _code(needs: Needs) -> Iterator[Lack]:
    from vlarl_rllib.models.presets import cache_name, presets

    for module, name in needs.modules.items():
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # its parent
            found = None
        if found is None:
            yield Lack(name, f"module {module} cannot be imported", SAME_PACKAGES)
    for preset, written in needs.presets.items():
        if preset not in presets() or cache_name(preset) != written:
            yield Lack("vlarl_rllib", f"another version, whose preset {preset} is another model,", SAME_PACKAGES)


def _renderer(environment: str | None) -> Iterator[Lack]:
    from vlarl_rllib.envs.registry import ENVIRONMENTS
    from vlarl_rllib.envs.rendering import choose_gl_backend

    if environment not in ENVIRONMENTS or not ENVIRONMENTS[environment].needs_gl:
        return
    try:
        choose_gl_backend()
    except RuntimeError as error:
        remedy = f"{error}; mend that, or keep runners away from there: CPUs or resources that it has not"
        yield Lack("env.name", f"{environment} cannot be drawn", remedy)
