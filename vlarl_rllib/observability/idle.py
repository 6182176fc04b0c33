"""How long engines, learners and environments had nothing to do."""

from __future__ import annotations

from collections.abc import Sequence

from vlarl_rllib.engines.protocol import EngineStatus


class IdleTime:
    """Of one trial, iteration by iteration."""

    def __init__(self) -> None:
        self._busy: dict[int, float] = {}
        """Of each engine, by process, since it started."""

    def take(
        self,
        wall_seconds: float,
        *,
        learner_seconds: float,
        engines: Sequence[EngineStatus | None],
        env_seconds: float,
        num_processes: int,
    ) -> dict[str, float]:
        """Seconds of the iteration without work: of the learners, who work together, of all engines added up, and of
        all environment processes added up.

        Args:
            wall_seconds: that the iteration took.
            learner_seconds: in which learners were at work.
            engines: as they are at its end; None for one that does not answer, which has done nothing.
            env_seconds: that environments have worked, added up.
        """
        busy = {status.pid: status.busy_seconds for status in engines if status is not None}
        worked = sum(seconds - self._busy.get(pid, 0.0) for pid, seconds in busy.items())
        self._busy = busy
        idle = {
            "learners": wall_seconds - learner_seconds,
            "engines": wall_seconds * len(engines) - worked,
            "environments": wall_seconds * num_processes - env_seconds,
        }
        return {name: max(0.0, seconds) for name, seconds in idle.items()}
