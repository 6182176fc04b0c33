"""What lies in a run's directory, and where a new run goes.

runs/NAME/config.yaml       the resolved settings
          metrics.jsonl     one line per iteration (`result["vlarl"]`)
          summary.json      written at the end
          processes.json    who is who while it runs
          checkpoints/      complete checkpoints, the newest few
          trial_.../        Tune's result.json, progress.csv and TensorBoard files
          wandb/            with `run.wandb`: its id there, and W&B's own files

A run of `vlarl sft` has the first three and checkpoints, a line and a checkpoint every so many steps, and `model/`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vlarl_rllib.process.console import pasted
from vlarl_rllib.process.lost_output import LOST
from vlarl_rllib.process.own_files import refuse_links, replace_file
from vlarl_rllib.process.storage import Place, StoragePath
from vlarl_rllib.process.surroundings import cache_directory
from vlarl_rllib.runs.checkpoints import FACTS_FILE, CheckpointStore, Unit, number_of
from vlarl_rllib.runs.sealing import DamagedCheckpointError
from vlarl_rllib.settings import Settings, SettingsError

logger = logging.getLogger(__name__)

RUNS = Path("runs")
ERROR_FILE = "error.txt"
LOCK_FILE = ".lock"
WRITTEN = (
    "config.yaml",
    "metrics.jsonl",
    "summary.json",
    "report.html",
    "curves.png",
    "checkpoints",
    "videos",
    "model",
)
"""What a run writes over in its directory."""
COPIED = ("config.yaml", "metrics.jsonl", "summary.json", ERROR_FILE, "report.html", "curves.png")
"""What a command itself writes in it, and reads when it goes on."""
COMMANDS: dict[Unit, str] = {"iteration": "vlarl train", "step": "vlarl sft"}
"""Whose checkpoints count what."""


@dataclass(frozen=True)
class RunDirectory:
    """One run's directory. Of a run behind a URI the command works on a copy of its small files, and sends each one
    that has changed; the trial writes checkpoints, films and `processes.json` to where they belong."""

    path: Path
    """Of this machine."""
    storage: StoragePath | None = None
    """What the copy is of."""
    _sent: dict[str, tuple[int, int]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def place(self) -> Place:
        """What all nodes know the run's directory by."""
        return self.storage or self.path

    def fetch(self) -> None:
        """Make the copy of what there is. Raises `SettingsError` where the storage cannot be read."""
        if self.storage is None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            there = self.storage.sizes()
            for name in COPIED:
                file = self.path / name
                file.unlink(missing_ok=True)
                if name in there:
                    replace_file(file, (self.storage / name).read_bytes())
        except OSError as error:
            raise SettingsError(f"--run-dir: {self.storage} cannot be read ({' '.join(str(error).split())})") from None

    def send(self) -> None:
        """Write what has changed to where it belongs. Raises OSError where that fails."""
        if self.storage is None:
            return
        if not self._sent:
            self.storage.mkdir()
        for name in COPIED:
            file = self.path / name
            if file.is_file() and self._sent.get(name) != (now := (file.stat().st_size, file.stat().st_mtime_ns)):
                (self.storage / name).write_bytes(file.read_bytes())
                self._sent[name] = now

    def settings(self) -> Settings:
        return Settings.from_yaml(self.path / "config.yaml")

    @contextmanager
    def claimed(self, settings: Settings) -> Iterator[None]:
        """Make the directory ours and write its config.

        Raises `SettingsError` where that fails, or another process is at it.
        """
        with claimed(self.path, "--run-dir"):
            self.write_config(settings)
            try:
                self.send()
            except OSError as error:
                raise SettingsError(
                    f"--run-dir: {self.storage} cannot be written to ({' '.join(str(error).split())})"
                ) from None
            yield

    def write_config(self, settings: Settings) -> None:
        """`config.yaml`; of a run in `runs`, `runs/latest` leads to it."""
        replace_file(self.path / "config.yaml", yaml.safe_dump(settings.to_dict(), sort_keys=False))
        latest = RUNS.resolve() / "latest"
        if self.path.parent == latest.parent and (latest.is_symlink() or not latest.exists()):
            # renamed into place: another run may start in the same moment
            new = latest.with_name(f".{latest.name}.{os.getpid()}")
            new.unlink(missing_ok=True)
            new.symlink_to(self.path.name)
            new.replace(latest)

    def write_error(self, text: str) -> None:
        """What went wrong last, in `error.txt`."""
        with LOST.counting(ERROR_FILE):
            replace_file(self.path / ERROR_FILE, text)
            self.send()

    def checkpoints(self, keep: int = 1, unit: Unit = "iteration") -> CheckpointStore:
        return CheckpointStore(self.place / "checkpoints", keep, unit)

    def newest_checkpoint(
        self, unit: Unit = "iteration", passed_over: Callable[[str], None] | None = None
    ) -> Place | None:
        """See `CheckpointStore.newest`."""
        return self.checkpoints(unit=unit).newest(passed_over)

    def read_summary(self) -> dict[str, Any] | None:
        """`summary.json`, None before the end."""
        file = self.path / "summary.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def read_rows(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl` so far; the last one is left out where a kill has cut it short.

        Raises:
            SettingsError: another line is damaged, or no row.
        """
        rows: list[dict[str, Any]] = []
        lines = self._metrics.read_bytes().splitlines() if self._metrics.is_file() else []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                if number == len(lines) and line.startswith(b"{"):
                    break
                row = None
            if not isinstance(row, dict) or not any(isinstance(row.get(unit), int) for unit in COMMANDS):
                raise SettingsError(
                    f"{self._metrics}: line {number} is no row of a run; put the file back, or cut it there"
                )
            rows.append(row)
        return rows

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"


class RowLog:
    """The iterations of a run, in memory and in `metrics.jsonl`. An iteration that is played again replaces itself and
    what followed it.

    A full disk does not end the run: what could not be written is written with the next row.

    Args:
        run: whose rows.
        unit: what counts them, and is a key of each.
    """

    def __init__(self, run: RunDirectory, unit: Unit = "iteration") -> None:
        self._run, self._file, self._unit = run, run._metrics, unit
        self.rows = run.read_rows()
        self._whole = True  # also mends a line that a kill cut short
        self._failed = False

    def forget_after(self, number: int) -> None:
        """Leave out the rows behind it, which are going to be played again."""
        self.rows = [row for row in self.rows if row[self._unit] <= number]
        self._whole = True

    def add(self, row: dict[str, Any]) -> int:
        """Append a row; returns how many were played again."""
        kept = [earlier for earlier in self.rows if earlier[self._unit] < row[self._unit]]
        repeated = len(self.rows) - len(kept)
        self.rows = [*kept, row]
        failed_before, self._whole = self._whole and self._failed, self._whole or repeated > 0
        try:
            if self._whole:
                self.write()
            else:
                with self._file.open("a") as file:
                    file.write(_line(row))
                self._run.send()
        except OSError as error:
            self._whole = self._failed = True
            if not failed_before:
                logger.warning("%s: %s; the rows go out when they can be written again", self._file, error)
        return repeated

    def write(self) -> None:
        """Write what is not written yet. Raises OSError where that fails again."""
        if self._whole and self.rows:
            replace_file(self._file, "".join(map(_line, self.rows)))
            self._run.send()
            self._whole = self._failed = False


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def how_to_go_on(run: RunDirectory, unit: Unit = "iteration") -> str:
    """The command that continues a run."""
    newest = run.checkpoints(unit=unit).newest(contents=False)  # whoever has sent a signal does not wait for them
    if newest is None:
        return "nothing was finished yet that could be kept: start again with the same command"
    return f"continue from {unit} {number_of(newest)} with: {COMMANDS[unit]} --resume --run-dir {pasted(run.place)}"


@contextmanager
def claimed(directory: Path, option: str) -> Iterator[None]:
    """Make a directory and keep other processes from claiming it.

    Raises `SettingsError`, naming `option`, where that fails, or one has it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / LOCK_FILE, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise SettingsError(
            f"{option}: {directory} cannot be made ({error.strerror}); give another directory"
        ) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
        except BlockingIOError:
            raise SettingsError(
                f"{option}: {directory} is in use by a running process; stop that first, or give another directory"
            ) from None
        except OSError as error:  # NFS without its lock service, Lustre without the option flock
            logger.warning("%s has no locks (%s): nothing keeps a second process from it", directory, error.strerror)
        yield
    finally:
        os.close(lock)


