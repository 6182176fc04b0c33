"""What is counted from a policy's sizes is what its passes do, operation by operation."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vlarl_rllib.bench.plain import PlainTrainer
from vlarl_rllib.bench.policy import BenchPolicy
from vlarl_rllib.models.flops import Pass, Product, Training, attention, training_of
from vlarl_rllib.models.openvla_oft import OpenVLAOFTConfig
from vlarl_rllib.models.openvla_oft.flops import count_flops as count_oft_flops
from vlarl_rllib.settings import Settings

ROWS = 2
PRESETS = ("tiny", "tiny-oft")
TOLERANCE = 2e-3
"""Rotary embeddings are made by a small product, which is not counted."""


def policy_of(**model: Any) -> BenchPolicy:
    return BenchPolicy(
        Settings.from_dict({"model": {"path": "tiny"} | model, "env": {"name": "synthetic"}, "engines": {"num": 0}})
    )


def inputs_of(policy: BenchPolicy) -> dict[str, Tensor]:
    frames = list(policy.frames(ROWS))
    inputs = policy.processor.raw_inputs(frames, [policy.instruction(0)] * ROWS)
    return inputs | {"action_tokens": torch.from_numpy(policy.tokens(ROWS))}


def flops_of(call: Any) -> float:
    """Of one row."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / ROWS


def test_a_pass_by_hand() -> None:
    # 3 tokens of width 4 through a layer of 4 x 5, attention of 3 x 3 tokens of width 5, a head of 5 x 2.
    first, head = Product("first", 0, 3, 4, 5), Product("head", 2, 3, 5, 2)
    chain = Pass((), (first, attention(1, 3, 3, 5), head))
    assert [product.flops for product in chain.trunk] == [2 * 60, 2 * 2 * 45, 2 * 30]
    assert chain.forward_flops == 360
    # All trained: each product twice more, but for the first one's input, which nobody trains.
    assert chain.training_flops(training_of(None)) == 3 * 360 - 120
    # The head alone: only its own gradient.
    assert chain.training_flops(lambda module: Training.WHOLE if module == "head" else Training.FROZEN) == 360 + 60
    # An adapter of rank 1 on the first layer: 2 x 3 x (4 + 5) forward, as much for both of its gradients, 2 x 3 x 5
    # between them; the head passes its gradient on, attention two.
    adapted = chain.training_flops(training_of(["first"]), 1)
    assert adapted == 360 + (54 + 54 + 30) + 180 * 2 + 60
    # Frozen is what comes before the first trained layer, and a trunk only where all of its towers are.
    assert chain.frozen_flops(training_of(["head"])) == 120 + 180 and chain.frozen_flops(training_of(["first"])) == 0
    assert Pass((chain.trunk,), chain.trunk).frozen_flops(training_of(["none"])) == 720
    assert Pass((chain.trunk,), chain.trunk).frozen_flops(training_of(["head"])) == 300


@pytest.mark.parametrize("path", PRESETS)
def test_score_and_sampling_are_what_the_model_does(path: str) -> None:
    policy = policy_of(path=path)
    assert policy.flops is not None
    model = policy.family.load(policy.path)
    inputs = inputs_of(policy)
    prompts = {name: tensor for name, tensor in inputs.items() if name != "action_tokens"}
    sampled = flops_of(
        lambda: model.sample_action_tokens(**prompts, temperatures=torch.ones(ROWS), seeds=list(range(ROWS)))
    )
    assert sampled == pytest.approx(policy.flops.sample, rel=TOLERANCE)
    model.add_value_head(0)
    with torch.no_grad():
        assert flops_of(lambda: model(**inputs)) == pytest.approx(policy.flops.score.forward_flops, rel=TOLERANCE)


