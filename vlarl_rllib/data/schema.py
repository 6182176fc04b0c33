"""What an RLDS data set says of itself, checked before TensorFlow Datasets reads it: that reading runs no foreign code,
and that the steps are ours.

`features.json` names Python classes, which TensorFlow Datasets imports and calls; `dataset_info.json` may hold such
names too, and says which files hold the data. Only TensorFlow Datasets' own classes and files inside the data set's
directory pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlarl_rllib.process.json_files import read_json_object

INFO_FILE, FEATURES_FILE = "dataset_info.json", "features.json"
FEATURES_PREFIX = "tensorflow_datasets.core.features."
FEATURE_CLASSES = {
    FEATURES_PREFIX + name
    for name in (
        "audio_feature.Audio", "bounding_boxes.BBoxFeature", "class_label_feature.ClassLabel",
        "dataset_feature.Dataset",
        "features_dict.FeaturesDict", "image_feature.Image", "scalar.Scalar", "sequence_feature.Sequence",
        "tensor_feature.Tensor",
        "text_feature.Text", "translation_feature.Translation", "translation_feature.TranslationVariableLanguages",
        "video_feature.Video",
    )
}  # fmt: skip
"""TensorFlow Datasets' own (4.9); whatever else a file names would be imported."""
CONTENTS = {
    "featuresDict", "sequence", "tensor", "text", "image", "classLabel", "boundingBox", "audio", "video", "translation",
}  # fmt: skip
"""What a feature may hold. `jsonFeature` is left out: its text may name classes in turn."""
LABELS = {"pythonClassName", "description", "valueRange"}
NAME = re.compile(r"[\w-]*")
TEMPLATE = re.compile(r"([\w-]|\.(?!\.)|\{(DATASET|SPLIT|FILEFORMAT|SHARD_INDEX|NUM_SHARDS|SHARD_X_OF_Y)\})*")
"""Names of data sets and splits, and what file names are made by, in one directory."""
FLOATS = ("float16", "float32", "float64")
LAYOUT = "the layout must be that of openvla/modified_libero_rlds"
AGAIN = "copy or collect it again"

Feature = dict[str, Any]


def check_metadata(path: Path) -> None:
    """Raise ValueError, in one line, for metadata that TensorFlow Datasets must not read, or whose steps are not those
    that we read.

    Args:
        path: the directory that holds `dataset_info.json`.
    """
    info = _read_object(path / INFO_FILE)
    _check_info(path / INFO_FILE, info)
    file = path / FEATURES_FILE
    features = _read_object(file)
    _check_classes(file, features)
    _check_steps(file, features)


def num_episodes(path: Path) -> dict[str, int]:
    """Episodes of each split, by what `dataset_info.json` says.

    Raises ValueError where that file is not as TensorFlow Datasets writes it.
    """
    file = path / INFO_FILE
    info = _read_object(file)
    try:
        return {split["name"]: sum(map(int, split.get("shardLengths", []))) for split in info["splits"]}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({type(error).__name__}: {error}); {AGAIN}") from None


def _read_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file} is missing; {AGAIN}, with TensorFlow Datasets 4.5 or later")
    return read_json_object(file, AGAIN)


# Nothing foreign


def _check_info(file: Path, info: dict[str, Any]) -> None:
    """The names that file names are made of, and features, which dataset_info.json may hold as well."""
    if unusual := sorted(name for name in info if "_" in name):  # protobuf takes both spellings, and we read one
        raise ValueError(f"{file}: {unusual[0]!r} is no key that TensorFlow Datasets writes; do not trust it")
    if info.get("fileFormat", "tfrecord") != "tfrecord":
        raise ValueError(
            f"{file}: fileFormat is {info['fileFormat']!r}, must be 'tfrecord'; write the data as TFRecord files"
        )
    if "features" in info:
        _check_classes(file, info["features"])
    splits = info.get("splits", [])
    if not isinstance(splits, list) or not all(isinstance(split, dict) for split in splits):
        raise ValueError(f"{file} cannot be read (splits is no list of objects); {AGAIN}")
    names = [("name", info.get("name", ""), NAME), *(("splits: name", split.get("name", ""), NAME) for split in splits)]
    names += [("splits: filepathTemplate", split.get("filepathTemplate", ""), TEMPLATE) for split in splits]
    for key, name, pattern in names:
        if not isinstance(name, str) or not pattern.fullmatch(name):
            raise ValueError(
                f"{file}: {key} is {name!r}, which makes no name of a file in this directory; do not trust it"
            )
    if unusual := sorted({key for split in splits for key in split if "_" in key}):
        raise ValueError(f"{file}: splits: {unusual[0]!r} is no key that TensorFlow Datasets writes; do not trust it")


