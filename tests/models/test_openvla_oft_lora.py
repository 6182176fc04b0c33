"""Adapters of OpenVLA-OFT are OpenVLA's: on the same modules, whatever parts it has of its own."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.parity_oft import GoldenOFT
from vlarl_rllib.models.lora import adapter_parameters, add_lora, lora_layers
from vlarl_rllib.models.openvla import OpenVLAConfig, OpenVLAForActionPrediction
from vlarl_rllib.models.openvla.family import FAMILY as OPENVLA
from vlarl_rllib.models.openvla_oft import OpenVLAOFTConfig, OpenVLAOFTForActionPrediction
from vlarl_rllib.models.openvla_oft.family import FAMILY
from vlarl_rllib.settings import LoraSettings

SIZES_OF_7B = {"pad_token_id": 32000, "vocab_size": 32064}
OF_ITS_OWN = ("proprio_projector.", "action_head.")


@pytest.mark.parametrize("targets", OPENVLA.lora_targets)
def test_the_same_modules_are_adapted(targets: str) -> None:
    with torch.device("meta"):
        plain = OpenVLAForActionPrediction(OpenVLAConfig(text_config=SIZES_OF_7B))
        oft = OpenVLAOFTForActionPrediction(
            OpenVLAOFTConfig(text_config=SIZES_OF_7B, oft={"num_images": 2, "proprio": True, "l1_head": True})
        )
        parts = [name for name, _ in oft.named_parameters() if name.startswith(OF_ITS_OWN)]
        add_lora(plain, LoraSettings(rank=4, targets=targets), OPENVLA.lora_targets)
        add_lora(oft, LoraSettings(rank=4, targets=targets), FAMILY.lora_targets)
    assert [name for name, _ in lora_layers(oft)] == [name for name, _ in lora_layers(plain)]
    assert len(parts) == 20 and not any(name.startswith(OF_ITS_OWN) for name, _ in lora_layers(oft))


@pytest.mark.parametrize("mode", ["one", "two"])
def test_an_adapted_model_is_pefts(mode: str, golden_t: GoldenOFT) -> None:
    """Logits and gradients, through PEFT's own layers."""
    ours, inputs = golden_t.model(mode), golden_t.inputs(mode)
    config = add_lora(ours, LoraSettings(rank=4), FAMILY.lora_targets)
    theirs = get_peft_model(
        golden_t.model(mode),  # type: ignore[arg-type]
        LoraConfig(r=4, lora_alpha=config.lora_alpha, target_modules=str(config.target_modules)),
    )
    own, expected = adapter_parameters(ours), adapter_parameters(theirs.base_model.model)
    assert own.keys() == expected.keys() and len(own) > 100
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(own.items()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
            expected[name].copy_(parameter)
    hidden, _ = theirs.base_model.model.action_hidden_states(**inputs)
    ids = slice(ours.action_token_ids.start, ours.action_token_ids.stop)
    logits = (ours.action_logits(**inputs), theirs.base_model.model.language_model.lm_head(hidden)[..., ids])
    torch.testing.assert_close(*logits, atol=1e-3, rtol=0)
    for part in logits:
        part.square().mean().backward()
    for name, parameter in expected.items():
        assert (own[name].grad is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            assert (own[name].grad - parameter.grad).norm() <= 1e-3 * parameter.grad.norm() + 1e-9, name
