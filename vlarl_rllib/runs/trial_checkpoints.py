"""The checkpoints of one trial: which one it goes on from, and what a failed one costs."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from vlarl_rllib.learner.rank_group import LearnerError, LearnerGroupError
from vlarl_rllib.process.lost_output import LOST
from vlarl_rllib.process.own_files import replace_file
from vlarl_rllib.process.storage import Place, place_of
from vlarl_rllib.runs.checkpoints import CheckpointStore, number_of
from vlarl_rllib.runs.sealing import DamagedCheckpointError

logger = logging.getLogger(__name__)

LEFT_FILE = "left_behind.txt"
"""Name of the checkpoint that an end has left, beside it."""


class TrialCheckpoints:
    """Saved and restored by an Algorithm, which says what is in them.

    Args:
        run_dir: of `vlarl train`, which keeps the newest `keep`.
        trial: Tune's directory, where no `run_dir` is named, and then Tune decides what is kept; with neither there is
            no store.
        restore_from: what to begin with where the trial has none of its own.
        faults: counts `failed_checkpoints` and `damaged_checkpoints`.
    """

    def __init__(
        self, run_dir: str | None, trial: Path | None, keep: int, restore_from: str | None, faults: Counter[str]
    ) -> None:
        self.store: CheckpointStore | None = None
        if run_dir:
            self.store = CheckpointStore(place_of(run_dir) / "checkpoints", keep)
        elif trial:
            self.store = CheckpointStore(trial / "checkpoints", keep=1, pointers=trial)
        self.origin: Place | None = None
        """What was saved or restored last."""
        self._trial, self._restore_from, self._faults = trial, restore_from, faults

    def newest(self) -> Place | str | None:
        """What to go on from, None = the model as it is.

        A trial may go on from another's (population based training), so its own newest is not always the one.
        """
        if self.origin is not None:
            try:
                return CheckpointStore.resolve(self.origin)
            except (FileNotFoundError, DamagedCheckpointError) as error:
                self.pass_over(str(error))
        return (self.store.newest(self.pass_over) if self.store else None) or self._restore_from

    def behind(self, pointer: Path) -> Place:
        """What Tune's pointer leads to; where `leave` has named a newer one of this trial, that.

        Raises:
            FileNotFoundError: there is none.
            DamagedCheckpointError: it is not as it was written.
        """
        target = CheckpointStore.resolve(pointer)
        note = self.store.root / LEFT_FILE if self.store is not None else None
        if note is None or not isinstance(note, Path) or not note.is_file():
            return target
        left = note.with_name(note.read_text().strip() or "none")
        note.unlink()  # what the trial does from now on has nothing to do with it
        try:
            return CheckpointStore.resolve(left) if number_of(left) > number_of(target) else target
        except (FileNotFoundError, DamagedCheckpointError, ValueError) as error:
            self.pass_over(str(error))
            return target

    def leave(self) -> None:
        """Name the newest one for the next start of this trial: the run ends before Tune hears of it."""
        if (
            self.store is not None
            and isinstance(self.store.root, Path)
            and self.origin is not None
            and self.origin.parent == self.store.root
        ):
            with LOST.counting(LEFT_FILE):
                replace_file(self.store.root / LEFT_FILE, self.origin.name)

    def pass_over(self, damage: str) -> None:
        """Count a checkpoint that cannot be used."""
        logger.warning("%s; an older checkpoint is taken", damage)
        self._faults["damaged_checkpoints"] += 1

    def has(self, iteration: int) -> bool:
        """Whether this trial has saved that iteration, or a later one."""
        return (
            self.store is not None
            and self.origin is not None
            and self.origin.parent == self.store.root
            and number_of(self.origin) >= iteration
        )

    def save(self, iteration: int, write: Callable[[Place], None]) -> None:
        """`write` a checkpoint into the store; a failure is counted, and the older ones stay."""
        assert self.store is not None, "there is no directory to save into"
        try:
            with self.store.writing(iteration) as partial:
                write(partial)
        except (OSError, LearnerError, LearnerGroupError) as error:
            logger.warning("no checkpoint of iteration %d: %s", iteration, error)
            self._faults["failed_checkpoints"] += 1
        else:
            self.origin = self.store.written

    def point(self, directory: Path) -> None:
        """Leave a pointer to the newest one in what Tune is going to move into the trial's directory."""
        CheckpointStore.write_pointer(directory, self.origin, self._trial and self._trial / directory.name)
