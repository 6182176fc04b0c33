"""RLDS data sets (TensorFlow Datasets' episodes of steps) in the schema of OpenVLA's LIBERO data.

A step of `modified_libero_rlds` (openvla/modified_libero_rlds on the Hugging Face Hub) holds the frame as JPEG, upright
but mirrored as the policy sees it; the environment's own action (`envs.base.VLAEnv`); the instruction; and the usual
RLDS flags. TensorFlow does the reading and writing, in a process of its own (`data/tfds_process.py` says why).

N = steps of a shard, T = those of an episode, H, W = size of a stored frame.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlarl_rllib.data.frames import StoredFrame, checked_episode, decoded, frame_size
from vlarl_rllib.data.schema import INFO_FILE, check_metadata, num_episodes
from vlarl_rllib.data.tfds_process import TFDSProcess
from vlarl_rllib.models.family import PolicyFamily
from vlarl_rllib.models.files import STATISTICS_FILE
from vlarl_rllib.models.statistics import check_action_statistics
from vlarl_rllib.types import ACTION_SIZE

INCOMPLETE = ".incomplete"
"""Behind the name of a data set's directory while it is being written."""
SPLIT = re.compile(r"(?P<name>[^\[\]+]+)(\[(?P<first>-?\d+%?)?:(?P<last>-?\d+%?)?\])?")


class RLDSDataset:
    """The steps of a data set as single examples, in memory as they are stored: JPEG bytes, a few kB each, PNG or raw
    frames.

    Iterating goes through all of this shard's steps once, and the next time in another order. An example is a
    dictionary with `image` [H, W, 3] uint8, `action` [7] float32 (the environment's own), `instruction`, `episode` and
    `step`.

    Args:
        directory: one that holds `dataset_info.json`, or a parent of exactly one such.
        split: TFDS split, also `train[:95%]`.
        shard, num_shards: take every num_shards-th episode, from this one: a part for each learner.
        transform: applied to each example.
        shuffle_seed: of the order of steps; None = as stored.

    Raises:
        FileNotFoundError: no data set there.
        ImportError: TensorFlow Datasets is not installed.
        ValueError: in one line: files are damaged or missing, there is no such split, metadata name foreign code, or
            what a feature holds is not what `observation/image`, `action` and `language_instruction` must be.
    """

    def __init__(
        self,
        directory: str | Path,
        split: str = "train",
        shard: int = 0,
        num_shards: int = 1,
        transform: Callable[[dict[str, Any]], Any] | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        if not 0 <= shard < num_shards:
            raise ValueError(f"shard={shard} must be in 0..{num_shards - 1}, below num_shards={num_shards}")
        self.path = find_dataset(directory)
        self._transform, self._seed = transform, shuffle_seed
        self._images: list[StoredFrame] = []
        self._numbers: list[int] = []
        """Of this shard's episodes, in the whole split."""
        self.instructions: list[str] = []
        """Of each episode."""
        actions: list[np.ndarray] = []
        episode_of: list[int] = []
        step_of: list[int] = []
        self.num_episodes = 0
        for index, episode in enumerate(read_episodes(self.path, split)):
            if index % num_shards != shard:
                continue
            length = len(episode["action"])
            self._images += episode["image"]
            self._numbers.append(index)
            self.instructions.append(episode["instruction"])
            actions.append(np.array(episode["action"], dtype=np.float32))
            episode_of += [self.num_episodes] * length
            step_of += range(length)
            self.num_episodes += 1
        self.actions = np.concatenate(actions) if actions else np.zeros((0, ACTION_SIZE), np.float32)
        """[N, 7] float32: the environment's own, of all steps in stored order."""
        self.episode_of = np.array(episode_of, dtype=np.int64)
        """[N] of each step."""
        self._step_of = np.array(step_of, dtype=np.int64)
        self._epoch, self._position = 0, 0

    def __len__(self) -> int:
        return len(self.actions)

    def __getitem__(self, index: int) -> Any:
        """Step `index` in stored order."""
        episode = int(self.episode_of[index])
        example = {
            "image": self.frame(index),
            "action": self.actions[index],
            "instruction": self.instructions[episode],
            "episode": episode,
            "step": int(self._step_of[index]),
        }
        return example if self._transform is None else self._transform(example)

    def frame(self, index: int) -> np.ndarray:
        """[H, W, 3] uint8: that of step `index`. Raises ValueError where it is damaged."""
        try:
            return decoded(self._images[index])
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{self.path}: the frame of step {self._step_of[index]} in episode "
                f"{self._numbers[self.episode_of[index]]} cannot be decoded ({error})"
            ) from None

    def action_chunks(self, count: int) -> np.ndarray:
        """[N, count, 7] float32: the actions of each step and behind it; at an episode's end its last one again."""
        ends = np.searchsorted(self.episode_of, self.episode_of, side="right")
        return self.actions[np.minimum(np.arange(len(self))[:, None] + np.arange(count), ends[:, None] - 1)]

    def __iter__(self) -> Iterator[Any]:
        """The rest of this epoch; afterwards the next one begins."""
        order = self.order(self._epoch)
        while self._position < len(order):
            self._position += 1
            yield self[int(order[self._position - 1])]
        self._epoch, self._position = self._epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Where iterating stands, for a checkpoint."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there: iterating yields what would have come."""
        self._epoch, self._position = state["epoch"], state["position"]

    def order(self, epoch: int) -> np.ndarray:
        """[N] int64: all steps, as that epoch goes through them."""
        if self._seed is None:
            return np.arange(len(self))
        return np.random.default_rng([self._seed, epoch]).permutation(len(self))


