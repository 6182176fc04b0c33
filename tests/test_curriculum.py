"""Where episodes begin: a function of the seed, over the training starts and nothing else."""

from collections import Counter

import pytest

from vlarl_rllib.curriculum import FixedCurriculum, Start, derive_seed

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