def _check_classes(file: Path, feature: Any, name: str = "") -> None:
    """Of a feature and of those inside of it; `name` is its path, such as steps/action."""
    where = f"{file}: {name or 'the outermost feature'}"
    if not isinstance(feature, dict) or not isinstance(python_class := feature.get("pythonClassName"), str):
        raise ValueError(f"{where} names no pythonClassName; {AGAIN}, with TensorFlow Datasets 4.5 or later")
    if python_class not in FEATURE_CLASSES:
        raise ValueError(
            f"{where} is of class {python_class!r}, which is none of TensorFlow Datasets' own; its code is not run"
        )
    if unusual := sorted(feature.keys() - LABELS - CONTENTS):
        raise ValueError(
            f"{where} holds {unusual[0]!r}, which is not read; write the data with TensorFlow Datasets' own features"
        )
    for inner, inner_feature in _inner(where, feature):
        _check_classes(file, inner_feature, f"{name}/{inner}" if name and inner else name or inner)


def _inner(where: str, feature: Feature) -> Iterator[tuple[str, Any]]:
    """(name, feature) of those inside; a sequence's has none of its own."""
    for key, inside in (("featuresDict", "features"), ("sequence", "feature")):
        content = feature.get(key, {})
        if (
            not isinstance(content, dict)
            or (unusual := content.keys() - {inside, "length"})
            or not isinstance(content.get(inside, {}), dict)
        ):
            raise ValueError(f"{where}: its {key} {f'holds {min(unusual)!r}' if unusual else 'is no object'}; {AGAIN}")
    for name, inner in feature.get("featuresDict", {}).get("features", {}).items():
        if "/" in name or "\\" in name:  # files of labels are called by it
            raise ValueError(f"{where} has a feature called {name!r}; names must have no slashes")
        yield name, inner
    if "sequence" in feature:
        yield "", feature["sequence"].get("feature")


# The steps that we read


def _check_steps(file: Path, features: Feature) -> None:
    steps = _entries(features).get("steps", {})
    if _kind(steps) != "dataset_feature.Dataset":
        raise ValueError(f"{file}: steps is {_kind(steps)}, must be dataset_feature.Dataset; {LAYOUT}")
    step = _entries(steps.get("sequence", {}).get("feature", {}))
    observation = _entries(step.get("observation", {}))
    missing = [name for name in ("observation", "action", "language_instruction") if name not in step]
    if not missing and "image" not in observation:
        missing = ["observation/image"]
    if missing:
        raise ValueError(f"{file}: its steps lack {', '.join(missing)}; {LAYOUT}")
    _check_image(file, observation["image"])
    action, instruction = step["action"], step["language_instruction"]
    if _kind(action) != "tensor_feature.Tensor" or _shape(action) not in ([7], [-1]) or _dtype(action) not in FLOATS:
        raise ValueError(
            f"{file}: steps/action is {_described(action)}, must be 7 numbers of {', '.join(FLOATS)}; {LAYOUT}"
        )
    is_text = _kind(instruction) == "text_feature.Text" or (_dtype(instruction) == "string" and not _shape(instruction))
    if not is_text:
        raise ValueError(f"{file}: steps/language_instruction is {_described(instruction)}, must be a text; {LAYOUT}")


def _check_image(file: Path, image: Feature) -> None:
    """JPEG, PNG or raw, of three colours."""
    shape, encoding = _shape(image), _content(image).get("encodingFormat") or "jpeg"
    fits = len(shape) == 3 and shape[2] in (3, -1) and _dtype(image) == "uint8"
    if (
        _kind(image) not in ("image_feature.Image", "tensor_feature.Tensor")
        or not fits
        or encoding not in ("jpeg", "png")
    ):
        raise ValueError(
            f"{file}: steps/observation/image is {_described(image)}, must be JPEG, PNG or raw frames [H, W, 3] "
            f"of uint8; {LAYOUT}"
        )


def _entries(feature: Feature) -> dict[str, Feature]:
    return feature.get("featuresDict", {}).get("features", {})


def _kind(feature: Feature) -> str:
    return feature.get("pythonClassName", "missing").removeprefix(FEATURES_PREFIX)


def _content(feature: Feature) -> dict[str, Any]:
    content: Any = next((feature[key] for key in ("tensor", "image") if key in feature), {})
    return content if isinstance(content, dict) else {}


def _dtype(feature: Feature) -> str | None:
    return _content(feature).get("dtype")


def _shape(feature: Feature) -> list[int]:
    """-1 = any size; empty for a single value, and where the file says nothing that is a shape."""
    try:
        return [int(size) for size in _content(feature).get("shape", {}).get("dimensions", [])]
    except (TypeError, ValueError, AttributeError):
        return []


def _described(feature: Feature) -> str:
    return f"{_kind(feature)} {_dtype(feature) or ''}{_shape(feature) or ''}".strip()
