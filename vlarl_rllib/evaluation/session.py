"""One evaluation from the question to the report: `evaluate_policy` for programs, `run_evaluation` for the command
line."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Self

from vlarl_rllib.evaluation.libero_protocol import EvaluationRequest
from vlarl_rllib.evaluation.output import EvaluationDirectory, open_evaluation
from vlarl_rllib.evaluation.report import INCOMPLETE, EvaluationResult, summarize, to_table, write_reports
from vlarl_rllib.process.console import make_console, make_progress, pasted
from vlarl_rllib.process.lost_output import KEEP_TRYING_SECONDS, keep_trying
from vlarl_rllib.process.signals import END
from vlarl_rllib.settings import SettingsError

if TYPE_CHECKING:
    from rich.console import Console

    from vlarl_rllib.rollout.evaluation import EvaluationRound
    from vlarl_rllib.types import Start

logger = logging.getLogger(__name__)

ROUND_SECONDS = 5.0
"""After so long runners return what is finished.

It is what Ctrl-C waits for and a kill costs; to end and begin a round takes some 0.02 s.
"""
LINE_SECONDS = 30.0
"""Between two lines of progress where there is no terminal."""
SPEED_WINDOW_SECONDS = 600.0
"""What the remaining time is estimated from: an episode may take minutes on a CPU."""


class Watch:
    """Sees an evaluation go by; the base class lets it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return

    def ready(self) -> None:
        """All actors have started; episodes begin."""

    def keep_going(self, played: EvaluationRound) -> bool:
        """A round is over and its episodes are kept; False ends the evaluation here."""
        return True

    def mended(self, restarts: Mapping[str, int]) -> None:
        """How often something died and was replaced."""


def evaluate_policy(request: EvaluationRequest, out: str | Path) -> EvaluationResult:
    """Evaluate a policy, or go on with the evaluation that is in `out`; uses a running Ray, else starts one and ends
    it.

    Raises:
        SettingsError: a mistake in the request, or `out` holds something else.
        RuntimeError: engines, runners or environments fail again and again. What was finished is kept.
    """
    request.check()
    with open_evaluation(Path(out), request.question()) as directory:
        return _evaluate(request, directory, Watch())


def run_evaluation(request: EvaluationRequest, out: Path) -> int:
    """`vlarl eval`: the same with progress, a table and signals; the process's exit code.

    0 = done, 128 + signal = ended by a signal (130 for Ctrl-C), 1 = failed. What was finished is kept in each case.
    """
    console = make_console()
    request.check()
    where = pasted(out)
    END.words = lambda: f"what was finished is kept; the same command with --out {where} goes on"
    with open_evaluation(out, request.question()) as directory:
        watch = _Terminal(console, directory, total=len(request.starts()))
        before = f", {len(directory.episodes)} of them played before" if directory.episodes else ""
        console.print(f"evaluation directory {where}: {watch.total} episodes{before}")
        if directory.versions_before:
            console.print(
                f"versions have changed since it began: {_changes(directory.versions_before)}", style="yellow"
            )
        try:
            result = _evaluate(request, directory, watch)
        except KeyboardInterrupt:
            result = _report(request, directory)
        except SettingsError:
            raise
        except Exception as error:  # the boundary to the user; actors have died or a disk is full
            from vlarl_rllib.errors import one_line

            console.print(f"the evaluation failed: {one_line(error)}", style="red")
            console.print(
                f"{len(directory.episodes)} of {watch.total} episodes are kept; the same command goes on from there"
            )
            return 1
    if result.episodes:
        console.print(to_table(result))
    if not result.complete:
        if result.episodes:
            console.print(INCOMPLETE, style="yellow")
        console.print(
            f"stopped; the same command with --out {where} plays the other "
            f"{result.num_planned - len(result.episodes)} episodes"
        )
        return END.code
    if result.deviations:
        console.print(f"not the published protocol: {'; '.join(result.deviations)}", style="dim")
    console.print(f"done: {where}/report.md")
    return 0


def _evaluate(request: EvaluationRequest, directory: EvaluationDirectory, watch: Watch) -> EvaluationResult:
    """Play what is not there yet; the reports are written however it ends."""
    finished = directory.finished
    starts = [start for start in request.starts() if (start.task_id, start.initial_state) not in finished]
    try:
        if starts:
            _play(request, directory, starts, watch)
    finally:
        result = _report(request, directory)
    return result


