"""`vlarl reward-model` on made-up demonstrations, which reach it as an RLDS data set's would, without TensorFlow."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judge_helpers import INSTRUCTIONS, SIDE, episode

if importlib.util.find_spec("tensorflow_datasets") is None:
    pytest.skip("the command asks for the `data` extra", allow_module_level=True)

from vlarl_rllib.cli import main
from vlarl_rllib.commands.reward_model import read_frames
from vlarl_rllib.data import rlds, rlds_writer
from vlarl_rllib.rewards import load_judge


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """60 episodes of 6 steps, twice as large as the classifier is to see them."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / rlds.INFO_FILE).write_text("{}")

    def read(path: Path, split: str) -> Iterator[dict[str, Any]]:
        random = np.random.default_rng(0)
        for index in range(60 if split == "train" else 0):
            images = episode(INSTRUCTIONS[index % 2], random).repeat(2, axis=1).repeat(2, axis=2)
            jpegs = [rlds_writer._jpeg(image) for image in images]
            yield {
                "image": jpegs,
                "action": np.zeros((len(images), 7), np.float32),
                "instruction": INSTRUCTIONS[index % 2],
            }

    monkeypatch.setattr(rlds, "read_episodes", read)
    return tmp_path / "data"


def vlarl(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["vlarl", "reward-model", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


def test_it_leaves_a_judge_and_says_how_good_it_is(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "judge"
    sizes = ("--image-size", str(SIDE), "--steps", "150", "--batch-size", "32", "--held-out", "0.2", "--seed", "1")
    assert vlarl(monkeypatch, "--data", str(data), "--out", str(out), *sizes) == 0
    text = capsys.readouterr().out
    assert "60 episodes, 360 frames, 2 instruction(s)" in text and "150 steps in" in text
    # 12 episodes of 6 frames, and their 24 solved ones under the other instruction
    assert "12 held-out episodes, 96 judgements, 24 of them yes:" in text and "always no: 75.0 %" in text
    training = json.loads((out / "config.json").read_text())["training"]
    assert f"accuracy {100 * training['held_out']['accuracy']:.1f} %" in text
    assert f"average precision {training['held_out']['average_precision']:.3f}" in text
    assert training["data"] == rlds.fingerprint(data) and training["options"]["steps"] == 150
    unseen = episode(INSTRUCTIONS[1], np.random.default_rng(7))
    scores = load_judge(out).score(unseen, INSTRUCTIONS[1])
    assert scores[-1] - scores[0] > 0.6


def test_frames_know_their_episode_task_and_distance_from_the_end(data: Path) -> None:
    frames = read_frames(data, "train", SIDE)
    assert frames.images.shape == (360, SIDE, SIDE, 3) and frames.images.dtype == np.uint8
    assert frames.instructions == INSTRUCTIONS
    assert frames.steps_left[:12].tolist() == [5, 4, 3, 2, 1, 0] * 2
    assert frames.episode_of[:12].tolist() == [0] * 6 + [1] * 6 == frames.instruction_of[:12].tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--split", "validation"), "has no episodes in split 'validation'; give another --split"),
        (("--near", "6"), "every episode ends within 6 steps"),
        (("--near", "0"), "--near: 0 must be at least 1"),
        (("--image-size", "8"), "--image-size: 8 must be at least 16"),
        (("--held-out", "1"), "--held-out: 1 must be above 0 and below 1"),
        (("--lr", "0"), "--lr: 0 must be above 0"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    assert vlarl(monkeypatch, "--data", str(data), "--out", str(tmp_path / "judge"), *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vlarl: ") and message in line
    assert not (tmp_path / "judge").exists()
