"""What lies in a run's directory, and where a new run goes.

runs/NAME/config.yaml       the resolved settings
          metrics.jsonl     one line per iteration (`result["vlarl"]`)
          summary.json      written at the end
          checkpoints/      complete checkpoints, the newest few
          trial_.../        Tune's result.json, progress.csv and TensorBoard files
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlarl_rllib.checkpoints import CheckpointStore
from vlarl_rllib.settings import Settings, SettingsError

RUNS = Path("runs")


@dataclass(frozen=True)
class RunDirectory:
    """One run's directory."""

    path: Path

    def settings(self) -> Settings:
        return Settings.from_yaml(self.path / "config.yaml")

    def write_config(self, settings: Settings) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"--run-dir: {self.path} cannot be made ({error.strerror}); give another directory") from None
        (self.path / "config.yaml").write_text(yaml.safe_dump(settings.to_dict(), sort_keys=False))
        latest = RUNS.resolve() / "latest"
        if self.path.parent == latest.parent and (latest.is_symlink() or not latest.exists()):
            latest.unlink(missing_ok=True)
            latest.symlink_to(self.path.name)

    def newest_checkpoint(self) -> Path | None:
        checkpoints = CheckpointStore(self.path / "checkpoints", keep=1).list()
        return checkpoints[-1] if checkpoints else None

    def read_rows(self) -> list[dict[str, Any]]:
        """The iterations so far; a line cut short by a kill ends the list."""
        rows: list[dict[str, Any]] = []
        if self._metrics.is_file():
            for line in self._metrics.read_text().splitlines():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError:
                    break
        return rows

    def keep_rows(self, iterations: int) -> list[dict[str, Any]]:
        """Drop the rows behind `iterations`, which a resumed run will play again."""
        rows = [row for row in self.read_rows() if row["iteration"] <= iterations]
        self._metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return rows

    def append_row(self, row: dict[str, Any]) -> None:
        with self._metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"


def new_run_directory(path: Path | None, stem: str, resume_from: Path | None) -> RunDirectory:
    """Where a new run goes. Raises `SettingsError` where that holds a run already, or `resume_from` is no checkpoint."""
    path = path or RUNS / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = RunDirectory(path.resolve())
    if run.read_rows() or run.newest_checkpoint():  # a run that failed before its first iteration may be started again in place
        raise SettingsError(f"--run-dir: {path} holds a run already; continue it with --resume, or give another directory")
    if resume_from is not None:
        try:
            CheckpointStore.resolve(resume_from)
        except FileNotFoundError as error:
            raise SettingsError(f"--resume-from: {error}") from None
    return run


def open_run_directory(path: Path) -> RunDirectory:
    """The directory of a run to be continued. Raises `SettingsError` where there is none, or nothing to continue from."""
    run = RunDirectory(path.resolve())  # runs/latest is a link, which `write_config` sets anew
    if not (run.path / "config.yaml").is_file():
        raise SettingsError(f"--run-dir: {path} holds no run (config.yaml is missing); give the directory of one, for example runs/latest")
    if run.newest_checkpoint() is None:
        raise SettingsError(f"--resume: {path} has no complete checkpoint to continue from; start the run again in another directory")
    return run


def check_unfinished(checkpoint: Path, settings: Settings) -> None:
    """Raise `SettingsError` where the checkpoint has all iterations that the settings ask for."""
    done = CheckpointStore.read_facts(CheckpointStore.resolve(checkpoint))["iteration"]
    if done >= settings.run.iterations:
        raise SettingsError(
            f"run.iterations: the checkpoint is at iteration {done} of {settings.run.iterations}, so nothing is left to do; "
            "start a new run with --resume-from and --set run.iterations=MORE"
        )
