"""Greedy evaluation in a runner: which slot plays which start, and what came of it.

The driver (`runner_pool.RunnerCalls.evaluate`) says which starts this runner may begin. It counts: a start that is lost
here with its environment goes back there, and whoever comes first plays it again.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from vlarl_rllib.envs.registry import training_and_held_out_states
from vlarl_rllib.envs.vector import SlotEvent
from vlarl_rllib.rollout.video import encode_mp4
from vlarl_rllib.settings import Settings
from vlarl_rllib.types import EnvSpec, EpisodeResult, SampleReply, SampleRequest, Start

logger = logging.getLogger(__name__)


@dataclass
class EvaluationRound:
    """What one call of `VLAEnvRunner.evaluate` brought."""

    results: list[EpisodeResult] = field(default_factory=list)
    dropped: list[Start] = field(default_factory=list)
    """Starts whose episode died with its environment process; they are to be played again."""
    num_steps: int = 0
    env_deaths: int = 0
    engine_error: str | None = None


class StartQueue:
    """Which start each slot of a runner plays next.

    A slot stays on its task while that has starts: another one costs its process the build of a model (LIBERO: 3-12 s).
    Then it turns to the task with the most starts for the slots that play it, as far as its process may hold the model.

    Args:
        slot_tasks: the task that each slot begins with.
        processes: the slots of each subprocess.
        models_per_process: tasks that the slots of one subprocess may play at the same time.
        change_tasks: False = a slot only ever plays the task that it began with.
    """

    def __init__(
        self,
        slot_tasks: Sequence[int],
        processes: Sequence[Sequence[int]],
        models_per_process: int,
        *,
        change_tasks: bool,
    ) -> None:
        self.playing: dict[int, Start] = {}
        """By slot, the start of its running episode."""
        self._task = dict(enumerate(slot_tasks))
        self._neighbours = {slot: [other for other in slots if other != slot] for slots in processes for slot in slots}
        self._models, self._change_tasks = models_per_process, change_tasks
        self._waiting: dict[int, deque[Start]] = {}

    def refill(self, starts: Sequence[Start]) -> None:
        """Replace what waits by `starts`; what is being played goes on."""
        self._waiting = {}
        for start in starts:
            self._waiting.setdefault(start.task_id, deque()).append(start)

    def take(self, slot: int) -> Start | None:
        """The slot's next start; None = nothing that it may play now."""
        task = self._choose(slot)
        if task is None:
            return None
        start = self._waiting[task].popleft()
        self._task[slot], self.playing[slot] = task, start
        return start

    def finish(self, slot: int) -> Start:
        """The slot's episode is over; returns its start."""
        return self.playing.pop(slot)

    def _choose(self, slot: int) -> int | None:
        own, neighbours = self._task[slot], self._neighbours[slot]
        allowed = {task for task, starts in self._waiting.items() if starts}
        played_beside = {self.playing[other].task_id for other in neighbours if other in self.playing}
        if not self._change_tasks:
            allowed &= {own}
        elif len(played_beside) >= self._models:
            allowed &= played_beside
        loaded = {self._task[other] for other in neighbours}
        players = Counter(start.task_id for start in self.playing.values())
        share = {task: len(self._waiting[task]) / (1 + players[task]) for task in allowed}
        return max(allowed, key=lambda task: (task == own, task in loaded, share[task], -task), default=None)


class Evaluation:
    """The players of one runner for as long as an evaluation lasts, and what they have brought since the last call.

    Args:
        queue: of the runner.
        num_slots: of the runner.
        frames_per_second: of its videos.
    """

    def __init__(self, queue: StartQueue, num_slots: int, frames_per_second: float) -> None:
        self.queue, self.frames_per_second = queue, frames_per_second
        self.players = {slot: EvaluationPlayer(slot, self) for slot in range(num_slots)}
        self.round = EvaluationRound()
        self.record: Collection[Start] = ()
        self._deadline = math.inf

    def begin_round(self, starts: Sequence[Start], seconds: float | None, record: Collection[Start]) -> None:
        """Offer `starts` beside those being played. After `seconds` running episodes rest, for the next round; None =
        play to the end.

        Episodes from a start in `record` are filmed.
        """
        self.round = EvaluationRound()
        self.record = record
        self._deadline = math.inf if seconds is None else time.monotonic() + seconds
        self.queue.refill(starts)

    @property
    def has_time(self) -> bool:
        return time.monotonic() < self._deadline


class EvaluationPlayer:
    """Plays greedy episodes from the starts that a queue gives to its slot."""

    def __init__(self, slot: int, evaluation: Evaluation) -> None:
        self._slot, self._evaluation = slot, evaluation
        self._length, self._reward = 0, 0.0
        self._instruction = ""
        self._image: np.ndarray | None = None
        self._frames: list[np.ndarray] | None = None

    @property
    def every_frame(self) -> bool:
        """Of an episode that is filmed."""
        return self._frames is not None

    def next_start(self) -> Start | None:
        self._image = self._frames = None
        return self._evaluation.queue.take(self._slot)

    def started(self, event: SlotEvent) -> None:
        self._instruction, self._image = event.instruction, event.image
        self._length, self._reward = 0, 0.0
        if event.image is not None and self._evaluation.queue.playing[self._slot] in self._evaluation.record:
            self._frames = [event.image]

    def wants_action(self) -> bool:
        return self._evaluation.has_time

    def request(self) -> SampleRequest:
        assert self._image is not None, "a request without a frame"
        return SampleRequest(self._image, self._instruction, 0, 0.0)

    def stepped(self, reply: SampleReply, event: SlotEvent) -> None:
        self._image = event.image
        self._length += event.num_steps
        self._reward += sum(event.rewards)
        self._evaluation.round.num_steps += event.num_steps
        if self._frames is not None and event.image is not None:
            self._frames += (*event.frames, event.image)
        if event.ended:
            start = self._evaluation.queue.finish(self._slot)
            result = EpisodeResult(
                event.task_id, event.initial_state, self._length, event.success, self._reward, self._film(start)
            )
            self._evaluation.round.results.append(result)

    def dropped(self) -> None:
        if self._slot in self._evaluation.queue.playing:
            self._evaluation.round.dropped.append(self._evaluation.queue.finish(self._slot))

    def _film(self, start: Start) -> bytes | None:
        """The episode as MP4; None where it was not to be filmed, or cannot be here, which is no reason to lose its
        result."""
        frames, self._frames = self._frames, None
        if frames is None or start not in self._evaluation.record:
            return None
        try:
            return encode_mp4(frames, self._evaluation.frames_per_second)
        except (ImportError, OSError, RuntimeError) as error:
            logger.warning("no video of task %d, initial state %d: %s", start.task_id, start.initial_state, error)
            return None


def held_out_starts(settings: Settings, episodes: int) -> list[Start]:
    """The starts of an evaluation: the same every time, the tasks in turn, at most `episodes`."""
    spec = EnvSpec(name=settings.env.name, suite=settings.env.suite)
    held_out = {task: training_and_held_out_states(spec, task)[1] for task in settings.task_ids}
    rounds = range(max(map(len, held_out.values())))
    starts = [Start(task, held_out[task][i], seed=i) for i in rounds for task in held_out if i < len(held_out[task])]
    return starts[:episodes]
