"""A trial of a Tune experiment as the directory of a run: `vlarl report`, `export` and `train --resume` take it.

Tune's directory of the trial gets `config.yaml`, `metrics.jsonl`, `checkpoints/` and `videos/` beside Tune's own files.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlarl_rllib.process.lost_output import LOST
from vlarl_rllib.runs.directory import LOCK_FILE, RowLog, RunDirectory
from vlarl_rllib.settings import Settings, SettingsError


class TrialRun:
    """Written by the trial's own process. A disk that takes nothing costs rows, not the trial.

    Args:
        directory: Tune's.
        settings: of this trial.

    Raises:
        SettingsError: a `vlarl train --resume` is at it.
    """

    def __init__(self, directory: Path, settings: Settings) -> None:
        run = RunDirectory(directory)
        self._lock: int | None = None
        with LOST.counting("the trial's directory"):
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(directory / LOCK_FILE, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
            self._claim(directory)
            run.write_config(settings)
        self._log = RowLog(run)

    def _claim(self, directory: Path) -> None:
        """Shared: a process that Tune keeps for another trial may still hold it."""
        assert self._lock is not None, "just opened"
        try:
            fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise SettingsError(
                f"{directory} is in use by vlarl train --resume; stop that first, or leave the trial to it"
            ) from None

    @property
    def last(self) -> dict[str, Any] | None:
        """The newest row of earlier starts of this trial."""
        return self._log.rows[-1] if self._log.rows else None

    def add(self, row: dict[str, Any]) -> None:
        """Write an iteration down. One that is played again replaces itself and what followed."""
        self._log.add(row)

    def close(self) -> None:
        """Let others have the directory; safe to call twice."""
        if self._lock is not None:
            with suppress(OSError):
                os.close(self._lock)
            self._lock = None
