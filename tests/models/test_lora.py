"""Adapters: against the reference implementation's numbers, against PEFT itself, and their names and files."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from benchmarks.parity import ADAPTER_PREFIX, ADAPTER_TOLERANCES, adapter_differences
from vlarl_rllib.models.build import build_policy
from vlarl_rllib.models.lora import (
    MergedConv2d,
    MergedLinear,
    adapter_parameters,
    add_lora,
    load_adapter_weights,
    lora_layers,
    merge_lora,
    peft_name,
    save_adapter,
)
from vlarl_rllib.models.openvla import OpenVLAConfig, OpenVLAForActionPrediction
from vlarl_rllib.models.openvla.family import LORA_TARGETS
from vlarl_rllib.models.openvla.presets import PRESETS, build_model
from vlarl_rllib.models.presets import write_checkpoint
from vlarl_rllib.settings import LoraSettings, ModelSettings
from vlarl_rllib.weights.source import expected_tensors, iterate_weights, published_parameters


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


# The reference implementation


def test_the_adapter_is_as_the_original_computed_it(golden):
    """Logits, tokens, log-probs, gradients and merged weights with the golden adapter."""
    differences = adapter_differences(golden)
    if not differences:
        pytest.skip("golden checkpoint A has no adapter")
    assert {
        name for name in golden.arrays if name.startswith(ADAPTER_PREFIX)
    } | ADAPTER_TOLERANCES.keys() == differences.keys()
    assert {name: difference for name, difference in differences.items() if not difference.is_small} == {}


# PEFT


def randomize(parameters: dict[str, nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(parameters.items()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_checkpoint("tiny", directory)
    return directory


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = model.config.action_token_ids
    return {
        "input_ids": torch.tensor([[1, 6, 7, 8, 9], [1, 9, 8, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "pixel_values": torch.randint(256, (2, 3, 28, 28), generator=generator, dtype=torch.uint8),
        "action_tokens": torch.randint(ids.start, ids.stop, (2, 7), generator=generator),
    }


@pytest.mark.parametrize("targets", LORA_TARGETS)
def test_the_merged_product_equals_pefts(targets, tiny, tmp_path):
    """Logits, gradients and the merged model, through PEFT's own layers and its own reading of our file."""
    ours = build_model(PRESETS["tiny"])
    config = add_lora(ours, LoraSettings(rank=4, targets=targets), LORA_TARGETS)
    randomize(adapter_parameters(ours))
    save_adapter(ours, config, tmp_path, str(tiny))
    theirs = PeftModel.from_pretrained(
        OpenVLAForActionPrediction.from_pretrained(tiny, dtype=torch.float32), str(tmp_path), is_trainable=True
    )
    assert not any(isinstance(module, (MergedLinear, MergedConv2d)) for module in theirs.modules())

    inputs = inputs_of(ours)
    logits = {}
    for name, model in (("ours", ours), ("theirs", theirs.base_model.model)):
        hidden, _ = model.action_hidden_states(**inputs)
        logits[name] = model.language_model.lm_head(hidden)
    assert_close(logits["ours"], logits["theirs"], 2e-5)
    ids = ours.action_token_ids
    assert_close(ours.action_logits(**inputs), logits["theirs"][..., ids.start : ids.stop], 2e-5)

    weights = torch.randn(logits["ours"].shape, generator=torch.Generator().manual_seed(2))
    (logits["ours"] * weights).mean().backward()
    (logits["theirs"] * weights).mean().backward()
    expected = adapter_parameters(theirs.base_model.model)
    own = adapter_parameters(ours)
    assert own.keys() == expected.keys() and len(own) > 20
    for name, parameter in expected.items():
        assert (own[name].grad is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            assert (own[name].grad - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-9, name

    merged = theirs.merge_and_unload().state_dict()
    sent = dict(iterate_weights(ours, torch.float32))
    assert sent.keys() == expected_tensors(build_model(PRESETS["tiny"])).keys() == merged.keys()
    for name, weight in sent.items():
        assert_close(weight, merged[name], 2e-6)


def adapted_layers() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(48, 96), nn.SiLU(), nn.Linear(96, 48))
    add_lora(layers, LoraSettings(rank=4, targets=["0", "2"]))
    randomize(adapter_parameters(layers))
    return layers


def test_a_compiled_pass_keeps_no_merged_weights():
    """Its two directions merge the same; what they share would be kept in between, by default."""
    plain, compiled = adapted_layers(), adapted_layers()
    compiled.compile(backend="aot_eager_decomp_partition", dynamic=False, fullgraph=True)
    x, kept = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)), []
    own = {parameter.data_ptr() for parameter in compiled.parameters()}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = compiled(x)
    assert kept and all(shape[0] == 5 for shape in kept), "rows of activations"
    expected = plain(x)
    assert_close(out, expected, 1e-6)
    for result in (out, expected):
        result.square().sum().backward()
    for ours, theirs in zip(adapter_parameters(compiled).values(), adapter_parameters(plain).values(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_an_adapter_that_peft_made_trains_on_here(tiny, tmp_path):
    base = OpenVLAForActionPrediction.from_pretrained(tiny, dtype=torch.float32)
    theirs = get_peft_model(
        base, LoraConfig(r=3, lora_alpha=5, lora_dropout=0.5, target_modules=["q_proj", "fc1"], use_rslora=True)
    )
    randomize({name: parameter for name, parameter in theirs.named_parameters() if "lora_" in name})
    theirs.eval().save_pretrained(str(tmp_path))
    ours = build_policy(ModelSettings(path=str(tiny), lora=LoraSettings(adapter=str(tmp_path))))
    inputs = inputs_of(ours)
    assert_close(ours.action_logits(**inputs), theirs.base_model.model.action_logits(**inputs), 2e-5)
    trained = {peft_name(name) for name, parameter in ours.named_parameters() if parameter.requires_grad}
    # The last of three blocks is never run, nor is the pooling head.
    dead = {name for name in adapter_parameters(ours) if "featurizer.blocks.2." in name or "attn_pool" in name}
    assert trained == adapter_parameters(ours).keys() - dead and dead


# Names


def test_the_7b_model_gets_the_published_adapters_and_every_name_goes_both_ways(golden_s):
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(OpenVLAConfig(text_config={"pad_token_id": 32000, "vocab_size": 32064}))
        config = add_lora(model, LoraSettings(rank=32), LORA_TARGETS)
    assert config.lora_alpha == 16
    layers, parameters = dict(lora_layers(model)), adapter_parameters(model)
    assert len(layers) == 439
    assert sum(parameter.numel() for parameter in parameters.values()) == 110_828_288
    published = json.loads((golden_s.directory.parent / "openvla_7b_state_dict.json").read_text())
    for name, layer in layers.items():
        lora_a, lora_b, scaling = layer.factors
        assert scaling == 0.5
        assert parameters[f"base_model.model.{name}.lora_A.weight"] is lora_a
        assert parameters[f"base_model.model.{name}.lora_B.weight"] is lora_b
        assert list(layer.base_layer.weight.shape) == published[f"{name}.weight"]
    assert {item.name for item in published_parameters(model)} == published.keys()


@pytest.mark.parametrize(("targets", "modules"), [("language_model", 224), ("frozen_vision", 228)])
def test_smaller_choices_of_targets_leave_the_towers_alone(targets, modules):
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(OpenVLAConfig(text_config={"pad_token_id": 32000, "vocab_size": 32064}))
        add_lora(model, LoraSettings(targets=targets), LORA_TARGETS)
    names = [name for name, _ in lora_layers(model)]
    assert len(names) == modules  # 32 layers x 7, and with frozen vision the head and three projector layers
    assert not [name for name in names if name.startswith("vision_backbone")]


def test_merging_by_hand():
    weight, lora_a, lora_b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[0.5]])
    # 1 + 2 x 0.5 x 3 = 4 and 2 + 2 x 0.5 x 4 = 6
    assert merge_lora(weight, lora_a, lora_b, 2.0).tolist() == [[4.0, 6.0]]
    # One rounding: 256 + 1 + 1 is 258, which bfloat16 has; 256 + 1 alone would have been rounded back to 256 first.
    ones = torch.ones(1, 2), torch.ones(1, 1)
    assert merge_lora(torch.tensor([[256.0, 0.0]]).bfloat16(), *ones, 2.0).tolist() == [[258.0, 2.0]]
    assert merge_lora(weight.bfloat16(), lora_a, lora_b, 2.0).dtype == torch.bfloat16


