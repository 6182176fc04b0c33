"""Names and shapes of what travels, gathering sharded weights, and cutting them into buckets."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from vlarl_rllib.models.openvla import OpenVLAForActionPrediction
from vlarl_rllib.models.openvla.presets import PRESETS, build_config, build_model
from vlarl_rllib.types import TensorSpec
from vlarl_rllib.weights.buckets import frozen_names, plan_buckets
from vlarl_rllib.weights.source import check_names_and_shapes, expected_tensors, iterate_weights, published_parameters


def test_value_head_and_only_it_stays_behind():
    model = build_model(PRESETS["tiny"])
    names = {name for name, _ in model.named_parameters()}
    model.add_value_head()
    assert {name for name, _ in iterate_weights(model, torch.float32)} == names
    assert expected_tensors(model).keys() == names


def test_a_value_head_that_is_asked_for_travels_in_float32_beside_a_policy_in_bfloat16():
    model = build_model(PRESETS["tiny"])
    head = model.add_value_head(seed=2)
    published = {item.name: item for item in published_parameters(model, value_head=True)}
    assert published.keys() == expected_tensors(model, value_head=True).keys() == dict(model.named_parameters()).keys()
    for name, item in published.items():
        dtype = "float32" if name.startswith("value_head.") else "bfloat16"
        assert item.spec(torch.bfloat16).dtype == dtype and str(item.gather(torch.bfloat16).dtype) == f"torch.{dtype}"
    assert torch.equal(published["value_head.fc1.weight"].gather(torch.bfloat16), head.fc1.weight)
    assert published["value_head.fc3.bias"].trained


def test_a_configuration_expects_what_its_model_sends():
    sent = {name: tuple(tensor.shape) for name, tensor in iterate_weights(build_model(PRESETS["tiny"]), torch.float32)}
    with torch.device("meta"):
        expected = expected_tensors(OpenVLAForActionPrediction(build_config(PRESETS["tiny"])))
    assert expected == sent
    assert expected["language_model.lm_head.weight"] == (576, 64)
    check_names_and_shapes(expected, sent)


def test_yielded_tensors_are_copies_of_the_wanted_dtype():
    layer = nn.Linear(2, 3)
    before = layer.weight.detach().clone()
    for dtype in (torch.float32, torch.bfloat16):
        tensors = dict(iterate_weights(layer, dtype))
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}
        tensors["weight"].zero_()
        assert torch.equal(layer.weight, before)


def test_a_model_with_nothing_to_send_is_refused():
    only_a_value_head = nn.ModuleDict({"value_head": nn.Linear(2, 2)})
    for model in (nn.Identity(), only_a_value_head):
        with pytest.raises(ValueError, match="no parameters to send"):
            list(iterate_weights(model, torch.float32))


def test_differences_are_named_briefly():
    expected = {f"layer.{i}": (2, 2) for i in range(6)}
    with pytest.raises(ValueError, match="do not fit the policy") as error:
        check_names_and_shapes(expected, {"layer.0": (2, 2), "layer.1": (2, 3), "module.layer.2": (2, 2)})
    text = str(error.value)
    assert "missing layer.2, layer.3, layer.4 and 1 more" in text
    assert "unexpected module.layer.2" in text
    assert "wrong shape layer.1 [2, 3] instead of [2, 2]" in text
    assert "\n" not in text


def test_buckets_keep_a_module_together():
    # 16 bytes a tensor; two modules of 64 and 48 bytes, then two single tensors
    names = [f"layers.0.self_attn.{p}_proj.weight" for p in "qkvo"] + [
        f"layers.0.mlp.{p}.weight" for p in ("a", "b", "c")
    ]
    names += ["norm.weight", "lm_head.weight"]
    specs = [TensorSpec(name, (4,), "float32", 16) for name in names]
    assert [len(bucket) for bucket in plan_buckets(specs, 1)] == [4, 3, 1, 1]
    assert [len(bucket) for bucket in plan_buckets(specs, 80)] == [4, 5]
    assert [len(bucket) for bucket in plan_buckets(specs, 10**6)] == [9]
    with pytest.raises(ValueError, match="'norm\\.weight' was given twice"):
        list(plan_buckets([*specs, TensorSpec("norm.weight", (4,), "float32", 16)], 10**6))


def test_what_an_engine_fuses_with_a_trained_tensor_travels_with_it():
    names = ["layers.0.self_attn.q_proj.weight", "layers.0.self_attn.k_proj.weight", "layers.0.mlp.up_proj.weight"]
    assert frozen_names(names, ["layers.0.self_attn.q_proj.weight"]) == {"layers.0.mlp.up_proj.weight"}
    assert frozen_names(names, []) == set(names)


def test_a_gathered_tensor_is_copied_where_that_is_asked_for():
    layer = nn.Linear(2, 2, bias=False)
    (item,) = published_parameters(layer)

    def is_shared(dtype: torch.dtype, *, copy: bool) -> bool:
        """Whether it is the parameter's own memory."""
        tensor = item.gather(dtype, copy=copy)
        assert tensor.dtype == dtype and not tensor.requires_grad
        return tensor.data_ptr() == layer.weight.data_ptr()

    assert is_shared(torch.float32, copy=False)
    assert not is_shared(torch.float32, copy=True)
    assert not is_shared(torch.bfloat16, copy=True)


class _Policy(nn.Module):
    """Parameters of a root unit, of an inner unit, and of a value head; 3 rows do not divide by 2 ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.scale = nn.Parameter(torch.randn(3, 5))
        self.layer = nn.Linear(5, 7)
        self.value_head = nn.Linear(5, 1)


def _gather_on_rank(rank: int, rendezvous: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    model = _Policy()
    mesh = init_device_mesh("cpu", (2,))
    for unit in (model.layer, model):
        fully_shard(unit, mesh=mesh)
    torch.save(dict(iterate_weights(model, torch.bfloat16, to_host=rank == 0)), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_sharded_weights_are_gathered_whole_on_every_rank(tmp_path: Path):
    # Forked: a fresh interpreter would import torch for ten seconds.
    args = (str(tmp_path / "rendezvous"), str(tmp_path))
    mp.start_processes(_gather_on_rank, args=args, nprocs=2, start_method="fork")
    reference = {
        name: parameter.detach().to(torch.bfloat16)
        for name, parameter in _Policy().named_parameters()
        if not name.startswith("value_head")
    }
    for rank in range(2):
        gathered = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert gathered.keys() == reference.keys() == {"scale", "layer.weight", "layer.bias"}
        assert all(torch.equal(gathered[name], reference[name]) for name in reference)
