"""Frames of made-up demonstrations: a white dot moves up to the square of the colour that the instruction names."""

from pathlib import Path

import numpy as np

from vlarl_rllib.rewards.classifier import ClassifierConfig, SuccessClassifier
from vlarl_rllib.rewards.fitting import DemonstrationFrames

SIDE = 28
COLORS = {"touch the red square": (220, 40, 40), "touch the blue square": (50, 70, 230)}
INSTRUCTIONS = tuple(COLORS)


def episode(instruction: str, random: np.random.Generator, length: int = 6) -> np.ndarray:
    """[length, S, S, 3] uint8, the dot on its square in the last two frames; the other square is there too."""
    left_and_right = random.permutation(np.array([[7, 6], [7, 21]]))
    target, other, begin = np.array([*left_and_right, [22, 14]]) + random.integers(-2, 3, (3, 2))
    images = np.full((length, SIDE, SIDE, 3), 96, np.uint8)
    for image, share in zip(images, [*np.linspace(0.0, 0.6, length - 2), 1.0, 1.0], strict=True):
        for name, place, half in ((instruction, target, 4), (INSTRUCTIONS[instruction == INSTRUCTIONS[0]], other, 4)):
            image[place[0] - half : place[0] + half, place[1] - half : place[1] + half] = COLORS[name]
        dot = np.round(begin + share * (target - begin)).astype(int)
        image[dot[0] - 2 : dot[0] + 2, dot[1] - 2 : dot[1] + 2] = 255
    return images


def demonstrations(num_episodes: int, seed: int, length: int = 6) -> DemonstrationFrames:
    """Episodes of the two tasks in turn."""
    random = np.random.default_rng(seed)
    episode_of = np.repeat(np.arange(num_episodes), length)
    images = np.concatenate([episode(INSTRUCTIONS[index % 2], random, length) for index in range(num_episodes)])
    return DemonstrationFrames(
        images, INSTRUCTIONS, episode_of % 2, episode_of, np.tile(np.arange(length)[::-1], num_episodes)
    )


def write_untrained_judge(directory: Path, image_size: int = SIDE) -> Path:
    """A classifier that nobody trained: scores near 1/2, each frame its own."""
    SuccessClassifier(ClassifierConfig(image_size, ("square", "red", "blue"))).save(directory)
    return directory
