"""What the steps of a data set hold: PNG and raw frames are read too, and what cannot be learned from is told with
file, episode and feature."""

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlarl_rllib.data import Demonstration, RLDSWriter, rlds
from vlarl_rllib.data.frames import checked_episode, decoded
from vlarl_rllib.models.openvla.family import FAMILY as OPENVLA

FRAMES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)


def encoded(frame: np.ndarray, encoding: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format=encoding)
    return buffer.getvalue()


def stored(**changes: Any) -> dict[str, Any]:
    episode = {
        "image": [encoded(frame, "PNG") for frame in FRAMES],
        "action": np.zeros((2, 7), np.float64),
        "instruction": b"push the cube",
    }
    return episode | changes


NOT_A_NUMBER = np.array([[0.0] * 7, [0.0, 0.0, np.nan, 0.0, 0.0, 0.0, 1.0]])
JPEG = encoded(FRAMES[0], "JPEG")
MISTAKES = {
    "8 numbers": (stored(action=np.zeros((2, 8), np.float32)), "steps/action is float32 [2, 8], must be float [2, 7]"),
    "whole numbers": (stored(action=np.zeros((2, 7), np.int64)), "steps/action is int64 [2, 7], must be float [2, 7]"),
    "a frame too few": (stored(image=[JPEG]), "steps/action is float64 [2, 7], must be float [1, 7]"),
    "NaN": (stored(action=NOT_A_NUMBER), "steps/action of step 1 is nan at number 2, must be finite"),
    "too large for float32": (
        stored(action=np.full((2, 7), 1e300)),
        "steps/action of step 0 is inf at number 0, must be finite",
    ),
    "no steps": (stored(image=[], action=np.zeros((0, 7), np.float32)), "has no steps, must have at least 1"),
    "float frames": (
        stored(image=FRAMES / 255.0),
        "steps/observation/image of step 0 is float64 [16, 16, 3], must be a JPEG or PNG file",
    ),
    "grey frames": (
        stored(image=FRAMES[..., 0]),
        "steps/observation/image of step 0 is uint8 [16, 16], must be a JPEG",
    ),
    "a grey file": (
        stored(image=[JPEG, encoded(FRAMES[0, ..., 0], "PNG")]),
        "image of step 1 is a PNG file of another kind than 8-bit RGB",
    ),
    "another format": (
        stored(image=[encoded(FRAMES[0], "BMP")] * 2),
        "steps/observation/image of step 0 begins with b'BM",
    ),
    "half a header": (stored(image=[JPEG[:20]] * 2), "steps/observation/image of step 0 cannot be read"),
    "another size": (
        stored(image=[JPEG, encoded(FRAMES[0, :8], "JPEG")]),
        "image of step 1 is 8 x 16 pixels, must be 16 x 16 as those before",
    ),
    "no instruction": (stored(instruction=b" "), "steps/language_instruction is empty, must say what is to be done"),
    "no text": (stored(instruction=b"\xff\xfe"), "steps/language_instruction is no UTF-8"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_cannot_be_learned_from_is_told(name: str) -> None:
    episode, message = MISTAKES[name]
    with pytest.raises(ValueError, match=r"^data: episode 3") as caught:
        checked_episode(episode, "data: episode 3", None)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_frames_are_decoded_from_files_and_taken_raw() -> None:
    for images in (FRAMES, [encoded(frame, "PNG") for frame in FRAMES]):
        episode = checked_episode(stored(image=images), "", None)
        np.testing.assert_array_equal([decoded(image) for image in episode["image"]], FRAMES)
    assert episode["action"].dtype == np.float32 and episode["instruction"] == "push the cube"
    assert decoded(JPEG).shape == (16, 16, 3)


def test_what_is_not_finite_is_not_written(tmp_path: Path) -> None:
    actions = np.zeros((2, 7), np.float32)
    for broken in (
        {"actions": NOT_A_NUMBER},
        {"actions": np.zeros((2, 8), np.float32)},
        {"states": np.full((2, 8), np.inf)},
        {"joint_states": np.full((2, 7), np.nan)},
        {"images": FRAMES / 255.0},
    ):
        demonstration = Demonstration(**({"images": list(FRAMES), "actions": actions, "instruction": "push"} | broken))
        with RLDSWriter(tmp_path, "tabletop", OPENVLA) as writer, pytest.raises(ValueError, match="a demonstration's"):
            writer.add(demonstration)
    assert list(tmp_path.iterdir()) == []


WRITER = """
import io, json, os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import numpy as np, tensorflow_datasets as tfds
from vlarl_rllib.data.frames import checked_episode, decoded
from vlarl_rllib.data.schema import check_metadata
from vlarl_rllib.data.tfds_process import read
frames = np.load(sys.argv[2])
image = {name: tfds.features.Image(shape=(16, 16, 3), encoding_format=name) for name in ("png", "jpeg")} | {
    "raw": tfds.features.Tensor(shape=(16, 16, 3), dtype=np.uint8, encoding="zlib")}
for name, lengths in (("png", [2]), ("raw", [2]), ("jpeg", [1, 0])):
    path = os.path.join(sys.argv[1], name)
    os.makedirs(path)
    step = {"observation": {"image": image[name]}, "action": tfds.features.Tensor(shape=(7,), dtype=np.float64), "language_instruction": tfds.features.Text()}
    identity = tfds.core.dataset_info.DatasetIdentity(name=name, version=tfds.core.Version("1.0.0"), data_dir=path, module_name=name)
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict({"steps": tfds.features.Dataset(step)}))
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=64)
    writer.initialize_splits(["train"])
    steps = [{"observation": {"image": frame}, "action": np.ones(7), "language_instruction": "push"} for frame in frames]
    writer.add_examples({"train": [{"steps": steps[:length]} for length in lengths]})
    writer.close_all()
    from pathlib import Path
    check_metadata(Path(path))
    try:
        episodes = [checked_episode(episode, path, None) for episode in read(None, Path(path), "train")]
        print(json.dumps([[decoded(frame).tolist() for frame in episode["image"]] for episode in episodes]))
    except ValueError as error:
        print(json.dumps(str(error)))
"""  # noqa: E501


@pytest.mark.skipif(importlib.util.find_spec("tensorflow_datasets") is None, reason="RLDS data need the `data` extra")
def test_other_encodings_are_read_as_tensorflow_datasets_wrote_them(tmp_path: Path) -> None:
    np.save(tmp_path / "frames.npy", FRAMES)
    done = subprocess.run(
        [sys.executable, "-c", WRITER, str(tmp_path / "data"), str(tmp_path / "frames.npy")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    png, raw, empty = map(json.loads, done.stdout.splitlines())
    assert png == raw == [FRAMES.tolist()]
    assert (
        empty
        == f"{tmp_path}/data/jpeg: episode 1 has no steps, must have at least 1; collect it again without that episode"
    )


def test_a_file_that_is_cut_short_names_step_and_episode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = encoded(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8), "PNG")
    (tmp_path / "dataset_info.json").write_text("{}")
    episodes = [stored(), stored(image=[whole, whole[:2000]])]
    monkeypatch.setattr(
        rlds, "read_episodes", lambda path, split: iter([checked_episode(episode, "", None) for episode in episodes])
    )
    data = rlds.RLDSDataset(tmp_path, shard=1, num_shards=2)
    assert data[0]["image"].shape == (64, 64, 3)
    with pytest.raises(ValueError, match=rf"^{tmp_path}: the frame of step 1 in episode 1 cannot be decoded"):
        data[1]
