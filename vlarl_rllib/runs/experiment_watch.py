"""`vlarl tune`'s end of the line to its trials: signals are passed on, frozen trials end, a start is not silent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from vlarl_rllib.observability.driver_callback import DriverCallback
from vlarl_rllib.process.console import Word
from vlarl_rllib.process.signals import END
from vlarl_rllib.rllib_compat import trial_path
from vlarl_rllib.runs.places import waits_for_places
from vlarl_rllib.runs.pulse import Heartbeat
from vlarl_rllib.settings import RuntimeArgs

RUNNING, WAITING = "RUNNING", "PENDING"
"""Tune's words for trials that train, and that start or wait for their turn."""


class ExperimentWatch(DriverCallback):
    """Looks at every trial of an experiment.

    Args:
        say: is told every few seconds (`Word`), while no trial trains, whom the next one waits for.
        plan_of: of a trial.
        on_frozen: is told of a trial that gives no sign of life; it is killed, and Tune starts it anew.
        on_finished: is told of each trial that has ended, with its last checkpoint written.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        plan_of: Callable[[Any], RuntimeArgs],
        on_frozen: Callable[[Any], None],
        on_finished: Callable[[Any], None],
    ) -> None:
        self.interrupted = threading.Event()
        """Set when nothing more is to be waited for: every trial has kept what it has."""
        self.to_write = threading.Event()
        """Set when Tune's state has to be written: a trial has ended, and is not to be played again after a kill."""
        self._say, self._plan_of, self._on_frozen, self._on_finished = say, plan_of, on_frozen, on_finished
        self._finished: set[str] = set()
        self._heartbeats: dict[str, Heartbeat] = {}
        self._since = time.monotonic()
        self._asked: list[tuple[Any, Heartbeat]] | None = None

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._heartbeats.pop(trial.trial_id, None)  # it may be another process now

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called by Tune every tenth of a second."""
        for trial in trials:
            if trial.is_finished() and trial.trial_id not in self._finished:
                self._finished.add(trial.trial_id)
                self._on_finished(trial)
                self.to_write.set()
        if END.signal is not None:
            self._end(trials)
            return
        running = [trial for trial in trials if trial.status == RUNNING]
        for trial in running:
            if self._heartbeat(trial).look():
                self._heartbeats.pop(trial.trial_id).kill(trial)
                self._on_frozen(trial)
        if running:
            self._since = Word.last = time.monotonic()
        else:
            self._say_whom_it_waits_for([trial for trial in trials if trial.status == WAITING])

    def _heartbeat(self, trial: Any) -> Heartbeat:
        if trial.trial_id not in self._heartbeats:
            self._heartbeats[trial.trial_id] = Heartbeat(trial_path(trial))
        return self._heartbeats[trial.trial_id]

    def _say_whom_it_waits_for(self, waiting: list[Any]) -> None:
        if not waiting or not Word.is_due():
            return
        for trial in waiting:
            self._heartbeat(trial).look()
        at_work = (self._heartbeat(trial).doing for trial in waiting)
        doing = next((doing for doing in at_work if doing), None) or waits_for_places(self._plan_of(waiting[0]))
        doing = doing or "the next trial's process"
        self._say(f"waiting for {doing} ... {time.monotonic() - self._since:.0f} s")

    def _end(self, trials: list[Any]) -> None:
        """Ask all that train to keep what they have; done when they have, or have ended, or when the time is over."""
        if self._asked is None:
            training = [trial for trial in trials if trial.status == RUNNING and trial.last_result]
            self._asked = [(trial, self._heartbeat(trial)) for trial in training]
            for _, heartbeat in self._asked:
                heartbeat.ask_to_end()
        if END.overdue or all(trial.status != RUNNING or heartbeat.rests for trial, heartbeat in self._asked):
            self.interrupted.set()
