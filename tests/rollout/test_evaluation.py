"""Evaluation in a runner: which start a slot takes, and what an episode reports."""

import imageio_ffmpeg
import numpy as np
import pytest

from vlarl_rllib.envs.vector import SlotEvent
from vlarl_rllib.rollout import evaluation as evaluation_module
from vlarl_rllib.rollout.evaluation import Evaluation, StartQueue
from vlarl_rllib.rollout.video import MIN_SIDE, encode_mp4
from vlarl_rllib.types import EpisodeResult, SampleReply, Start


def starts(tasks: dict[int, int]) -> list[Start]:
    """So many starts of each task."""
    return [Start(task, state, seed=state) for task, number in tasks.items() for state in range(number)]


def event(kind: str, frame: int = 0, *, start: Start, success: bool = False, truncated: bool = False) -> SlotEvent:
    return SlotEvent(
        slot=0, kind=kind, image=np.full((4, 4, 3), frame, np.uint8),
        rewards=(float(success),) * (kind == "step"), terminated=success, truncated=truncated,
        success=success, instruction="reach", task_id=start.task_id, initial_state=start.initial_state,
    )  # fmt: skip


REPLY = SampleReply(np.arange(7), np.full(7, -1.0, np.float32), 3)


def test_a_slot_stays_on_its_task_and_then_helps_where_most_is_left() -> None:
    queue = StartQueue([0, 1], [(0,), (1,)], 1, change_tasks=True)
    queue.refill(starts({0: 2, 1: 3, 2: 2, 3: 9}))
    assert [queue.take(0).task_id, queue.take(1).task_id] == [0, 1]
    queue.finish(0)
    assert queue.take(0) == Start(0, 1, 1)
    queue.finish(0)
    assert queue.take(0).task_id == 3, "9 starts for nobody, against 2 of task 2 and 2 for the slot that plays task 1"
    queue.finish(0)
    assert queue.take(0).task_id == 3, "its process has that model now"


def test_slots_of_one_process_change_their_task_together_when_it_holds_one_model() -> None:
    queue = StartQueue([0, 0], [(0, 1)], 1, change_tasks=True)
    queue.refill(starts({0: 3, 1: 2}))
    assert [queue.take(slot).task_id for slot in (0, 1)] == [0, 0]
    queue.finish(0)
    assert queue.take(0).task_id == 0
    queue.finish(1)
    assert queue.take(1) is None, "slot 0 still needs the model of task 0"
    queue.finish(0)
    assert [queue.take(slot).task_id for slot in (1, 0)] == [1, 1]


def test_a_process_with_two_models_need_not_wait() -> None:
    queue = StartQueue([0, 0], [(0, 1)], 2, change_tasks=True)
    queue.refill(starts({0: 2, 1: 2, 2: 2}))
    assert [queue.take(slot).task_id for slot in (0, 1)] == [0, 0]
    queue.finish(1)
    assert queue.take(1).task_id == 1
    queue.finish(0)
    assert queue.take(0).task_id == 1, "rather than a third model"


def test_in_training_slots_are_bound_to_their_task() -> None:
    queue = StartQueue([0, 1], [(0,), (1,)], 1, change_tasks=False)
    queue.refill(starts({0: 1, 1: 3}))
    assert queue.take(0) == Start(0, 0, 0)
    queue.finish(0)
    assert queue.take(0) is None and queue.take(1).task_id == 1


def test_every_start_is_taken_once_whatever_the_layout() -> None:
    everything = starts(dict.fromkeys(range(10), 7))
    for processes, models in (([(0,), (1,)], 1), ([(0, 1, 2), (3,)], 1), ([(0, 1, 2, 3)], 2)):
        slots = [slot for group in processes for slot in group]
        queue = StartQueue([0] * len(slots), processes, models, change_tasks=True)
        queue.refill(everything)
        taken, rng = [], np.random.default_rng(0)
        while len(taken) < len(everything):
            taken.extend(start for slot in slots if slot not in queue.playing and (start := queue.take(slot)))
            for group in processes:
                assert len({queue.playing[slot].task_id for slot in group if slot in queue.playing}) <= models
            queue.finish(int(rng.choice(list(queue.playing))))
        assert sorted(taken, key=lambda start: (start.task_id, start.initial_state)) == everything


