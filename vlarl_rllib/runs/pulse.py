"""The line between `vlarl train` and its trial while the trial is busy: signs of life one way, the wish to end the
other.

Tune hears from a trial between iterations only. Both ends meet in the key-value store of Ray's GCS: it needs neither a
place on a disk that may be full, nor the same node, nor an actor of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import ray

from vlarl_rllib.observability.driver_callback import DriverCallback
from vlarl_rllib.process.calls import LISTEN_SECONDS
from vlarl_rllib.process.console import Word
from vlarl_rllib.process.signals import END
from vlarl_rllib.rllib_compat import Notes
from vlarl_rllib.runs.places import waits_for_places
from vlarl_rllib.settings import RuntimeArgs

logger = logging.getLogger(__name__)

BEAT_SECONDS = 2.0
FROZEN_SECONDS = 45.0
"""A trial without a sign of life for so long is frozen.

What holds Python's lock for long in a process that computes is far shorter.
"""

LOST_SECONDS = 30.0
"""Between two looks for bundles that have lost their node."""

RESTS = "rests"
"""Note of a trial that has kept what it has to keep before it is stopped."""


class Pulse:
    """The trial's end.

    Args:
        run_dir: names the line; None = nobody is at the other end.
    """

    def __init__(self, run_dir: str | None) -> None:
        self.ended = threading.Event()
        """Set when the run is to end."""
        self.doing = "the trial"
        """Whom a person is waiting for, until the first iteration is there."""
        self._stopped = threading.Event()
        self._run_dir = run_dir
        if run_dir is not None and ray.get_runtime_context().get_actor_id() is not None:  # in a process of its own
            threading.Thread(target=self._beat, args=(run_dir,), name="vlarl-pulse", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def rest(self) -> None:
        """All that is to be kept is kept: say so, and wait until the other end stops this process."""
        Notes.put(f"{self._run_dir}:{RESTS}", "1")
        threading.Event().wait()

    def _beat(self, run_dir: str) -> None:
        who, beats, next_beat = f"{ray.get_runtime_context().get_node_id()} {os.getpid()}", 0, 0.0
        while True:
            try:
                if time.monotonic() >= next_beat:
                    beats, next_beat = beats + 1, time.monotonic() + BEAT_SECONDS
                    Notes.put(f"{run_dir}:beat", f"{who} {beats} {self.doing}")
                if Notes.get(f"{run_dir}:end"):
                    self.ended.set()
            except Exception as error:  # the GCS is away: if for good, the driver ends the run
                logger.debug("pulse of %s: %s", run_dir, error)
            if self._stopped.wait(LISTEN_SECONDS):
                return


class Heartbeat:
    """The driver's view of one trial's signs of life.

    Args:
        run_dir: as the trial's.
    """

    def __init__(self, run_dir: str) -> None:
        self._run_dir = run_dir
        self._last: str | None = None
        self._silent_seconds, self._looked = 0.0, 0.0
        for key in ("beat", "end", RESTS):  # of the trial before
            Notes.remove(f"{run_dir}:{key}")

    def look(self) -> bool:
        """Whether the trial has been silent for too long; call it often.

        Time counts as silent only as far as this process was awake to listen: the two may have been stopped together.
        """
        now = time.monotonic()
        if now - self._looked >= BEAT_SECONDS:
            elapsed, self._looked = min(now - self._looked, 2 * BEAT_SECONDS), now
            beat = Notes.get(f"{self._run_dir}:beat")
            silent = beat is not None and beat == self._last
            self._silent_seconds = self._silent_seconds + elapsed if silent else 0.0
            self._last = beat
        return self._silent_seconds >= FROZEN_SECONDS

    @property
    def doing(self) -> str | None:
        """Whom the trial waits for; None before its first sign of life."""
        return self._last.split(maxsplit=3)[3] if self._last is not None else None

    def ask_to_end(self) -> None:
        """The trial is to keep what it has, and end."""
        Notes.put(f"{self._run_dir}:end", "1")

    @property
    def rests(self) -> bool:
        """Whether the trial has kept what it has; see `Pulse.rest`."""
        return Notes.get(f"{self._run_dir}:{RESTS}") is not None

    def kill(self, trial: Any) -> None:
        """End the trial's process: by its id, where it is on this node, since a trial that freezes while it starts has
        no handle yet."""
        if self._last is not None:
            node, pid, *_ = self._last.split()
            if node == ray.get_runtime_context().get_node_id():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        if trial.temporary_state.ray_actor is not None:  # else it is still starting, and Tune lets go of it
            ray.kill(trial.temporary_state.ray_actor)


class TrialWatch(DriverCallback):
    """The driver's end: passes the first signal on to the trial, kills a trial that is frozen or takes too long to end.

    Args:
        run_dir: as the trial's.
        plan: of the trial.
        say: is told every few seconds (`Word`) whom the first iteration waits for, and later every `LOST_SECONDS` what
            of a lost node has no place yet.
    """

    def __init__(self, run_dir: str, plan: RuntimeArgs, say: Callable[[str], None] = lambda line: None) -> None:
        self._heartbeat, self._plan, self._say = Heartbeat(run_dir), plan, say
        self._began = self._looked_for_places = time.monotonic()
        self.abandoned = False
        """Whether the trial was killed because the run is to end: it had nothing to keep, or took longer than it may.
        """
        self.is_frozen = False
        self.has_result = False
        self.is_complete = False
        self._told = False

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.has_result = True

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.is_complete = True

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called by Tune every tenth of a second."""
        if self.abandoned or not trials or trials[0].is_finished():
            return
        if END.signal is not None and not self._told:
            self._told = True
            if self.has_result:
                self._heartbeat.ask_to_end()
            else:
                self._abandon(trials[0])
        elif END.overdue:
            self._abandon(trials[0])
        else:
            self._look(trials[0])

    def _abandon(self, trial: Any) -> None:
        self.abandoned = True
        if trial.temporary_state.ray_actor is not None:  # else it is still starting, and Tune lets go of it
            ray.kill(trial.temporary_state.ray_actor)

    def _look(self, trial: Any) -> None:
        frozen = self._heartbeat.look()
        if not self.has_result and Word.is_due():
            doing = self._heartbeat.doing or waits_for_places(self._plan) or "the trial's process"
            self._say(f"waiting for {doing} ... {time.monotonic() - self._began:.0f} s")
        elif self.has_result and time.monotonic() - self._looked_for_places >= LOST_SECONDS:
            self._looked_for_places = time.monotonic()
            if lacking := waits_for_places(self._plan):
                self._say(f"waiting for {lacking}")
        if frozen and not self.is_frozen:
            self.is_frozen = True
            self._heartbeat.kill(trial)
