"""The success classifier: what it learns from demonstrations, what its directory holds, and what is told of a damaged
one."""

import json
from pathlib import Path

import numpy as np
import pytest
from judge_helpers import INSTRUCTIONS, SIDE, demonstrations, episode

from vlarl_rllib.rewards.classifier import SuccessClassifier, resized, terms
from vlarl_rllib.rewards.fitting import (
    DemonstrationFrames,
    FitOptions,
    HeldOutQuality,
    average_precision,
    fit_classifier,
    measure,
)
from vlarl_rllib.rewards.judge import check_judge, judge_kind
from vlarl_rllib.rewards.judges import load_judge

OPTIONS = FitOptions(steps=150, batch_size=32, lr=3e-3, near=2, held_out=0.2, seed=1)


@pytest.fixture(scope="module")
def frames() -> DemonstrationFrames:
    return demonstrations(60, seed=0)


@pytest.fixture(scope="module")
def fitted(frames: DemonstrationFrames) -> tuple[SuccessClassifier, HeldOutQuality]:
    return fit_classifier(frames, OPTIONS)


@pytest.fixture
def saved(fitted: tuple[SuccessClassifier, HeldOutQuality], tmp_path: Path) -> Path:
    fitted[0].save(tmp_path / "judge")
    return tmp_path / "judge"


def test_it_tells_held_out_ends_from_beginnings_and_from_ends_of_another_task(
    fitted: tuple[SuccessClassifier, HeldOutQuality],
) -> None:
    classifier, quality = fitted
    # 12 episodes of 6 frames under their own instruction, their 24 solved frames under the other one too
    assert (quality.num_episodes, quality.num_judgements, quality.num_solved) == (12, 96, 24)
    assert quality.accuracy > 0.9 and quality.average_precision > 0.9
    assert (
        quality.mean_solved - quality.mean_first > 0.6
        and quality.mean_other is not None
        and quality.mean_solved - quality.mean_other > 0.6
    )
    unseen = episode(INSTRUCTIONS[0], np.random.default_rng(99))
    scores = classifier.score(unseen, INSTRUCTIONS[0])
    assert scores.shape == (6,) and scores.dtype == np.float32 and ((scores >= 0) & (scores <= 1)).all()
    assert scores[-1] - scores[0] > 0.6


def test_the_same_seed_gives_the_same_classifier_and_progress_is_told(frames: DemonstrationFrames) -> None:
    short = FitOptions(steps=3, batch_size=8, lr=1e-3, near=2, held_out=0.2, seed=5)
    told: list[tuple[int, float]] = []
    first, second = (fit_classifier(frames, short, lambda *step: told.append(step))[0] for _ in range(2))
    assert [step for step, _ in told] == [1, 2, 3] * 2 and told[:3] == told[3:]
    np.testing.assert_array_equal(*(judge.score(frames.images[:6], INSTRUCTIONS[0]) for judge in (first, second)))


def test_a_round_trip_keeps_every_bit(
    fitted: tuple[SuccessClassifier, HeldOutQuality], saved: Path, frames: DemonstrationFrames
) -> None:
    assert judge_kind(saved) == check_judge(saved) == "classifier"
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_judge(saved)
    for instruction in (*INSTRUCTIONS, "Touch the RED square.", "an instruction of unknown words"):
        np.testing.assert_array_equal(
            loaded.score(frames.images[:40], instruction), fitted[0].score(frames.images[:40], instruction)
        )
    np.testing.assert_array_equal(
        loaded.score(frames.images[:6], "Touch the RED square."), loaded.score(frames.images[:6], INSTRUCTIONS[0])
    )
    assert json.loads((saved / "config.json").read_text())["training"]["held_out"]["accuracy"] == fitted[1].accuracy


def test_other_sizes_of_frames_are_brought_to_its_own(
    fitted: tuple[SuccessClassifier, HeldOutQuality], frames: DemonstrationFrames
) -> None:
    large = frames.images[:12].repeat(2, axis=1).repeat(2, axis=2)
    small = resized(large, SIDE)
    assert small.shape == (12, SIDE, SIDE, 3) and np.abs(small.astype(int) - frames.images[:12]).mean() < 4
    np.testing.assert_array_equal(fitted[0].score(large, INSTRUCTIONS[0]), fitted[0].score(small, INSTRUCTIONS[0]))


