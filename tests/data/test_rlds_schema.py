"""Which metadata are read at all, and which layouts: told before TensorFlow, in one line."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rlds_files import INFO, PREFIX, STEP, TEXT, features, features_dict, image, tensor, write_metadata

from vlarl_rllib.data.rlds import check_dataset, episodes_of_split
from vlarl_rllib.runs.preflight import check_sft
from vlarl_rllib.settings import Settings, SettingsError


def step_of(feature: dict[str, Any]) -> dict[str, Any]:
    return feature["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]


def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    feature = features()
    change(feature)
    return feature


def of_class(name: str) -> dict[str, Any]:
    return changed(lambda feature: step_of(feature)["reward"].update(pythonClassName=name))


def nested_json() -> dict[str, Any]:
    inner = json.dumps({"feature": {"type": "trap.Feature", "content": {}}, "length": 1})
    return changed(
        lambda feature: step_of(feature).update(
            reward={"pythonClassName": PREFIX + "sequence_feature.Sequence", "jsonFeature": {"json": inner}}
        )
    )


FOREIGN = {
    "a module beside it": of_class("trap.Feature"),
    "a class that is called like one": of_class("tensorflow_datasets.core.features.trap.Text"),
    "more dots": of_class("tensorflow_datasets.core.features..trap.Text"),
    "a path behind the prefix": of_class("tensorflow_datasets.core.features.text_feature.Text.trap.Feature"),
    "no dot": of_class("Text"),
    "the outermost": changed(lambda feature: feature.update(pythonClassName="trap.Features")),
    "inside of a sequence": changed(
        lambda feature: step_of(feature).update(
            reward={
                "pythonClassName": PREFIX + "sequence_feature.Sequence",
                "sequence": {"feature": {"pythonClassName": "trap.F", "text": {}}, "length": "1"},
            }
        )
    ),
    "JSON inside of JSON": nested_json(),
    "the old layout": {"type": "trap.Feature", "content": {}},
    "the old layout beside the new": changed(lambda feature: feature.update(type="trap.Feature", content={})),
    "the other spelling": changed(lambda feature: step_of(feature)["reward"].update(python_class_name="trap.Feature")),
    "the other spelling of a content": changed(
        lambda feature: feature.update(features_dict={"features": {"x": {"pythonClassName": "trap.F"}}})
    ),
    "a name that leads out": changed(lambda feature: step_of(feature).update({"../../label": TEXT})),
    "no object": ["trap.Feature"],
    "a number inside": changed(lambda feature: step_of(feature).update(reward=1)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_features_that_would_run_foreign_code_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"features\.json") as caught:
        check_dataset(write_metadata(tmp_path, FOREIGN[name]))
    assert "\n" not in str(caught.value)


def with_split(**values: Any) -> dict[str, Any]:
    return copy.deepcopy(INFO) | {"splits": [INFO["splits"][0] | values]}


FOREIGN_INFO = {
    "features": INFO | {"features": of_class("trap.Feature")},
    "another format": INFO | {"fileFormat": "parquet"},
    "the other spelling": INFO | {"file_format": "parquet"},
    "the other spelling in a split": with_split(filepath_template="/etc/{SPLIT}"),
    "a template that leads out": with_split(filepathTemplate="../{SPLIT}"),
    "an absolute template": with_split(filepathTemplate="/etc/passwd"),
    "a template that looks into things": with_split(filepathTemplate="{SPLIT.__class__}"),
    "a template that is a web address": with_split(filepathTemplate="gs://bucket/{SPLIT}"),
    "a name that leads out": INFO | {"name": "../../elsewhere/tabletop"},
    "a split that leads out": with_split(name="../train"),
    "no list of splits": INFO | {"splits": {"train": 1}},
}


@pytest.mark.parametrize("name", FOREIGN_INFO)
def test_information_that_leads_out_of_the_directory_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset_info\.json") as caught:
        check_dataset(write_metadata(tmp_path, None, FOREIGN_INFO[name]))
    assert "\n" not in str(caught.value)


def with_step(**values: Any) -> dict[str, Any]:
    step = copy.deepcopy(STEP) | values
    return features({name: feature for name, feature in step.items() if feature})


def with_image(feature: dict[str, Any] | None) -> dict[str, Any]:
    return with_step(
        observation=features_dict({"state": tensor("float32", 8)} | ({"image": feature} if feature else {}))
    )


OTHER_LAYOUTS = {
    "8 numbers": (
        with_step(action=tensor("float32", 8)),
        "steps/action is tensor_feature.Tensor float32[8], must be 7 numbers of float16",
    ),
    "whole numbers": (with_step(action=tensor("int64", 7)), "steps/action is tensor_feature.Tensor int64[7], must be"),
    "actions in parts": (
        with_step(action=features_dict({"grip": tensor("float32", 1)})),
        "steps/action is features_dict.FeaturesDict, must be",
    ),
    "no instruction": (
        with_step(language_instruction=None),
        "its steps lack language_instruction; the layout must be that of openvla/",
    ),
    "an embedded instruction": (
        with_step(language_instruction=tensor("float32", 512)),
        "steps/language_instruction is tensor_feature.Tensor",
    ),
    "no image": (with_image(None), "its steps lack observation/image; the layout"),
    "one colour": (
        with_image(image("png", shape=(32, 32, 1))),
        "steps/observation/image is image_feature.Image uint8[32, 32, 1], must be JPEG, PNG",
    ),
    "float frames": (
        with_image(tensor("float32", 32, 32, 3)),
        "steps/observation/image is tensor_feature.Tensor float32[32, 32, 3], must be",
    ),
    "deep frames": (
        with_image(image("png", dtype="uint16")),
        "steps/observation/image is image_feature.Image uint16[32, 32, 3], must be",
    ),
    "a column of steps": (
        changed(
            lambda feature: feature["featuresDict"]["features"]["steps"].update(
                pythonClassName=PREFIX + "sequence_feature.Sequence"
            ),
        ),
        "steps is sequence_feature.Sequence, must be dataset_feature.Dataset",
    ),
    "no steps": (features_dict({"image": image("png")}), "steps is missing, must be dataset_feature.Dataset"),
}


@pytest.mark.parametrize("name", OTHER_LAYOUTS)
def test_another_layout_is_told_before_anything_starts(name: str, tmp_path: Path) -> None:
    feature, message = OTHER_LAYOUTS[name]
    write_metadata(tmp_path, feature)
    with pytest.raises(SettingsError, match=r"^sft\.data: ") as caught:
        check_sft(Settings.from_dict({"sft": {"data": str(tmp_path)}}))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "frames",
    [image("jpeg"), image("png"), image("jpeg", shape=(-1, -1, 3)), tensor("uint8", 32, 32, 3)],
    ids=["jpeg", "png", "any size", "raw"],
)
def test_the_layouts_that_are_read(frames: dict[str, Any], tmp_path: Path) -> None:
    string = tensor("string")
    for step in ({}, {"language_instruction": string}, {"action": tensor("float64", 7)}):
        write_metadata(tmp_path, with_image(frames) if not step else with_step(**step))
        assert check_dataset(tmp_path) == {"train": 3}


def test_statistics_that_cannot_be_used_are_told_before_anything_starts(tmp_path: Path) -> None:
    write_metadata(tmp_path)
    action = {"q01": [0.0] * 7, "q99": [1.0] * 6 + [float("nan")]}
    (tmp_path / "dataset_statistics.json").write_text(json.dumps({"x": {"action": action, "num_transitions": 3}}))
    with pytest.raises(
        SettingsError,
        match=r"^sft\.data: .*dataset_statistics\.json is damaged .*action\.q99 is .*nan\], must be 7 finite numbers",
    ):
        check_sft(Settings.from_dict({"sft": {"data": str(tmp_path)}}))


@pytest.mark.parametrize(
    ("split", "episodes"),
    [
        ("train", 40),
        ("train[:95%]", 38),
        ("train[10:]", 30),
        ("train[10:12]", 2),
        ("train[-5:]", 5),
        ("train[50%:-10]", 10),
        ("train[5:3]", 0),
    ],
)
def test_episodes_of_a_part_of_a_split(split: str, episodes: int) -> None:
    assert episodes_of_split(split, {"train": 40, "val": 3}) == episodes


@pytest.mark.parametrize("split", ["train[:95", "train[:abc]", "test", "train[41:]", "train+val", "train[1]", ""])
def test_what_is_no_part_of_a_split_is_told(split: str) -> None:
    with pytest.raises(
        ValueError, match=r"is no split of the data set, which has train, val|reaches beyond the 40 episodes of train"
    ):
        episodes_of_split(split, {"train": 40, "val": 3})


def without_a_sequence(feature: dict[str, Any]) -> None:
    del feature["featuresDict"]["features"]["steps"]["sequence"]


def with_an_image_that_is_a_list(feature: dict[str, Any]) -> None:
    step_of(feature)["observation"]["featuresDict"]["features"]["image"]["image"] = []


@pytest.mark.parametrize("damage", [without_a_sequence, with_an_image_that_is_a_list])
def test_damaged_metadata_are_one_line(damage: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    write_metadata(tmp_path, changed(damage))
    with pytest.raises(ValueError, match=r"^[^\n]+features.json[^\n]+$"):
        check_dataset(tmp_path)
