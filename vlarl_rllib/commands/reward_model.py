"""`vlarl reward-model`: train a success classifier on demonstrations, for `rewards.judge`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from vlarl_rllib.data.rlds import RLDSDataset, find_dataset, fingerprint
from vlarl_rllib.process.console import make_console, make_progress, pasted, shown
from vlarl_rllib.process.signals import END
from vlarl_rllib.runs.preflight import check_tensorflow_datasets
from vlarl_rllib.settings import SettingsError

if TYPE_CHECKING:
    from rich.console import Console

    from vlarl_rllib.rewards.fitting import DemonstrationFrames, FitOptions, HeldOutQuality

MIN_IMAGE_SIZE = 16
"""The network halves the picture three times."""
READ_AT_ONCE = 256
"""Frames that are held in their stored size."""


def run_reward_model(
    data: Path,
    out: Path,
    split: str,
    image_size: int,
    steps: int,
    batch_size: int,
    lr: float,
    near: int,
    held_out: float,
    seed: int,
) -> int:
    """Train, measure on held-out episodes, and write the classifier; the process's exit code: 0 = done, 130 or 143 =
    ended by Ctrl-C or SIGTERM."""
    _check(data, out, image_size, steps, batch_size, lr, near, held_out, seed)
    from vlarl_rllib.rewards.fitting import FitOptions

    console = make_console()
    try:
        with console.status(Text(f"reading {data}")):
            frames = read_frames(data, split, image_size)
        num_episodes = int(frames.episode_of.max()) + 1
        what = f"{num_episodes} episodes, {len(frames.images):,} frames, {len(frames.instructions)} instruction(s)"
        console.print(f"{what}: {shown(find_dataset(data))}")
        identity = fingerprint(data)
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        raise SettingsError(f"--data: {error}") from error
    except KeyboardInterrupt:
        console.print("stopped; nothing was written")
        return END.code
    try:
        quality = _fit(frames, FitOptions(steps, batch_size, lr, near, held_out, seed), identity, out, console)
    except ValueError as error:
        raise SettingsError(f"--data: {error}") from error
    except OSError as error:
        raise SettingsError(f"--out: {error}") from error
    except KeyboardInterrupt:
        console.print("stopped; nothing was written")
        return END.code
    solved, judged = quality.num_solved, quality.num_judgements
    always_no = f"always no: {100 * (1 - solved / judged):.1f} %"
    console.print(f"{quality.num_episodes} held-out episodes, {judged} judgements, {solved} of them yes:")
    console.print(
        f"accuracy {100 * quality.accuracy:.1f} % ({always_no}), average precision {quality.average_precision:.3f}"
    )
    other = "" if quality.mean_other is None else f", solved ones under another instruction {quality.mean_other:.2f}"
    console.print(f"mean score: solved frames {quality.mean_solved:.2f}, first frames {quality.mean_first:.2f}{other}")
    where = pasted(out)
    console.print(f"wrote {where}; use it with --set rewards.judge={where} --set rewards.process=WEIGHT")
    return 0


def read_frames(directory: str | Path, split: str, image_size: int) -> DemonstrationFrames:
    """All frames of an RLDS data set, brought to `image_size`.

    Raises:
        FileNotFoundError, ImportError, ValueError: see `RLDSDataset`; ValueError also for a split without episodes.
    """
    import numpy as np

    from vlarl_rllib.rewards.classifier import resized
    from vlarl_rllib.rewards.fitting import DemonstrationFrames

    dataset = RLDSDataset(directory, split)
    if not len(dataset):
        raise ValueError(f"{directory} has no episodes in split {split!r}; give another --split")
    images: list[np.ndarray] = []
    instructions: dict[str, int] = {}
    facts: list[tuple[int, int, int]] = []
    for first in range(0, len(dataset), READ_AT_ONCE):
        examples = [dataset[index] for index in range(first, min(first + READ_AT_ONCE, len(dataset)))]
        images.append(resized(np.stack([example["image"] for example in examples]), image_size))
        facts += [
            (instructions.setdefault(e["instruction"], len(instructions)), e["episode"], e["step"]) for e in examples
        ]
    instruction_of, episode_of, step_of = np.array(facts, dtype=np.int64).T
    steps_left = np.bincount(episode_of)[episode_of] - 1 - step_of
    return DemonstrationFrames(np.concatenate(images), tuple(instructions), instruction_of, episode_of, steps_left)


def _fit(frames: DemonstrationFrames, options: FitOptions, data: str, out: Path, console: Console) -> HeldOutQuality:
    from vlarl_rllib.rewards.fitting import fit_classifier

    began = time.perf_counter()
    with make_progress(console, "steps") as progress:
        bar = progress.add_task("", total=options.steps, shown="")
        classifier, quality = fit_classifier(
            frames, options, lambda step, loss: progress.update(bar, completed=step, shown=f"loss {loss:.3f}")
        )
    classifier.training["data"] = data
    classifier.save(out)
    console.print(f"{options.steps} steps in {time.perf_counter() - began:.0f} s")
    return quality


def _check(
    data: Path,
    out: Path,
    image_size: int,
    steps: int,
    batch_size: int,
    lr: float,
    near: int,
    held_out: float,
    seed: int,
) -> None:
    """Raise `SettingsError` for the first mistake."""
    least = {
        "image-size": (image_size, MIN_IMAGE_SIZE),
        "steps": (steps, 1),
        "batch-size": (batch_size, 4),
        "near": (near, 1),
        "seed": (seed, 0),
    }
    for name, (value, smallest) in least.items():
        if value < smallest:
            raise SettingsError(f"--{name}: {value} must be at least {smallest}")
    if not 0 < lr < 1:
        raise SettingsError(f"--lr: {lr:g} must be above 0 and below 1")
    if not 0 < held_out < 1:
        raise SettingsError(
            f"--held-out: {held_out:g} must be above 0 and below 1; it is the share of episodes to measure on"
        )
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise SettingsError(f"--out: {out} exists and is not empty; give a new directory")
    try:
        find_dataset(data)
    except FileNotFoundError as error:
        raise SettingsError(f"--data: {error}") from None
    check_tensorflow_datasets("--data")
