"""What leaves a run: merged checkpoints and adapters, read back by transformers, by PEFT and by our own loader."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from vlarl_rllib.cli import main
from vlarl_rllib.learner import fsdp
from vlarl_rllib.learner.checkpoint import save_sharded
from vlarl_rllib.models.build import build_policy
from vlarl_rllib.models.openvla import OpenVLAForActionPrediction
from vlarl_rllib.models.openvla.family import FAMILY
from vlarl_rllib.models.presets import resolve_model
from vlarl_rllib.runs.checkpoints import CheckpointStore
from vlarl_rllib.runs.export import (
    export_adapter,
    export_merged,
    find_training_checkpoint,
    load_policy,
    resolve_policy,
    write_model,
)
from vlarl_rllib.runs.sealing import seal
from vlarl_rllib.settings import Settings, SettingsError
from vlarl_rllib.weights.source import iterate_weights


def write_run(root: Path, **model: object) -> dict[str, torch.Tensor]:
    """A run with one checkpoint of a policy that differs from its base; returns the weights that its engines would
    hold."""
    settings = Settings.from_dict({"model": {"path": resolve_model("tiny"), **model}, "run": {"seed": 4}})
    torch.manual_seed(4)
    policy = build_policy(settings.model)
    policy.add_value_head()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in policy.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    sent = dict(iterate_weights(policy, torch.float32))
    directory = root / "checkpoints" / "iteration_000003"
    (directory / "learners").mkdir(parents=True)
    fsdp.init_process_group(torch.device("cpu"), 0, 1, torch.distributed.HashStore(), 60.0)
    try:
        save_sharded(directory / "learners", nn.ModuleDict({"policy": policy}), {})
    finally:
        torch.distributed.destroy_process_group()
    CheckpointStore.write_facts(
        directory, iteration=3, policy_version=4, settings=settings.to_dict(), models={}, algorithm={}
    )
    seal(directory)
    return sent


@pytest.mark.parametrize("model", [{}, {"lora": {"rank": 4}}], ids=["all weights", "adapters"])
def test_a_merged_export_is_what_the_engines_held(model, tmp_path):
    sent = write_run(tmp_path / "run", **model)
    checkpoint = find_training_checkpoint(tmp_path / "run")
    assert checkpoint is not None and checkpoint.iteration == 3
    out = tmp_path / "out"
    export_merged(checkpoint, out)
    stored = load_file(out / "model.safetensors")
    assert stored.keys() == sent.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in sent.items())

    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"]["AutoConfig"] == "openvla/openvla-7b--configuration_prismatic.OpenVLAConfig"
    assert config["torch_dtype"] == "float32" and config["architectures"] == ["OpenVLAForActionPrediction"]
    assert json.loads((out / "vlarl_export.json").read_text())["iteration"] == 3
    assert (
        AutoConfig.from_pretrained(out).norm_stats.keys() == policy_of(resolve_model("tiny")).config.norm_stats.keys()
    )
    loaded = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    inputs = AutoProcessor.from_pretrained(out)(
        images=[torch.zeros(28, 28, 3, dtype=torch.uint8).numpy()], instructions=["push the bowl"]
    )
    reference = policy_of(resolve_model("tiny"))
    reference.load_state_dict(sent)
    assert torch.equal(
        loaded.predict_action(**inputs, unnorm_key="libero_spatial").tokens,
        reference.predict_action(**inputs, unnorm_key="libero_spatial").tokens,
    )


def policy_of(path: str) -> OpenVLAForActionPrediction:
    return OpenVLAForActionPrediction.from_pretrained(path, dtype=torch.float32)


def test_an_exported_adapter_loads_in_peft_and_here(tmp_path):
    sent = write_run(tmp_path / "run", lora={"rank": 4, "targets": "frozen_vision"})
    checkpoint = find_training_checkpoint(tmp_path / "run" / "checkpoints" / "iteration_000003")
    assert checkpoint is not None
    export_adapter(checkpoint, tmp_path / "adapter")
    merged = (
        PeftModel.from_pretrained(policy_of(resolve_model("tiny")), str(tmp_path / "adapter"))
        .merge_and_unload()
        .state_dict()
    )
    for name, tensor in sent.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=0)
    again = build_policy(
        Settings.from_dict(
            {"model": {"path": resolve_model("tiny"), "lora": {"adapter": str(tmp_path / "adapter")}}}
        ).model
    )
    for name, tensor in iterate_weights(again, torch.float32):
        torch.testing.assert_close(sent[name], tensor, atol=1e-6, rtol=0)


def test_a_run_is_resolved_to_its_export_once(tmp_path):
    write_run(tmp_path)
    first = Path(resolve_policy(str(tmp_path)))
    assert first == tmp_path / "exports" / "iteration_000003"
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert resolve_policy(str(tmp_path / "checkpoints" / "iteration_000003")) == str(first)
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    (first / "vlarl_export.json").unlink()  # as a killed export leaves it
    resolve_policy(str(tmp_path))
    assert (first / "model.safetensors").stat().st_mtime_ns != written
    assert resolve_policy("tiny") == resolve_model("tiny")
    checkpoint = tmp_path / "checkpoints" / "iteration_000003"
    (checkpoint / "facts.json").write_text(
        (checkpoint / "facts.json").read_text().replace('"iteration": 3', '"iteration": 4')
    )
    seal(checkpoint)  # another one of its name
    resolve_policy(str(tmp_path))
    assert json.loads((first / "vlarl_export.json").read_text())["iteration"] == 4
    shutil.copytree(checkpoint, tmp_path / "saves" / "best")
    assert resolve_policy(str(tmp_path / "saves" / "best")) == str(tmp_path / "saves" / "best-exported")
    with pytest.raises(SettingsError, match="CHECKPOINT: model '/no/such' is no directory"):
        resolve_policy("/no/such")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}", "{tmp}/out"], "RUN_OR_CHECKPOINT: {tmp} is neither a run with a checkpoint nor one; give"),
        (["{tmp}/run", "{tmp}/run"], "OUT: {tmp}/run exists and is not empty; give a new directory"),
        (["{tmp}/run", "{tmp}/out", "--dtype", "int8"], "--dtype: 'int8' must be float32 or bfloat16"),
        (["{tmp}/run", "{tmp}/out", "--adapter"], "--adapter: the run trained all weights (model.lora is null)"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "run")
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["vlarl", "export", *(argument.format(tmp=tmp_path) for argument in arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vlarl: {message.format(tmp=tmp_path)}") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("facts.json", "{"),
        ("facts.json", "[]"),
        ("facts.json", '{"iteration": "x", "settings": {}}'),
        ("facts.json", '{"iteration": 3, "settings": {"no_such": {}}}'),
        ("pointer.json", "[]"),
        ("pointer.json", '{"checkpoint": 3}'),
        ("facts.json", "[" * 100_000),
    ],
)
def test_a_damaged_checkpoint_is_one_line(name, content, tmp_path):
    directory = tmp_path / "checkpoints" / "iteration_000003"
    directory.mkdir(parents=True)
    (directory / name).write_text(content)
    with pytest.raises(SettingsError) as caught:
        find_training_checkpoint(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp", "stepped.json"])
def test_damaged_shards_are_one_line(file, tmp_path):
    write_run(tmp_path)
    shards = tmp_path / "checkpoints" / "iteration_000003" / "learners" / "shards"
    path = (
        shards / file if file != "stepped.json" else tmp_path / "checkpoints" / "iteration_000003" / "learners" / file
    )
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if file != "stepped.json" else b"{")
    seal(tmp_path / "checkpoints" / "iteration_000003")  # so that nothing else is wrong
    checkpoint = find_training_checkpoint(tmp_path)
    assert checkpoint is not None
    if file == "stepped.json":
        assert load_policy(checkpoint) is not None, "an export has no use for optimisers"
        return
    with pytest.raises(
        SettingsError, match=r"iteration_000003: its policy cannot be read \(.*\); give an older checkpoint"
    ) as caught:
        load_policy(checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("link", ["exports", "exports/iteration_000003"])
def test_an_export_is_not_written_through_a_link(link, tmp_path):
    write_run(tmp_path / "run")
    victim = tmp_path / "victim"
    (victim / "iteration_000003").mkdir(parents=True)
    (victim / "iteration_000003" / "thesis").write_text("years of work")
    (tmp_path / "run" / link).parent.mkdir(exist_ok=True)
    (tmp_path / "run" / link).symlink_to(victim if link == "exports" else victim / "iteration_000003")
    with pytest.raises(SettingsError, match=r"^CHECKPOINT: .* is a link that leads out of"):
        resolve_policy(str(tmp_path / "run"))
    assert [path.name for path in victim.rglob("*") if path.is_file()] == ["thesis"]


def test_an_export_refers_to_the_published_code_whatever_its_base_does(tmp_path):
    base = shutil.copytree(resolve_model("tiny"), tmp_path / "base")
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        values = json.loads((base / name).read_text())
        auto_map = {"AutoProcessor": "evil/repo--trap.Processor", "AutoTokenizer": ["trap.Tokenizer", None]}
        (base / name).write_text(json.dumps(values | {"auto_map": auto_map}))
    given = {"family": FAMILY, "base": str(base), "dtype": "float32"}
    write_model({"x": torch.zeros(1)}, out=tmp_path / "out", **given)
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        exported = json.loads((tmp_path / "out" / name).read_text())["auto_map"]
        assert exported == {"AutoProcessor": "openvla/openvla-7b--processing_prismatic.PrismaticProcessor"}
    with pytest.raises(ValueError, match=r"mine: action\.q01 is \[nan"):
        write_model(
            {},
            out=tmp_path / "other",
            norm_stats={"mine": {"action": {"q01": [float("nan")] * 7, "q99": [1.0] * 7}}},
            **given,
        )
    assert not (tmp_path / "other").exists()
