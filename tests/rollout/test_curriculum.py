"""Where episodes begin: a function of the seed, over the training starts and nothing else."""

import json
import math
from collections import Counter

import pytest

from vlarl_rllib.rollout.curriculum import AdaptiveCurriculum, FixedCurriculum, SuccessRecord
from vlarl_rllib.types import Start, derive_seed

TRAINING = {0: range(40), 3: (1, 5, 9)}


def curriculum(slot_tasks: tuple[int, ...] = (0, 3, 0, 3), first_slot: int = 0, seed: int = 7) -> FixedCurriculum:
    return FixedCurriculum(slot_tasks, TRAINING, first_slot=first_slot, seed=seed)


def draws(source: FixedCurriculum, slot: int = 0, iterations: int = 50, episodes: int = 4) -> list[Start]:
    return [source.next_start(slot, iteration, index) for iteration in range(iterations) for index in range(episodes)]


def test_the_same_question_has_the_same_answer() -> None:
    # Asked in another order by another object: nothing is remembered between draws, so a resumed run draws the same.
    first, second = curriculum(), curriculum()
    questions = [(slot, iteration, index) for slot in range(4) for iteration in range(5) for index in range(3)]
    answers = {question: first.next_start(*question) for question in questions}
    assert {question: second.next_start(*question) for question in reversed(questions)} == answers


def test_a_slot_keeps_its_task_and_draws_training_starts_only() -> None:
    source = curriculum()
    for slot, task in enumerate((0, 3, 0, 3)):
        starts = draws(source, slot)
        assert {start.task_id for start in starts} == {task}
        assert {start.initial_state for start in starts} <= set(TRAINING[task])


def test_all_starts_are_drawn_about_equally_often() -> None:
    # 4000 draws of 40 starts: 100 each, standard deviation 10; five of them either way.
    counts = Counter(start.initial_state for start in draws(curriculum(), iterations=1000))
    assert set(counts) == set(range(40))
    assert all(50 < count < 150 for count in counts.values())


@pytest.mark.parametrize(
    "other",
    [
        draws(curriculum(seed=8)),
        draws(curriculum(), slot=2),
        draws(curriculum(first_slot=4)),
        [curriculum().next_start(0, iteration + 50, index) for iteration in range(50) for index in range(4)],
        [curriculum().next_start(0, iteration, index + 4) for iteration in range(50) for index in range(4)],
    ],
    ids=["seed", "slot", "runner", "iteration", "index"],
)
def test_other_slots_iterations_episodes_and_seeds_draw_otherwise(other: list[Start]) -> None:
    mine = draws(curriculum())
    # Two independent draws of 40 starts agree once in 40; 200 of them 5 times on average.
    assert sum(a.initial_state == b.initial_state for a, b in zip(mine, other, strict=True)) < 20
    assert not {start.seed for start in mine} & {start.seed for start in other}


def test_no_two_episodes_share_a_seed() -> None:
    seeds = [start.seed for slot in range(4) for start in draws(curriculum(), slot)]
    assert len(set(seeds)) == len(seeds) == 800


def test_slots_are_counted_over_all_runners() -> None:
    # Two runners of two slots draw what one runner of four does.
    whole, second = curriculum((0, 3, 0, 3)), curriculum((0, 3), first_slot=2)
    for slot in range(2):
        assert draws(second, slot) == draws(whole, slot + 2)


def test_seeds_fit_into_31_bits() -> None:
    # What gymnasium, MuJoCo's and vLLM's generators all accept.
    seeds = [derive_seed(part, 2**40) for part in range(1000)]
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert max(seeds) > 2**30 > min(seeds)


def test_seeds_depend_on_the_order_of_their_parts() -> None:
    assert derive_seed(1, 2, 3, 4) != derive_seed(1, 2, 4, 3)


# Adaptive


def play(record: SuccessRecord, outcomes: dict[tuple[int, int], list[bool]]) -> None:
    for pair, successes in outcomes.items():
        for success in successes:
            record.add(*pair, success)