def play(evaluation: Evaluation, slot: int, steps: int, *, success: bool) -> None:
    player = evaluation.players[slot]
    start = player.next_start()
    player.started(event("reset", start=start))
    for step in range(1, steps + 1):
        last = step == steps
        player.stepped(
            REPLY, event("step", step, start=start, success=last and success, truncated=last and not success)
        )


def new_evaluation() -> Evaluation:
    return Evaluation(StartQueue([0, 0], [(0,), (1,)], 1, change_tasks=True), 2, frames_per_second=20.0)


def test_an_episode_reports_its_length_and_outcome_and_acts_greedily() -> None:
    evaluation = new_evaluation()
    evaluation.begin_round(starts({0: 3}), None, ())
    play(evaluation, 0, 3, success=True)
    play(evaluation, 1, 5, success=False)
    assert evaluation.round.results == [EpisodeResult(0, 0, 3, True, 1.0), EpisodeResult(0, 1, 5, False, 0.0)]
    assert evaluation.round.num_steps == 8 and evaluation.queue.playing == {}
    evaluation.players[0].started(event("reset", start=evaluation.players[0].next_start()))
    assert evaluation.players[0].request().temperature == 0.0


def test_a_round_ends_in_the_middle_of_an_episode_that_goes_on_in_the_next() -> None:
    evaluation = new_evaluation()
    everything = starts({0: 3})
    evaluation.begin_round(everything, 0.0, ())
    player = evaluation.players[0]
    start = player.next_start()
    player.started(event("reset", start=start))
    assert not player.wants_action()
    evaluation.begin_round(everything[1:], 100.0, ())
    assert player.wants_action() and evaluation.queue.playing == {0: start}
    player.stepped(REPLY, event("step", 1, start=start, success=True))
    assert [result.initial_state for result in evaluation.round.results] == [0]
    assert [evaluation.players[slot].next_start().initial_state for slot in (0, 1)] == [1, 2]


def test_a_dead_environment_gives_its_start_back_to_the_driver() -> None:
    evaluation = new_evaluation()
    evaluation.begin_round(starts({0: 2}), None, ())
    player = evaluation.players[1]
    start = player.next_start()
    player.started(event("reset", start=start))
    player.dropped()
    player.dropped()  # of a slot that has nothing
    assert evaluation.round.dropped == [start] and evaluation.round.results == []
    assert player.next_start() != start, "the driver decides who plays it again"


def test_an_episode_is_filmed_from_the_first_frame_to_the_last(tmp_path) -> None:
    evaluation = new_evaluation()
    everything = starts({0: 2})
    evaluation.begin_round(everything, None, everything[:1])
    play(evaluation, 0, 6, success=True)
    play(evaluation, 0, 6, success=True)
    filmed, other = evaluation.round.results
    assert other.video is None
    (tmp_path / "film.mp4").write_bytes(filmed.video)
    frames = imageio_ffmpeg.read_frames(str(tmp_path / "film.mp4"))
    meta = next(frames)
    assert meta["fps"] == 20.0 and meta["size"] == (MIN_SIDE, MIN_SIDE) and len(list(frames)) == 7


def test_a_film_shows_what_the_policy_saw(tmp_path) -> None:
    image = np.zeros((28, 28, 3), np.uint8)
    image[:14, :, 0] = 200  # red above, black below
    (tmp_path / "film.mp4").write_bytes(encode_mp4([image] * 3, 10.0))
    frames = imageio_ffmpeg.read_frames(str(tmp_path / "film.mp4"))
    next(frames)
    frame = np.frombuffer(next(frames), np.uint8).reshape(MIN_SIDE, MIN_SIDE, 3).astype(int)
    assert frame[50, 100].tolist() == pytest.approx([200, 0, 0], abs=12)
    assert frame[180, 100].tolist() == pytest.approx([0, 0, 0], abs=12)


def test_a_film_that_fails_does_not_cost_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> bytes:
        raise OSError("no ffmpeg")

    monkeypatch.setattr(evaluation_module, "encode_mp4", fail)
    evaluation = new_evaluation()
    evaluation.begin_round(starts({0: 1}), None, starts({0: 1}))
    play(evaluation, 0, 2, success=True)
    assert evaluation.round.results == [EpisodeResult(0, 0, 2, True, 1.0)]
