"""Training of the success classifier on frames of demonstrations, all of which succeed at their last step.

Frames within `near` steps of the end show the task solved, earlier ones do not, and no frame does under the instruction
of another task.

N = frames, S = image side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F

from vlarl_rllib.rewards.classifier import ClassifierConfig, SuccessClassifier, terms

WEIGHT_DECAY = 0.01
WARM_UP = 0.05
"""Share of the steps over which the learning rate rises; then it falls to 0."""


@dataclass(frozen=True)
class DemonstrationFrames:
    """Every frame of a set of demonstrations."""

    images: np.ndarray
    """[N, S, S, 3] uint8."""
    instructions: tuple[str, ...]
    """Each one once."""
    instruction_of: np.ndarray
    """[N] int64: index into `instructions`."""
    episode_of: np.ndarray
    """[N] int64: from 0."""
    steps_left: np.ndarray
    """[N] int64: 0 at the last frame, which the succeeding action followed."""


@dataclass(frozen=True)
class FitOptions:
    """How to train."""

    steps: int
    batch_size: int
    lr: float
    near: int
    """Last frames of an episode that count as solved; at least 1."""
    held_out: float
    """Share of the episodes that measure and do not train."""
    seed: int


@dataclass(frozen=True)
class HeldOutQuality:
    """Of the scores on held-out episodes: each frame under its own instruction, each solved one under all others
    too."""

    num_episodes: int
    num_judgements: int
    num_solved: int
    """Judgements for which yes is right."""
    accuracy: float
    """Share of judgements on the right side of 1/2."""
    average_precision: float
    """Mean precision over the recalls; a judge that guesses has the share of solved ones."""
    mean_solved: float
    """Mean score of solved frames."""
    mean_first: float
    """Of the episodes' first frames."""
    mean_other: float | None
    """Of solved frames under another instruction; None where there is none."""


class _Batches:
    """Draws labelled frames: half of them solved, the rest earlier ones and, where there are other instructions, half
    of it solved under one."""

    def __init__(
        self, frames: DemonstrationFrames, training: np.ndarray, options: FitOptions, random: np.random.Generator
    ) -> None:
        solved = frames.steps_left < options.near
        self._solved, self._earlier = np.flatnonzero(training & solved), np.flatnonzero(training & ~solved)
        if not len(self._earlier):
            raise ValueError(
                f"every episode ends within {options.near} steps, so that no frame is left to tell success from; "
                "use a smaller --near"
            )
        self._instruction_of, self._num_instructions = frames.instruction_of, len(frames.instructions)
        self._size, self._random = options.batch_size, random

    def draw(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(frames, instructions, labels) [batch] each."""
        num_solved = self._size // 2
        num_other = (self._size - num_solved) // 2 if self._num_instructions > 1 else 0
        solved = self._random.choice(self._solved, num_solved)
        earlier = self._random.choice(self._earlier, self._size - num_solved - num_other)
        confused = self._random.choice(self._solved, num_other)
        turn = self._random.integers(1, max(2, self._num_instructions), num_other)
        others = (self._instruction_of[confused] + turn) % self._num_instructions
        drawn = np.concatenate([solved, earlier, confused])
        instructions = np.concatenate([self._instruction_of[solved], self._instruction_of[earlier], others])
        return drawn, instructions, (np.arange(len(drawn)) < num_solved).astype(np.float32)


def fit_classifier(
    frames: DemonstrationFrames, options: FitOptions, progress: Callable[[int, float], None] = lambda step, loss: None
) -> tuple[SuccessClassifier, HeldOutQuality]:
    """Train on most episodes and measure on the rest; the same seed gives the same classifier. torch's global generator
    is left as it was.

    Args:
        progress: called with (steps done, loss of the last one).

    Raises:
        ValueError: there are fewer than two episodes, or none is longer than `options.near`.
    """
    random = np.random.default_rng(options.seed)
    num_episodes = int(frames.episode_of.max()) + 1
    if num_episodes < 2:
        raise ValueError(f"{num_episodes} episode leaves none to measure on; collect at least 2")
    held_out = random.permutation(num_episodes)[: min(num_episodes - 1, max(1, round(options.held_out * num_episodes)))]
    is_held_out = np.isin(frames.episode_of, held_out)
    batches = _Batches(frames, ~is_held_out, options, random)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        vocabulary = sorted({term for instruction in frames.instructions for term in terms(instruction)})
        classifier = SuccessClassifier(ClassifierConfig(frames.images.shape[1], tuple(vocabulary)))
    _optimize(classifier, frames, batches, options, progress)
    quality = measure(classifier, frames, is_held_out, options.near)
    classifier.training = {
        "options": asdict(options),
        "instructions": list(frames.instructions),
        "held_out": asdict(quality),
    }
    return classifier, quality


def _optimize(
    classifier: SuccessClassifier,
    frames: DemonstrationFrames,
    batches: _Batches,
    options: FitOptions,
    progress: Callable[[int, float], None],
) -> None:
    network = classifier.network.train()
    bags = classifier.bags(frames.instructions)
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.lr, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.lr, total_steps=options.steps + 1, pct_start=WARM_UP, cycle_momentum=False
    )
    for step in range(options.steps):
        drawn, instructions, labels = batches.draw()
        logits = network(classifier.pixels(frames.images[drawn]), bags[instructions])
        loss = F.binary_cross_entropy_with_logits(logits, torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(step + 1, loss.item())
    network.eval()


def measure(
    classifier: SuccessClassifier, frames: DemonstrationFrames, chosen: np.ndarray, near: int
) -> HeldOutQuality:
    """How well `classifier` judges the frames where `chosen` [N] is true: whole episodes, at least one."""
    solved = chosen & (frames.steps_left < near)
    own_scores = np.zeros(len(chosen), np.float32)
    other_scores: list[np.ndarray] = []
    for index, instruction in enumerate(frames.instructions):
        own, other = chosen & (frames.instruction_of == index), solved & (frames.instruction_of != index)
        if own.any():
            own_scores[own] = classifier.score(frames.images[own], instruction)
        if other.any():
            other_scores.append(classifier.score(frames.images[other], instruction))
    others = np.concatenate(other_scores) if other_scores else np.zeros(0, np.float32)
    judged = np.concatenate([own_scores[chosen], others])
    labels = np.concatenate([solved[chosen], np.zeros(len(others), bool)])
    length = np.zeros(frames.episode_of.max() + 1, np.int64)
    np.maximum.at(length, frames.episode_of, frames.steps_left)
    first = chosen & (frames.steps_left == length[frames.episode_of])
    return HeldOutQuality(
        num_episodes=int(first.sum()),
        num_judgements=len(judged),
        num_solved=int(solved.sum()),
        accuracy=float(((judged > 0.5) == labels).mean()),
        average_precision=average_precision(judged, labels),
        mean_solved=float(own_scores[solved].mean()),
        mean_first=float(own_scores[first].mean()),
        mean_other=float(others.mean()) if len(others) else None,
    )


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean, over the positives, of the precision among all that score at least as high; equal scores share one rank.

    Args:
        scores, labels: [N]; at least one label is true.
    """
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last_of_equal = np.searchsorted(-ranked, -ranked, side="right")
    hits = np.cumsum(labels[order])
    return float((hits[last_of_equal - 1] / last_of_equal)[labels[order]].mean())