def _play(request: EvaluationRequest, directory: EvaluationDirectory, starts: list[Start], watch: Watch) -> None:
    from vlarl_rllib.evaluation.workers import evaluation_plan, start_workers
    from vlarl_rllib.runs.ray_session import ray_session

    settings = request.settings(starts)
    record = _to_record(request, starts)
    with (
        ray_session(evaluation_plan(settings), settings),
        watch,
        start_workers(settings, directory.path.name) as workers,
    ):
        watch.ready()
        for played in workers.calls.evaluate(starts, change_tasks=True, seconds=ROUND_SECONDS, record=record):
            directory.add(played.results)
            if not watch.keep_going(played):
                break
        watch.mended(workers.restarts())


def _to_record(request: EvaluationRequest, starts: list[Start]) -> frozenset[Start]:
    from vlarl_rllib.rollout.video import can_encode

    if request.videos and not can_encode():
        logger.warning("no videos: imageio-ffmpeg is not installed; run: pip install imageio-ffmpeg")
        return frozenset()
    return frozenset(start for start in starts if start.initial_state < request.videos)


def _report(request: EvaluationRequest, directory: EvaluationDirectory) -> EvaluationResult:
    result = summarize(
        directory.question, directory.episodes, request.instructions(), request.held_out(), request.deviations()
    )

    def write() -> None:
        directory.write()
        write_reports(directory.path, result)

    if unwritten := keep_trying(write, KEEP_TRYING_SECONDS if END.signal is None else 0.0):
        raise unwritten
    return result


def _changes(before: dict[str, str]) -> str:
    from vlarl_rllib.runs.versions import installed_versions

    now = installed_versions()
    return ", ".join(
        f"{name} {before.get(name)} -> {now.get(name)}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    )


class _Terminal(Watch):
    """A progress bar, or lines where there is no terminal; the first Ctrl-C or SIGTERM ends the evaluation after the
    round."""

    def __init__(self, console: Console, directory: EvaluationDirectory, total: int) -> None:
        self.total = total
        self._console, self._directory = console, directory
        self._known = len(directory.episodes)
        self._steps, self._began, self._said = 0, 0.0, 0.0
        self._faults: Counter[str] = Counter()
        self._progress = make_progress(console, "{task.description}", speed_estimate_period=SPEED_WINDOW_SECONDS)
        self._bar = self._progress.add_task("starting", total=total, completed=self._known, shown="")
        self._polled = ExitStack()

    def __enter__(self) -> Self:
        logging.getLogger("ray.rllib").setLevel(
            logging.CRITICAL
        )  # it shows each death as a traceback; what was mended is told at the end
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._polled.close()
        self._progress.stop()

    def ready(self) -> None:
        self._polled.enter_context(END.polled(self._notice))  # until here, a signal raises KeyboardInterrupt
        self._began = self._said = time.monotonic()
        self._progress.reset(self._bar, completed=self._known, description="episodes", shown="")

    def keep_going(self, played: EvaluationRound) -> bool:
        self._steps += played.num_steps
        self._faults["env_deaths"] += played.env_deaths
        episodes = self._directory.episodes
        rate = (
            f"{100 * sum(episode['success'] for episode in episodes) / len(episodes):.1f} % success so far  "
            if episodes
            else ""
        )
        rates = f"{rate}{self._steps / (time.monotonic() - self._began):.1f} steps/s"
        self._progress.update(self._bar, completed=len(episodes), shown=rates)
        if not self._console.is_terminal and time.monotonic() - self._said > LINE_SECONDS:
            self._said = time.monotonic()
            self._console.print(f"{len(episodes)}/{self.total} episodes  {rates}")
        return END.signal is None

    def mended(self, restarts: Mapping[str, int]) -> None:
        self._faults.update(restarts)
        seconds, played = time.monotonic() - self._began, len(self._directory.episodes) - self._known
        faults = "".join(f", {name} {count}" for name, count in self._faults.items() if count)
        self._console.print(
            f"{played} episodes, {self._steps} steps in {seconds:.1f} s, {self._steps / seconds:.1f} steps/s{faults}"
        )

    def _notice(self, name: str) -> None:
        self._console.print(
            f"{name}: ending within {ROUND_SECONDS:g} s, finished episodes are kept; once more to end at once"
        )
