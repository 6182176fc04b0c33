"""RLDS data sets: what is written is read alike by TensorFlow Datasets and here; damage is told."""

import importlib.util
import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("tensorflow_datasets") is None:
    pytest.skip("RLDS data need the `data` extra", allow_module_level=True)

from vlarl_rllib.data import Demonstration, RLDSDataset, RLDSWriter, read_statistics, rlds, rlds_writer
from vlarl_rllib.models.openvla.actions import ActionTokenizer, dataset_statistics, to_policy
from vlarl_rllib.models.openvla.family import FAMILY as OPENVLA

SIDE = 32
LENGTHS = (3, 5, 4, 6)


def demonstration(length: int, seed: int) -> Demonstration:
    generator = np.random.default_rng(seed)
    actions = generator.uniform(-1, 1, (length, 7)).astype(np.float32)
    actions[:, 6] = np.where(actions[:, 6] > 0, 1.0, -1.0)
    y, x = np.mgrid[0:SIDE, 0:SIDE] * 4
    images = [np.stack([x, y, np.full_like(x, 40 * step)], axis=-1).astype(np.uint8) for step in range(length)]
    return Demonstration(
        images,
        actions,
        f"push cube {seed}",
        states=generator.normal(size=(length, 8)).astype(np.float32),
        origin=f"demo {seed}",
    )