@pytest.mark.parametrize("path", PRESETS)
@pytest.mark.parametrize(
    "lora", [None, {"targets": "language_model"}, {"targets": "frozen_vision"}, {"targets": ["q_proj", "fc2"]}], ids=str
)
def test_an_update_is_what_the_plain_loop_does(lora: dict[str, Any] | None, path: str) -> None:
    policy = policy_of(path=path, lora=lora and lora | {"rank": 4})
    trainer = PlainTrainer(policy, torch.device("cpu"), lr=1e-5, value_head=True)
    inputs, numbers = inputs_of(policy), torch.ones(ROWS)
    old = torch.full((ROWS, policy.facts.actions.num_tokens), -5.5)
    found = flops_of(lambda: trainer.ppo_backward(inputs, old, numbers, numbers))
    head_adapter = 0.0
    if lora and lora["targets"] == "frozen_vision":
        # PEFT's adapter of the head is not asked by a model that takes rows of its weight
        assert policy.flops is not None
        (head,) = (product for product in policy.flops.score.trunk if product.module.endswith("lm_head"))
        head_adapter = 3 * head.adapter_flops(4)
    assert found == pytest.approx((policy.training_flops() or 0.0) - head_adapter, rel=TOLERANCE)


@pytest.mark.parametrize("path", PRESETS)
def test_a_fine_tuning_step_is_what_the_plain_loop_does(path: str) -> None:
    policy = policy_of(path=path)
    trainer = PlainTrainer(policy, torch.device("cpu"), lr=1e-5, value_head=False)
    inputs = inputs_of(policy)
    tokens = inputs.pop("action_tokens")
    targets = torch.cat([tokens, torch.full((ROWS, 1), policy.processor.end_token_id)], dim=1)
    found = flops_of(lambda: trainer.supervised_backward(inputs, targets))
    assert found == pytest.approx(policy.training_flops(supervised=True), rel=TOLERANCE)


@pytest.mark.parametrize("l1_head", [False, True])
def test_two_images_and_a_state_are_counted(l1_head: bool, golden_t: Any) -> None:
    model, inputs = golden_t.model("two", l1_head=l1_head), golden_t.inputs("two", slice(0, 1))
    counted = count_oft_flops(model.config, int(inputs["attention_mask"].sum()))
    inputs = {name: tensor.repeat(ROWS, *[1] * (tensor.ndim - 1)) for name, tensor in inputs.items()}

    def learn() -> None:
        output = model(**inputs, full_vocabulary=not l1_head)
        (output.normalized_actions if l1_head else output.action_logits).sum().backward()

    with torch.no_grad():
        passes = flops_of(lambda: model(**inputs, full_vocabulary=not l1_head))
    assert passes == pytest.approx(counted.supervise.forward_flops, rel=TOLERANCE)
    head = 2 * next(product.flops for product in counted.score.trunk if product.module.endswith("lm_head"))
    unused = head if l1_head else 0.0  # the head of tokens has no part in that loss
    assert flops_of(learn) == pytest.approx(counted.supervise.training_flops(training_of(None)) - unused, rel=TOLERANCE)


def test_7b_takes_what_is_known_of_it(tmp_path: Any) -> None:
    """4.2 TFLOP a decision and 8 TFLOP a trained sample with adapters on the language model's layers, from its sizes
    alone."""
    from vlarl_rllib.models.openvla import OpenVLAConfig
    from vlarl_rllib.models.openvla.family import FAMILY

    OpenVLAConfig(text_config={"pad_token_id": 32000, "vocab_size": 32064}).save_pretrained(tmp_path)
    flops = FAMILY.count_flops(str(tmp_path), 34)
    training = flops.score.training_flops(training_of(FAMILY.lora_targets["language_model"], ["value_head."]), 32)
    assert flops.sample / 1e12 == pytest.approx(4.2, abs=0.1)
    assert training / 1e12 == pytest.approx(8.0, abs=0.2)


def test_oft_of_7b_takes_what_is_known_of_it(tmp_path: Any) -> None:
    """4.91 TFLOP a chunk of eight with one image, 8.77 with two and the state, but for the last layer, which is
    computed where tokens are read alone: 0.34 GFLOP less for each of 287 or 544 other tokens."""
    text = {"pad_token_id": 32000, "vocab_size": 32064}
    for layout, expected in (({}, 4.81), ({"num_images": 2, "proprio": True}, 8.58)):
        config = OpenVLAOFTConfig(text_config=text, oft=layout)
        assert count_oft_flops(config, 30).sample / 1e12 == pytest.approx(expected, abs=0.02)
