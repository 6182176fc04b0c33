"""The model under FSDP2 with the units that the learner uses: everything happens inside `model(...)`."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from vlarl_rllib.learner.casts import in_type


@pytest.fixture
def one_process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_sharded_units_give_the_outputs_and_gradients_of_the_plain_model(golden_s, one_process_group):
    plain = copy.deepcopy(golden_s.model)
    plain.add_value_head()
    sharded = copy.deepcopy(plain)
    mesh = dist.init_device_mesh("cpu", (1,))
    backbone = sharded.vision_backbone
    for tower in (backbone.featurizer, backbone.fused_featurizer):
        fully_shard(tower.live_blocks, mesh=mesh)
        fully_shard(tower, mesh=mesh)
    fully_shard(sharded.projector, mesh=mesh)
    for layer in sharded.language_model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())

    inputs = golden_s.inputs(slice(0, 4))
    tokens = golden_s.tensor("forced_tokens")[:4, 0]
    outputs = [model(**inputs, action_tokens=tokens) for model in (plain, sharded)]
    torch.testing.assert_close(outputs[1].action_logits, outputs[0].action_logits)
    for output in outputs:
        (output.action_logits.square().mean() + (output.values - 1).square().mean()).backward()
    gradients = {name: parameter.grad for name, parameter in sharded.named_parameters()}
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name].full_tensor(), parameter.grad)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_rounding_without_fsdp_is_that_of_its_mixed_precision(golden_s, one_process_group):
    plain = copy.deepcopy(golden_s.model).requires_grad_()
    plain.add_value_head()
    sharded = copy.deepcopy(plain)
    mesh = dist.init_device_mesh("cpu", (1,))
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(sharded, mesh=mesh, mp_policy=precision)
    inputs = golden_s.inputs(slice(0, 2)) | {"action_tokens": golden_s.tensor("forced_tokens")[:2, 0]}
    outputs = [model(**inputs) for model in (in_type(plain, torch.bfloat16), sharded)]
    for output in outputs:
        (output.action_logits.square().mean() + (output.values - 1).square().mean()).backward()
    assert torch.equal(outputs[0].action_logits, outputs[1].action_logits)
    gradients = {name: parameter.grad for name, parameter in sharded.named_parameters()}
    compared = 0
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.dtype == parameter.dtype == torch.float32
            torch.testing.assert_close(gradients[name].full_tensor(), parameter.grad, atol=0, rtol=0)
            compared += 1
    assert compared > 20