DEMONSTRATIONS = [demonstration(length, seed) for seed, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rlds")
    with pytest.MonkeyPatch.context() as patch, RLDSWriter(root, "tabletop", OPENVLA) as writer:
        patch.setattr(rlds_writer, "EPISODES_AT_ONCE", 3)  # two lots
        for episode in DEMONSTRATIONS:
            writer.add(episode)
    return root


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As in `modified_libero_rlds`: with a second camera."""
    root = tmp_path_factory.mktemp("published")
    episode = replace(DEMONSTRATIONS[0], wrist_images=DEMONSTRATIONS[0].images[::-1])
    with RLDSWriter(root, "libero_spatial_no_noops", OPENVLA) as writer:
        writer.add(episode.without_no_ops())
    return root


# TensorFlow takes seconds to start, and every reading has a process of its own: what can share one does.


@pytest.fixture(scope="module")
def stored(directory: Path) -> list[dict[str, Any]]:
    return list(rlds.read_episodes(rlds.find_dataset(directory), "train"))


@pytest.fixture
def read_once(stored: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what is made of the episodes."""
    monkeypatch.setattr(rlds, "read_episodes", lambda path, split: iter(stored))


PLAIN_READER = """
import os, pickle, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import tensorflow_datasets as tfds
data_sets = []
for directory in sys.argv[2:]:
    dataset = tfds.builder_from_directory(directory).as_dataset(split="train")
    read = lambda e: (e["episode_metadata"]["file_path"].numpy().decode(), list(e["steps"].as_numpy_iterator()))
    data_sets.append([read(e) for e in dataset])
pickle.dump(data_sets, open(sys.argv[1], "wb"))
"""
"""In a process of its own: rendering crashes in one that has imported TensorFlow."""


@pytest.fixture(scope="module")
def read_plainly(
    directory: Path, published: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[list[tuple[str, list[Any]]]]:
    """Of both data sets, the episodes as (origin, steps)."""
    scratch = tmp_path_factory.mktemp("plain") / "episodes.pickle"
    data_sets = [str(rlds.find_dataset(root)) for root in (directory, published)]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_READER, str(scratch), *data_sets], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return pickle.loads(scratch.read_bytes())


def test_plain_tensorflow_datasets_and_ours_read_the_same(
    directory: Path, read_plainly: list[Any], read_once: None
) -> None:
    ours = RLDSDataset(directory)
    assert (len(ours), ours.num_episodes) == (sum(LENGTHS), len(LENGTHS))
    index = 0
    for number, (origin, steps) in enumerate(read_plainly[0]):
        wrote = DEMONSTRATIONS[number]
        assert origin == wrote.origin and len(steps) == len(wrote.actions)
        for position, step in enumerate(steps):
            example = ours[index]
            np.testing.assert_array_equal(example["image"], step["observation"]["image"])
            assert np.abs(example["image"].astype(int) - wrote.images[position]).mean() < 5, "more than JPEG changes"
            np.testing.assert_array_equal(step["action"], wrote.actions[position])
            np.testing.assert_array_equal(step["observation"]["state"], wrote.states[position])
            np.testing.assert_array_equal(example["action"][:6], step["action"][:6])
            assert example["action"][6] == step["action"][6], "the environment's gripper is -1 = open"
            assert example["instruction"] == step["language_instruction"].decode() == wrote.instruction
            assert (example["episode"], example["step"]) == (number, position)
            last = position == len(steps) - 1
            assert (step["is_first"], step["is_last"], step["is_terminal"], step["reward"]) == (
                position == 0,
                last,
                last,
                float(last),
            )
            index += 1
    assert "tensorflow" not in sys.modules


def test_shards_share_the_episodes_and_a_transform_is_applied(directory: Path, read_once: None) -> None:
    whole = {(example["instruction"], example["step"]) for example in RLDSDataset(directory)}
    parts = [
        RLDSDataset(directory, shard=shard, num_shards=3, transform=lambda e: (e["instruction"], e["step"]))
        for shard in range(3)
    ]
    assert [part.num_episodes for part in parts] == [2, 1, 1]
    seen = [example for part in parts for example in part]
    assert len(seen) == len(whole) and set(seen) == whole


def test_shuffling_is_another_order_each_time_and_goes_on_where_it_stood(directory: Path, read_once: None) -> None:
    def key(example: dict) -> tuple[int, int]:
        return example["episode"], example["step"]

    first = RLDSDataset(directory, shuffle_seed=1, transform=key)
    epochs = [list(first), list(first)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
    again = RLDSDataset(directory, shuffle_seed=1, transform=key)
    iterator = iter(again)
    taken = [next(iterator) for _ in range(7)]
    resumed = RLDSDataset(directory, shuffle_seed=1, transform=key)
    resumed.load_state_dict(again.state_dict())
    assert taken + list(resumed) == epochs[0]
    assert list(resumed) == epochs[1]
    assert list(RLDSDataset(directory, shuffle_seed=2, transform=key)) != epochs[0]


def test_statistics_are_the_quantiles_of_the_standardised_actions(directory: Path, read_once: None) -> None:
    name, written = read_statistics(directory, OPENVLA)
    actions = np.concatenate([to_policy(episode.actions) for episode in DEMONSTRATIONS])
    assert name == "tabletop" and written["num_transitions"] == 18 and written["num_trajectories"] == 4
    np.testing.assert_allclose(written["action"]["q01"], np.quantile(actions, 0.01, axis=0))
    assert written["action"]["mask"] == [True] * 6 + [False]
    file = directory / "tabletop" / "1.0.0" / "dataset_statistics.json"
    stored = file.read_text()
    file.unlink()  # as in published data
    try:
        assert read_statistics(directory, OPENVLA)[1] == json.loads(stored)["tabletop"]
    finally:
        file.write_text(stored)
    normalized = ActionTokenizer.normalize(actions, written["action"])
    assert np.abs(normalized[:, :6]).max() <= 1.0 and set(normalized[:, 6]) == {0.0, 1.0}


def test_statistics_by_hand() -> None:
    actions = np.zeros((101, 7), np.float32)
    actions[:, 0] = np.arange(101)
    statistics = dataset_statistics(actions, 1)["action"]
    assert (statistics["q01"][0], statistics["q99"][0], statistics["mean"][0]) == (1.0, 99.0, 50.0)


def test_no_ops_are_dropped_unless_the_gripper_moves() -> None:
    still, move = [0.0] * 6, [0.5] + [0.0] * 5
    actions = np.array(
        [[*still, -1], [*move, -1], [*still, -1], [*still, 1], [*still, 1], [*move, 1]], dtype=np.float32
    )
    images = [np.full((2, 2, 3), step, np.uint8) for step in range(6)]
    kept = Demonstration(images, actions, "push").without_no_ops()
    # The first stands still; so do the third, with the gripper of the second, and the fifth.
    assert [int(image[0, 0, 0]) for image in kept.images] == [1, 3, 5]
    np.testing.assert_array_equal(kept.actions, actions[[1, 3, 5]])


READER_OF_MISTAKES = """
import sys
from vlarl_rllib.data.tfds_process import read
for path, split in zip(sys.argv[1::2], sys.argv[2::2]):
    number = 0
    try:
        for number, _ in enumerate(read(None, path, split), start=1):
            pass
    except ValueError as error:
        print(error)
    else:
        print(f"{path}: read {number} episodes as if nothing were wrong")
"""


def test_a_truncated_a_tampered_and_a_missing_file_and_a_wrong_split_are_told(directory: Path, tmp_path: Path) -> None:
    def damaged(name: str, content: bytes | None) -> Path:
        copy = shutil.copytree(directory / "tabletop" / "1.0.0", tmp_path / name)
        (file,) = copy.glob("*.tfrecord*")
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        return copy

    (file,) = (directory / "tabletop" / "1.0.0").glob("*.tfrecord*")
    whole = file.read_bytes()
    middle = len(whole) // 2
    first_record = (
        8 + 4 + int.from_bytes(whole[:8], "little") + 4
    )  # TFRecord: length, its checksum, content, its checksum
    with pytest.raises(
        ValueError, match=r"tampered: damaged or incomplete after \d episodes \(.*\); copy or collect it again"
    ) as caught:
        RLDSDataset(damaged("tampered", whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :]))
    assert "\n" not in str(caught.value)

    paths = [
        damaged("cut", whole[: first_record + 7]),
        damaged("cut_between_records", whole[:first_record]),
        damaged("missing", None),
    ]
    arguments = [part for path in paths for part in (str(path), "train")] + [
        str(directory / "tabletop" / "1.0.0"),
        "test",
    ]
    done = subprocess.run([sys.executable, "-c", READER_OF_MISTAKES, *arguments], capture_output=True, text=True)
    *lines, no_such_split = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    for line, path, episodes in zip(lines, paths, (1, 1, 0), strict=True):
        assert line.startswith(f"{path}: damaged or incomplete after {episodes} episodes ("), line
    assert no_such_split.endswith("has no split 'test'; it has train")


def test_damaged_metadata_are_told(directory: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(directory / "tabletop" / "1.0.0", tmp_path / "tabletop" / "1.0.0")
    statistics = (copy / "dataset_statistics.json").read_text()
    entry = json.loads(statistics)["tabletop"]
    changes = ({"q01": [0.0] * 6}, {"q99": [float("nan")] * 7}, {"q99": [-9.0] * 7}, {"q01": None})
    wrong = [entry | {"num_transitions": 0}, *(entry | {"action": entry["action"] | change} for change in changes)]
    for damaged in (statistics[:200], "{}", *(json.dumps({"tabletop": values}) for values in wrong)):
        (copy / "dataset_statistics.json").write_text(damaged)
        with pytest.raises(
            ValueError, match=r"dataset_statistics\.json is damaged \(.*\); remove it to compute it anew"
        ) as caught:
            read_statistics(copy, OPENVLA)
        assert "\n" not in str(caught.value)
    features = (copy / "features.json").read_text()
    (copy / "features.json").write_text(features[: len(features) // 2])
    with pytest.raises(ValueError, match=r"features\.json cannot be read \(.*\); copy or collect it again") as caught:
        RLDSDataset(copy)
    assert "\n" not in str(caught.value)


def test_a_data_set_is_called_as_its_folder_wherever_one_stands(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(directory / "tabletop")
    assert read_statistics("1.0.0", OPENVLA) == read_statistics(directory, OPENVLA)
    shutil.copytree(directory / "tabletop", tmp_path / "renamed")
    shutil.copytree(directory / "tabletop" / "1.0.0", tmp_path / "alone")
    _, statistics = read_statistics(directory, OPENVLA)
    assert read_statistics(tmp_path / "renamed", OPENVLA) == ("renamed", statistics)
    assert read_statistics(tmp_path / "alone", OPENVLA) == (
        "alone",
        statistics,
    )
    monkeypatch.chdir(tmp_path / "alone")
    assert read_statistics(".", OPENVLA) == ("alone", statistics)


def test_no_code_beside_a_data_set_is_run(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(directory / "tabletop" / "1.0.0", tmp_path / "download")
    monkeypatch.chdir(tmp_path / "download")
    features = Path("features.json").read_text()
    Path("features.json").write_text(
        features.replace("tensorflow_datasets.core.features.features_dict.FeaturesDict", "trap.Features")
    )
    assert Path("features.json").read_text() != features
    Path("trap.py").write_text("import pathlib; pathlib.Path('sprung').touch()")
    with pytest.raises((ValueError, ImportError, OSError, RuntimeError)):
        list(RLDSDataset("."))
    assert not Path("sprung").exists()


def test_the_published_layout_with_its_second_camera(published: Path, read_plainly: list[Any]) -> None:
    ((_, steps),) = read_plainly[1]
    assert steps[0]["observation"].keys() == {"image", "wrist_image", "state", "joint_state"}
    assert not np.array_equal(steps[0]["observation"]["image"], steps[0]["observation"]["wrist_image"])
    examples = list(RLDSDataset(published))
    assert len(examples) == LENGTHS[0] and "wrist_image" not in examples[0]
    name, statistics = read_statistics(published, OPENVLA)
    assert name == "libero_spatial_no_noops" and statistics["num_transitions"] == LENGTHS[0]


def test_a_part_of_a_split_and_mistakes(directory: Path, tmp_path: Path) -> None:
    assert RLDSDataset(directory, split="train[:50%]").num_episodes == 2
    with pytest.raises(
        FileNotFoundError, match=r"no data set below it; give the directory that holds dataset_info.json"
    ):
        RLDSDataset(tmp_path)
    with pytest.raises(ValueError, match=r"shard=2 must be in 0..1"):
        RLDSDataset(directory, shard=2, num_shards=2)
    with pytest.raises(FileExistsError, match="give another directory"):
        RLDSWriter(directory, "tabletop", OPENVLA)
    with RLDSWriter(tmp_path, "other", OPENVLA) as writer, pytest.raises(ValueError, match="3 frames and 2 actions"):
        writer.add(Demonstration(DEMONSTRATIONS[0].images, DEMONSTRATIONS[0].actions[:2], "push"))
    assert list(tmp_path.iterdir()) == [], "a data set without episodes is none"


def test_what_was_not_written_to_its_end_is_no_data_set(directory: Path, tmp_path: Path) -> None:
    partial = shutil.copytree(directory / "tabletop" / "1.0.0", tmp_path / "tabletop" / "1.0.0.incomplete")
    for name in (tmp_path, partial):
        with pytest.raises(
            FileNotFoundError, match=r"1\.0\.0\.incomplete was not written to its end; collect it again"
        ):
            rlds.find_dataset(name)
    with pytest.raises(FileExistsError, match="incomplete exists; give another directory, or remove it"):
        RLDSWriter(tmp_path, "tabletop", OPENVLA)
    whole = shutil.copytree(directory / "tabletop" / "1.0.0", tmp_path / "tabletop" / "1.0.0")
    assert rlds.find_dataset(tmp_path) == whole


def test_episodes_are_counted_without_tensorflow(directory: Path, tmp_path: Path) -> None:
    assert rlds.num_episodes(rlds.find_dataset(directory)) == {"train": len(LENGTHS)}
    for content in ("{", "[]", '{"splits": ["train"]}'):
        (tmp_path / "dataset_info.json").write_text(content)
        with pytest.raises(
            ValueError,
            match=r"dataset_info.json (cannot be read|holds list, must hold an object).*; copy or collect it again",
        ):
            rlds.num_episodes(tmp_path)
    (tmp_path / "dataset_info.json").write_text(
        '{"splits": [{"name": "test"}, {"name": "train", "shardLengths": ["2", "3"]}]}'
    )
    assert rlds.num_episodes(tmp_path) == {"test": 0, "train": 5}