def test_success_rates_fade_towards_what_happened_lately() -> None:
    record = SuccessRecord("logistic", 1.0)
    assert record.success_rate(0, 0) == 0.5
    record.add(0, 0, True)
    # (0.95 x 0.5 + 1) / (0.95 + 1)
    assert record.success_rate(0, 0) == pytest.approx(1.475 / 1.95)
    play(record, {(0, 0): [True] * 200})
    assert record.success_rate(0, 0) == pytest.approx(1.0, abs=1e-4)
    play(record, {(0, 0): [False] * 20})
    # About a third of the fading memory is older than twenty episodes: 0.95^20 = 0.358
    assert record.success_rate(0, 0) == pytest.approx(0.358, abs=0.002)


@pytest.mark.parametrize(
    ("rule", "temperature", "expected"),
    [
        # exp((0.5 - s) / 0.5) for s = 1 and s = 0, over exp(0)
        ("logistic", 0.5, {(0, 0): math.exp(-1.0), (0, 1): math.exp(1.0)}),
        # (1 - s)^2 over 0.25; a solved start keeps the least weight there is
        ("power", 0.5, {(0, 0): 1e-6, (0, 1): 4.0}),
    ],
)
def test_easy_and_impossible_starts_follow_the_formula(
    rule: str, temperature: float, expected: dict[tuple[int, int], float]
) -> None:
    record = SuccessRecord(rule, temperature)
    play(record, {(0, 0): [True] * 400, (0, 1): [False] * 400})
    assert record.weights() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_hard_starts_are_drawn_more_often_in_proportion() -> None:
    source = AdaptiveCurriculum([(0,), (0, 3)], {0: range(2), 3: (5,)}, first_slot=0, seed=7)
    source.weights = {(0, 0): 1.0, (0, 1): 3.0}  # (3, 5) has not been played: 1
    alone = Counter(start.initial_state for start in draws(source, slot=0, iterations=1000))
    assert alone[1] / alone[0] == pytest.approx(3.0, rel=0.15)
    both = Counter((start.task_id, start.initial_state) for start in draws(source, slot=1, iterations=1000))
    assert both[0, 1] / 4000 == pytest.approx(0.6, abs=0.03) and both[3, 5] / 4000 == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize("rule", ["logistic", "power"])
def test_what_was_played_decides_what_is_drawn(rule: str) -> None:
    record = SuccessRecord(rule, 0.7)
    play(
        record, {(0, 0): [True, False] * 100, (0, 1): [False] * 400, (3, 5): [True] * 3}
    )  # a start in the middle, an impossible one, an easy one
    source = AdaptiveCurriculum([(0, 3)], {0: range(3), 3: (5,)}, first_slot=0, seed=2)
    source.weights = record.weights()
    drawn = Counter((start.task_id, start.initial_state) for start in draws(source, slot=0, iterations=1500))
    # (0, 2) has not been played: 1/2. Of the easy one: 3 successes after one episode of 1/2, each older one counting
    # 0.95 of the next.
    easy = (0.5 * 0.95**3 + 0.95**2 + 0.95 + 1) / (0.95**3 + 0.95**2 + 0.95 + 1)
    rates = {(0, 0): record.success_rate(0, 0), (0, 1): 0.0, (0, 2): 0.5, (3, 5): easy}
    assert rates[0, 0] == pytest.approx(0.5, abs=0.03)
    formula = {
        pair: math.exp((0.5 - s) / 0.7) if rule == "logistic" else (1 - s) ** (1 / 0.7) for pair, s in rates.items()
    }
    for pair, weight in formula.items():
        assert drawn[pair] / drawn.total() == pytest.approx(weight / sum(formula.values()), abs=0.02), pair


def test_an_adaptive_draw_depends_on_the_weights_and_the_question_alone() -> None:
    def make() -> AdaptiveCurriculum:
        source = AdaptiveCurriculum([(0, 3)] * 2, TRAINING, first_slot=2, seed=1)
        source.weights = {(0, 1): 9.0, (3, 5): 0.1}
        return source

    assert draws(make()) == draws(make())
    other = make()
    other.weights = {(0, 1): 1e-6}
    assert draws(make()) != draws(other)


def test_a_record_survives_a_checkpoint() -> None:
    record, restored = SuccessRecord("power", 2.0), SuccessRecord("power", 2.0)
    play(record, {(0, 0): [True, False, True], (3, 5): [False]})
    restored.set_state(json.loads(json.dumps(record.state())))
    assert restored.weights() == record.weights()
    record.add(3, 5, True)
    restored.add(3, 5, True)
    assert restored.weights() == record.weights() and len(record.weights()) == 2
