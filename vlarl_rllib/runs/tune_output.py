"""Tune's own files, written so that none of them can end a trial: result.json, progress.csv, TensorBoard's."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

from ray import tune
from ray.tune.logger import CSVLoggerCallback, JsonLoggerCallback, LoggerCallback, TBXLoggerCallback

from vlarl_rllib.process.lost_output import LOST
from vlarl_rllib.rllib_compat import tolerant_tune


class _Tolerant(LoggerCallback):
    """Beside one of Tune's loggers: what it cannot write is lost, and the next result opens its file again."""

    _trial_files: dict[Any, Any]

    def log_trial_start(self, trial: Any) -> None:
        with LOST.counting(type(self).__name__):
            super().log_trial_start(trial)

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        try:
            super().log_trial_result(iteration, trial, result)
        except OSError:
            LOST.count += 1
            self._forget(trial)

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        try:
            super().log_trial_end(trial, failed)
        except OSError:
            LOST.count += 1
            self._forget(trial)

    def _forget(self, trial: Any) -> None:
        if file := self._trial_files.pop(trial, None):
            with contextlib.suppress(OSError):  # of what it still holds
                file.close()


class TolerantJson(_Tolerant, JsonLoggerCallback):
    """result.json"""


class TolerantCSV(_Tolerant, CSVLoggerCallback):
    """progress.csv"""


class TolerantTensorBoard(_Tolerant, TBXLoggerCallback):
    """TensorBoard's event files.

    Their writer is a thread behind a queue, and who fills the queue of a dead one waits for ever.
    """

    def __init__(self) -> None:
        super().__init__()
        self._summary_writer_cls = partial(self._summary_writer_cls, max_queue=0)  # type: ignore[has-type]  # no bound

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        writer = self._trial_writer.get(trial)
        if writer is not None and not writer.file_writer.event_writer._worker.is_alive():
            LOST.count += 1
            self._forget(trial)
        super().log_trial_result(iteration, trial, result)

    def _forget(self, trial: Any) -> None:
        self._trial_result.pop(trial, None)
        if writer := self._trial_writer.pop(trial, None):
            # nobody will read it, and the process could not end
            writer.file_writer.event_writer._event_queue.cancel_join_thread()


def fit(tuner: tune.Tuner) -> list[Any]:
    """`Tuner.fit` of a command; what its trials, or Tune itself, failed with."""
    errors: list[Any] = []
    try:
        with tolerant_tune(lambda trial, error: errors.append(error)):
            tuner.fit()
    except Exception as error:  # Tune's own: of the trial's, of its files
        errors.append(error)
    return errors


def loggers() -> list[LoggerCallback]:
    """In place of those that Tune adds by itself."""
    return [TolerantCSV(), TolerantJson(), TolerantTensorBoard()]
