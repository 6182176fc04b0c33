"""Loading and saving: published tensor names, shards, the Hub's cache, transformers' automatic classes, errors."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlamaConfig

from vlarl_rllib.models.openvla import OpenVLAConfig, OpenVLAForActionPrediction, OpenVLAProcessor

HUB_ID = "someone/openvla-small"


@pytest.fixture
def hub_cache(golden_s, tmp_path):
    """A Hugging Face cache that already holds checkpoint S as `HUB_ID`, as a download leaves it."""
    commit = "0123456789012345678901234567890123456789"
    repository = tmp_path / ("models--" + HUB_ID.replace("/", "--"))
    shutil.copytree(golden_s.directory, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return {"cache_dir": str(tmp_path), "local_files_only": True}


@pytest.fixture
def copy_of_s(golden_s, tmp_path):
    return shutil.copytree(golden_s.directory, tmp_path / "S")


def test_the_7b_model_has_exactly_the_published_tensors(golden_s):
    published = json.loads((golden_s.directory.parent / "openvla_7b_state_dict.json").read_text())
    config = OpenVLAConfig(
        text_config={"model_type": "llama", "pad_token_id": 32000, "torch_dtype": "bfloat16", "vocab_size": 32064}
    )
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(config)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert len(shapes) == 982
    assert shapes == {name: list(shape) for name, shape in published.items()}
    assert config.text_config.rms_norm_eps == 1e-6
    assert config.action_token_ids == range(31744, 32000)
    assert config.num_patches == 256


@pytest.mark.parametrize("max_shard_size", ["1GB", "200KB"])
def test_a_saved_model_loads_back_byte_equal_under_published_names(golden_s, tmp_path, max_shard_size):
    model = copy.deepcopy(golden_s.model)
    model.add_value_head()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    golden_s.processor.save_pretrained(tmp_path)

    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (max_shard_size == "200KB")
    saved = {}
    for shard in tmp_path.glob("*.safetensors"):
        saved.update(load_file(shard))
    original = load_file(golden_s.directory / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in original.items())

    # the saved config.json knows the tower sizes
    loaded = OpenVLAForActionPrediction.from_pretrained(tmp_path)
    inputs = OpenVLAProcessor.from_pretrained(tmp_path)(
        images=[golden_s.arrays["images_u8"][0]], instructions=[str(golden_s.arrays["instructions"][0])]
    )
    prediction = loaded.predict_action(**inputs, unnorm_key="libero_spatial")
    assert torch.equal(prediction.tokens[0], golden_s.tensor("greedy_tokens")[0])


def test_a_hub_id_loads_from_the_cache(golden_s, hub_cache):
    config = OpenVLAConfig.from_pretrained(HUB_ID, vision_towers=golden_s.vision_towers, **hub_cache)
    model = OpenVLAForActionPrediction.from_pretrained(HUB_ID, config=config, dtype=torch.float32, **hub_cache)
    processor = OpenVLAProcessor.from_pretrained(HUB_ID, **hub_cache)
    assert processor.prompt_ids("push the plate") == golden_s.processor.prompt_ids("push the plate")
    for name, tensor in golden_s.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_automatic_classes_find_ours(golden_s):
    config = AutoConfig.from_pretrained(golden_s.directory)
    assert isinstance(config, OpenVLAConfig) and isinstance(config.text_config, LlamaConfig)
    assert isinstance(AutoProcessor.from_pretrained(golden_s.directory), OpenVLAProcessor)
    model = AutoModelForImageTextToText.from_pretrained(
        golden_s.directory, vision_towers=golden_s.vision_towers, dtype=torch.float32
    )
    assert isinstance(model, OpenVLAForActionPrediction)


def test_dataset_statistics_lie_over_those_of_the_config(copy_of_s, golden_s):
    statistics = {"my_data_no_noops": {"action": {"q01": [0.0] * 7, "q99": [2.0] * 7, "mask": [True] * 7}}}
    (copy_of_s / "dataset_statistics.json").write_text(json.dumps(statistics))
    model = OpenVLAForActionPrediction.from_pretrained(copy_of_s, vision_towers=golden_s.vision_towers)
    # a key without its _no_noops ending is found too, and the config's own keys remain
    assert model.config.action_statistics("my_data")["q99"] == [2.0] * 7
    assert model.config.action_statistics("libero_goal")["q99"][5] == 0.375
    assert OpenVLAConfig.from_pretrained(copy_of_s).norm_stats.keys() == model.config.norm_stats.keys()


def test_an_unknown_unnorm_key_names_the_choices(golden_s):
    with pytest.raises(ValueError, match=r"unnorm_key='bridge' is not in this checkpoint.*'libero_spatial'"):
        golden_s.model.predict_action(**golden_s.inputs(slice(0, 1)), unnorm_key="bridge")


@pytest.mark.parametrize("missing", ["config.json", "preprocessor_config.json", "tokenizer.json"])
def test_a_missing_file_is_named(copy_of_s, golden_s, missing):
    def load():
        OpenVLAForActionPrediction.from_pretrained(copy_of_s, vision_towers=golden_s.vision_towers)
        OpenVLAProcessor.from_pretrained(copy_of_s)

    (copy_of_s / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        load()


def test_missing_weights_and_missing_checkpoints_are_errors(copy_of_s, golden_s):
    (copy_of_s / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        OpenVLAForActionPrediction.from_pretrained(copy_of_s, vision_towers=golden_s.vision_towers)
    for checkpoint in ("runs/none/here", "./none", "tyni"):
        with pytest.raises(FileNotFoundError, match="neither a directory nor a Hugging Face id"):
            OpenVLAForActionPrediction.from_pretrained(checkpoint)


def test_tensors_that_do_not_fit_are_an_error_and_not_random_weights(copy_of_s, golden_s):
    towers = golden_s.vision_towers
    wide = {**towers, "featurizer": {**towers["featurizer"], "embed_dim": 64}}
    with pytest.raises(ValueError, match=r"mismatched_keys.*pass vision_towers"):
        OpenVLAForActionPrediction.from_pretrained(copy_of_s, vision_towers=wide)
    tensors = load_file(copy_of_s / "model.safetensors")
    tensors["projector.fc9.weight"] = tensors.pop("projector.fc1.weight")
    save_file(tensors, copy_of_s / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing_keys.*projector.fc1.weight.*unexpected_keys.*projector.fc9.weight"):
        OpenVLAForActionPrediction.from_pretrained(copy_of_s, vision_towers=towers)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_towers": {"siglip": {}}}, "unknown towers.*siglip.*choose from.*fused_featurizer"),
        ({"vision_towers": {"featurizer": {"width": 8}}}, "unknown keys.*width.*choose from.*embed_dim"),
        ({"vision_towers": {"featurizer": {"embed_dim": 100}}}, "embed_dim=100 must be a multiple of num_heads=16"),
        ({"vision_towers": {"featurizer": {"depth": 1}}}, "depth=1 must be at least 2"),
        ({"vision_towers": {"featurizer": {"img_size": 28}}}, "img_size=28 must equal image_sizes=224"),
        ({"image_sizes": [30, 30]}, "img_size=30 must be a multiple of patch_size=14"),
        ({"image_sizes": [28, 56]}, "same number of patches"),
        ({"use_fused_vision_backbone": False}, "only True with"),
    ],
)
def test_impossible_towers_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        OpenVLAConfig(**fields).vision_tower_configs()