def run_at(place: Place) -> RunDirectory:
    """The run's directory there; for one behind a URI its copy on this machine, made anew."""
    if not isinstance(place, StoragePath):
        return RunDirectory(place.resolve())
    name = f"{place.name}-{hashlib.sha256(place.uri.encode()).hexdigest()[:12]}"
    run = RunDirectory(cache_directory() / "runs" / name, place)
    run.fetch()
    return run


def new_run_directory(
    path: Place | None, stem: str, resume_from: Path | None, *, again: Unit | None = None
) -> RunDirectory:
    """Where a new run goes.

    Args:
        again: of the command that starts anew where a run of its own ended before the first checkpoint.

    Raises `SettingsError` where that holds a run already, or `resume_from` is no checkpoint.
    """
    path = path or RUNS / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = run_at(path)
    refuse_links(run.path, "--run-dir")
    foreign = (
        []
        if run.storage or (run.path / LOCK_FILE).exists()
        else [name for name in WRITTEN if (run.path / name).exists()]
    )
    if foreign:
        raise SettingsError(
            f"--run-dir: {path} holds a {foreign[0]} that is no run's and would be written over; give another directory"
        )
    # a run that failed before its first iteration may be started again in place
    rows = [row for row in run.read_rows() if again not in row]
    if rows or any(run.checkpoints(unit=unit).list() for unit in COMMANDS):
        raise SettingsError(
            f"--run-dir: {path} holds a run already; continue it with --resume, or give another directory"
        )
    if resume_from is not None:
        find_checkpoint(resume_from)
    return run


