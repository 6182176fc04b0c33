"""Metadata of RLDS data sets as TensorFlow Datasets writes them, made without it."""

import copy
import json
from pathlib import Path
from typing import Any

PREFIX = "tensorflow_datasets.core.features."


def tensor(dtype: str, *shape: int, kind: str = "tensor_feature.Tensor") -> dict[str, Any]:
    dimensions = {"shape": {"dimensions": [str(size) for size in shape]} if shape else {}}
    return {"pythonClassName": PREFIX + kind, "tensor": {"dtype": dtype, "encoding": "none", **dimensions}}


def image(encoding: str, dtype: str = "uint8", shape: tuple[int, ...] = (32, 32, 3)) -> dict[str, Any]:
    content = {"dtype": dtype, "encodingFormat": encoding, "shape": {"dimensions": [str(size) for size in shape]}}
    return {"pythonClassName": PREFIX + "image_feature.Image", "image": content}


def features_dict(features: dict[str, Any]) -> dict[str, Any]:
    return {"pythonClassName": PREFIX + "features_dict.FeaturesDict", "featuresDict": {"features": features}}


TEXT = {"pythonClassName": PREFIX + "text_feature.Text", "text": {}}
STEP = {
    "observation": features_dict({"image": image("jpeg"), "state": tensor("float32", 8)}),
    "action": tensor("float32", 7),
    "language_instruction": TEXT,
    "reward": tensor("float32", kind="scalar.Scalar"),
}
INFO = {
    "fileFormat": "tfrecord",
    "moduleName": "tabletop",
    "name": "tabletop",
    "splits": [
        {
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "name": "train",
            "numBytes": "9",
            "shardLengths": ["1", "2"],
        }
    ],
    "version": "1.0.0",
}


def features(step: dict[str, Any] | None = None) -> dict[str, Any]:
    """Of a data set whose steps are `step`."""
    steps = {
        "pythonClassName": PREFIX + "dataset_feature.Dataset",
        "sequence": {"feature": features_dict(copy.deepcopy(step or STEP)), "length": "-1"},
    }
    return features_dict({"steps": steps, "episode_metadata": features_dict({"file_path": TEXT})})


def write_metadata(path: Path, feature: Any = None, info: Any = None) -> Path:
    """The two files, as they should be unless given."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "features.json").write_text(json.dumps(features() if feature is None else feature))
    (path / "dataset_info.json").write_text(json.dumps(INFO if info is None else info))
    return path