def find_dataset(directory: str | Path) -> Path:
    """The directory of the data set in or below `directory`.

    Raises FileNotFoundError where there is none, or more than one.
    """
    root = Path(directory).expanduser().resolve()
    below = (
        [root]
        if (root / INFO_FILE).is_file()
        else sorted(path.parent for path in root.rglob(INFO_FILE))
        if root.is_dir()
        else []
    )
    found = [path for path in below if not path.name.endswith(INCOMPLETE)]
    if len(found) == 1:
        return found[0]
    if below and not found:
        raise FileNotFoundError(f"{below[0]} was not written to its end; collect it again")
    what = (
        "no data set"
        if not found
        else f"{len(found)} data sets ({', '.join(str(path.relative_to(root)) for path in found)})"
    )
    raise FileNotFoundError(
        f"{directory}: {what} below it; give the directory that holds {INFO_FILE}, such as "
        ".../libero_spatial_no_noops/1.0.0"
    )


def check_dataset(directory: str | Path) -> dict[str, int]:
    """Whether a data set is one that can be read, as far as its metadata say; the episodes of each split. Needs no
    TensorFlow.

    Raises:
        FileNotFoundError: no data set there.
        ValueError: in one line, what is wrong with `dataset_info.json`, `features.json` or `dataset_statistics.json`.
    """
    path = find_dataset(directory)
    check_metadata(path)
    if (path / STATISTICS_FILE).is_file():
        _stored_statistics(path / STATISTICS_FILE)
    return num_episodes(path)


def episodes_of_split(split: str, splits: Mapping[str, int]) -> int:
    """Episodes of a split, or of a part of one such as `train[:95%]` or `train[10:-10]`, counted as TensorFlow Datasets
    does.

    Args:
        splits: the episodes of each.

    Raises:
        ValueError: there is no such split, or that is no part of it.
    """
    parts = SPLIT.fullmatch(split)
    if parts is None or parts["name"] not in splits:
        raise ValueError(
            f"{split!r} is no split of the data set, which has {', '.join(splits)}; choose one, or a part such "
            "as train[:95%]"
        )
    whole = splits[parts["name"]]

    def index(bound: str | None, default: int) -> int:
        if not bound:
            return default
        number = round(int(bound[:-1]) * whole / 100) if bound.endswith("%") else int(bound)
        if abs(number) > whole:
            raise ValueError(f"{split!r} reaches beyond the {whole} episodes of {parts['name']}; choose a smaller part")
        return number + whole if number < 0 else number

    return max(0, index(parts["last"], whole) - index(parts["first"], 0))


def read_episodes(path: Path, split: str) -> Iterator[dict[str, Any]]:
    """Episodes as stored: `image` (T JPEG or PNG files, or [T, H, W, 3] uint8), `action` [T, 7] float32, `instruction`.

    Raises:
        ValueError, ImportError: as `RLDSDataset`.
    """
    check_metadata(path)
    process = TFDSProcess("read", path, split)
    try:
        number, size = 0, None
        while (answer := process.receive())[0]:
            episode = checked_episode(answer[1], f"{path}: episode {number}", size)
            number, size = number + 1, frame_size(episode["image"][0])
            yield episode
    finally:
        process.close()


def read_statistics(directory: str | Path, family: PolicyFamily) -> tuple[str, dict[str, Any]]:
    """(name, `norm_stats` entry) of a data set: that of its folder, as published data have it;
    `dataset_statistics.json` where it means to the family what it says, else computed from all actions.

    Raises as `RLDSDataset`.
    """
    path = find_dataset(directory)
    name = path.parent.name if re.fullmatch(r"\d+\.\d+\.\d+", path.name) else path.name
    if family.published_statistics and (path / STATISTICS_FILE).is_file():
        return name, _stored_statistics(path / STATISTICS_FILE)
    episodes = [episode["action"] for episode in read_episodes(path, "train")]
    return name, family.dataset_statistics(np.concatenate(episodes), len(episodes))


def _stored_statistics(file: Path) -> dict[str, Any]:
    """Under whatever name the folder had when it was written. Raises ValueError where the file is damaged."""
    try:
        (entry,) = json.loads(file.read_text()).values()
        check_action_statistics(entry["action"], "action")
        if entry["num_transitions"] < 1:
            raise ValueError("it counts no steps")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{file} is damaged ({type(error).__name__}: {error}); remove it to compute it anew from the actions"
        ) from None
    return entry


def fingerprint(directory: str | Path) -> str:
    """Changes with the data: names and sizes of the files, and what `dataset_info.json` says of them."""
    path = find_dataset(directory)
    facts = [(file.name, file.stat().st_size) for file in sorted(path.iterdir())]
    return hashlib.sha256(repr(facts).encode() + (path / INFO_FILE).read_bytes()).hexdigest()[:16]
