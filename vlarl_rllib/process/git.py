"""Which revision of a directory's code runs, as git tells it."""

from __future__ import annotations

import subprocess
from pathlib import Path

GIT_SECONDS = 5.0


def git_revision(directory: Path) -> str | None:
    """The commit that is checked out there, with `-dirty` where files below `directory` differ from it; None where
    there is no git or nothing of it."""
    try:
        commit = _git(directory, "rev-parse", "--short=12", "HEAD")
        # a directory that git ignores, as site-packages in a checkout's environment, is of no commit
        if not _git(directory, "ls-files", "--", "."):
            return None
        return commit + ("-dirty" if _git(directory, "status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=GIT_SECONDS).stdout.strip()