def test_bfloat16_runs_on_the_weights_that_are_sent():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8).bfloat16())
    add_lora(model, LoraSettings(rank=2, targets=["0"]))
    randomize(adapter_parameters(model))
    x = torch.randn(3, 8).bfloat16()
    sent = dict(iterate_weights(model, torch.bfloat16))
    assert torch.equal(model(x), F.linear(x, sent["0.weight"]) + sent["0.bias"])
    assert all(parameter.dtype == torch.float32 for parameter in adapter_parameters(model).values())


# Mistakes


def test_adapters_that_do_not_fit_are_refused(tiny, tmp_path):
    model = build_model(PRESETS["tiny"])
    with pytest.raises(FileNotFoundError, match=r"no PEFT adapter here \(adapter_config.json is missing\)"):
        add_lora(model, LoraSettings(adapter=str(tmp_path)))
    config = add_lora(model, LoraSettings(rank=2, targets=["q_proj"]))
    save_adapter(model, config, tmp_path, str(tiny))
    other = build_model(PRESETS["tiny"])
    add_lora(other, LoraSettings(rank=3, targets=["q_proj"]))
    with pytest.raises(
        ValueError, match=r"4 tensors do not fit this model, the first is base_model.model.language_model.*lora_A"
    ):
        load_adapter_weights(other, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True}))
    with pytest.raises(ValueError, match="uses use_dora, which is not supported"):
        add_lora(build_model(PRESETS["tiny"]), LoraSettings(adapter=str(tmp_path)))
    file.write_text(file.read_text().replace('"use_dora": true', '"megatron_core": "trap"'))  # a module to import
    with pytest.raises(ValueError, match="uses megatron_core, which is not supported"):
        add_lora(build_model(PRESETS["tiny"]), LoraSettings(adapter=str(tmp_path)))
    file.write_text(file.read_text().replace('"trap"', '"megatron.core"'))
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(
        ValueError,
        match=r"adapter_model\.safetensors is damaged: its header describes \d+ bytes, it has \d+; copy it again",
    ):
        add_lora(build_model(PRESETS["tiny"]), LoraSettings(adapter=str(tmp_path)))
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors; weights in another format"):
        add_lora(build_model(PRESETS["tiny"]), LoraSettings(adapter=str(tmp_path)))
    file.write_text("[")
    with pytest.raises(ValueError, match=r"adapter_config\.json cannot be read"):
        add_lora(build_model(PRESETS["tiny"]), LoraSettings(adapter=str(tmp_path)))
    with pytest.raises(ValueError, match="not found in the base model"):
        add_lora(build_model(PRESETS["tiny"]), LoraSettings(targets=["no_such_layer"]))