def flip_a_bit(directory: Path) -> None:
    content = bytearray((directory / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (directory / "model.safetensors").write_bytes(content)


def change_config(directory: Path, **values: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **values}))


DAMAGES = {
    "no config": (
        lambda root: (root / "config.json").unlink(),
        "has no config.json; give a directory that vlarl reward-model wrote",
    ),
    "no directory": (lambda root: root.rename(root.with_name("elsewhere")), "has no config.json"),
    "half a config": (
        lambda root: (root / "config.json").write_text('{"model_type": "vl'),
        "config.json cannot be read",
    ),
    "a list": (lambda root: (root / "config.json").write_text("[]"), "config.json holds list, must hold an object"),
    "another model": (
        lambda root: change_config(root, model_type="openvla"),
        "holds a model of type 'openvla', which cannot judge frames",
    ),
    "no weights": (
        lambda root: (root / "model.safetensors").unlink(),
        "has no model.safetensors; run vlarl reward-model again",
    ),
    "another bit": (flip_a_bit, "model.safetensors is not the file that config.json was written with"),
    "another vocabulary": (
        lambda root: change_config(root, vocabulary=["red"]),
        "is not a success classifier of this version (RuntimeError",
    ),
    "no vocabulary": (
        lambda root: change_config(root, vocabulary=None),
        "is not a success classifier of this version (TypeError",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_directory_is_one_clear_line(saved: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    change(saved)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is compared below)
        load_judge(saved)
    assert message in str(caught.value) and str(saved) in str(caught.value) and "\n" not in str(caught.value)


def test_terms_know_the_order_of_words() -> None:
    assert terms("Put red on blue.") == ["put", "red", "on", "blue", "put red", "red on", "on blue"]
    assert set(terms("put red on blue")) != set(terms("put blue on red"))


def test_average_precision_by_hand() -> None:
    # Ranks of the positives: 1, 3, 4 -> precisions 1/1, 2/3, 3/4.
    assert average_precision(
        np.array([0.9, 0.8, 0.7, 0.6, 0.5]), np.array([True, False, True, True, False])
    ) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    # All equal: every positive has the precision of the whole, 2 of 5, in whatever order they come.
    assert average_precision(np.full(5, 0.5), np.array([True, True, False, False, False])) == pytest.approx(0.4)


def test_quality_by_hand(fitted: tuple[SuccessClassifier, HeldOutQuality], frames: DemonstrationFrames) -> None:
    class Fixed(SuccessClassifier):
        """Yes to whatever is bright, under every instruction."""

        def __init__(self) -> None: ...

        def score(self, images: np.ndarray, instruction: str) -> np.ndarray:
            return images[:, 0, 0, 0] / np.float32(255)

    # Two episodes of three frames: 51 = 0.2, 102 = 0.4, 204 = 0.8, 255 = 1.
    images = np.array([51, 204, 255, 51, 51, 102], np.uint8)[:, None, None, None].repeat(3, axis=3)
    two = DemonstrationFrames(
        images, ("a", "b"), np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, 0, 1, 1, 1]), np.array([2, 1, 0, 2, 1, 0])
    )
    quality = measure(Fixed(), two, np.ones(6, bool), near=1)
    # Own: no, (yes), yes, no, no, (no); the two solved ones under the other instruction: (yes), no. In brackets: wrong.
    # 5 of 8 are right.
    assert (quality.num_episodes, quality.num_judgements, quality.num_solved, quality.accuracy) == (2, 8, 2, 5 / 8)
    # By score: 1 (yes and no), 0.8, 0.4 (yes and no), 0.2 three times: precisions 1/2 and 2/5.
    assert quality.average_precision == pytest.approx((1 / 2 + 2 / 5) / 2)
    assert (quality.mean_solved, quality.mean_first, quality.mean_other) == pytest.approx((0.7, 0.2, 0.7))


def test_data_that_cannot_teach_are_told(frames: DemonstrationFrames) -> None:
    with pytest.raises(ValueError, match="every episode ends within 6 steps, so that no frame is left"):
        fit_classifier(frames, FitOptions(1, 8, 1e-3, near=6, held_out=0.2, seed=0))
    with pytest.raises(ValueError, match="1 episode leaves none to measure on; collect at least 2"):
        fit_classifier(demonstrations(1, seed=0), OPTIONS)
