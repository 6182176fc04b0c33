"""Which version of this package's source tree runs here."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""Of the tree, where the package is used from one."""
PATIENCE_SECONDS = 10.0


@functools.cache
def source_revision(root: Path = ROOT) -> str | None:
    """The commit of the git checkout at `root`, 12 digits, with `-dirty` where tracked files differ from it.

    None where the package is installed rather than checked out, or git does not answer. Asked for once in a process.
    """
    if not (root / ".git").exists():  # a checkout further up would be somebody else's
        return None
    # a hook's GIT_DIR names another checkout; the index is left as it is; no program of the checkout's own is run
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"
    command = ["git", "-c", "core.fsmonitor=false", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