def find_checkpoint(path: Place) -> Place:
    """The checkpoint at `path`, behind a pointer there, or the newest one of the run there.

    Raises `SettingsError` where there is none.
    """
    newest = CheckpointStore(path / "checkpoints", 1).newest(passed_over=logger.warning)
    if newest is not None:
        return newest
    try:
        found = CheckpointStore.resolve(path)
    except (FileNotFoundError, DamagedCheckpointError) as error:
        raise SettingsError(f"--resume-from: {error}") from None
    if not (found / FACTS_FILE).is_file():
        raise SettingsError(
            f"--resume-from: {path} is a checkpoint of vlarl sft; set model.path to model/ in the directory of that run"
        )
    return found


def open_run_directory(path: Place, unit: Unit = "iteration") -> RunDirectory:
    """The directory of a run to be continued, by the command whose checkpoints count in `unit`s.

    Raises `SettingsError` where there is none, or nothing to continue from.
    """
    run = run_at(path)  # runs/latest is a link, which `claimed` sets anew
    if not (run.path / "config.yaml").is_file():
        raise SettingsError(
            f"--run-dir: {path} holds no run (config.yaml is missing); give the directory of one, for example "
            "runs/latest"
        )
    refuse_links(run.path, "--run-dir")
    damages: list[str] = []
    newest = run.newest_checkpoint(unit, damages.append)
    if newest is None:
        damage = f" ({'; '.join(damages)})" if damages else ""
        raise SettingsError(
            f"--resume: {path} has no complete checkpoint of {COMMANDS[unit]} to continue from{damage}; start "
            "the run again in another directory"
        )
    for damage in damages:
        logger.warning("%s; going on from %s", damage, newest.name)
    return run


def is_complete(checkpoint: Place, settings: Settings) -> bool:
    """Whether the checkpoint has all iterations that the settings ask for."""
    return _iteration_of(checkpoint) >= settings.run.iterations


def _iteration_of(checkpoint: Place) -> int:
    return int(CheckpointStore.read_facts(CheckpointStore.resolve(checkpoint))["iteration"])


def check_unfinished(checkpoint: Place, settings: Settings) -> None:
    """Raise `SettingsError` where the checkpoint has all iterations that the settings ask for."""
    if (done := _iteration_of(checkpoint)) >= settings.run.iterations:
        raise SettingsError(
            f"run.iterations: the checkpoint is at iteration {done} of {settings.run.iterations}, so nothing is "
            "left to do; "
            "start a new run with --resume-from and --set run.iterations=MORE"
        )


def sft_is_complete(run: RunDirectory, settings: Settings) -> bool:
    """Whether a run of `vlarl sft` has made all its steps."""
    return bool((run.read_summary() or {}).get("steps", 0) >= settings.sft.steps)


def check_sft_unfinished(run: RunDirectory, settings: Settings) -> None:
    """Raise `SettingsError` where a run of `vlarl sft` has made all its steps."""
    if sft_is_complete(run, settings):
        raise SettingsError(
            f"sft.steps: all {settings.sft.steps} steps are made, and {run.path.name}/model is there; for more "
            "start a new run from it"
        )
