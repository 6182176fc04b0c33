"""Files that a user may receive, with a trap in each: code that would leave a mark if it were run."""

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlarl_rllib.learner import fsdp
from vlarl_rllib.learner.checkpoint import save_sharded
from vlarl_rllib.models.presets import resolve_model
from vlarl_rllib.runs.checkpoints import CheckpointStore
from vlarl_rllib.runs.sealing import seal
from vlarl_rllib.settings import Settings

DECOYS = (
    "megatron", "numpy", "torch", "json", "typing", "pickle", "random", "multiprocessing", "subprocess", "PIL", "yaml",
    "jinja2", "matplotlib",
    "safetensors", "transformers", "tokenizers", "peft", "bitsandbytes", "kernels", "accelerate", "huggingface_hub",
    "tensorflow",
    "tensorflow_datasets", "etils", "google", "libero", "robosuite", "mujoco", "gymnasium", "ray", "vllm",
    "vlarl_rllib", "sitecustomize",
    "configuration_trap", "modeling_trap", "processing_trap", "generate", "trap",
)  # fmt: skip
"""Modules that a program of ours, or a library, might look for in the working directory."""
AUTO_MAP = {
    "AutoConfig": "configuration_trap.Config",
    "AutoModel": "modeling_trap.Model",
    "AutoModelForVision2Seq": "modeling_trap.Model",
    "AutoModelForImageTextToText": "modeling_trap.Model",
    "AutoProcessor": "processing_trap.Processor",
    "AutoImageProcessor": "processing_trap.Processor",
    "AutoTokenizer": ["processing_trap.Tokenizer", "processing_trap.Tokenizer"],
}


class Trap:
    """Leaves its mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (code(self.mark, "a pickle"),)


def code(mark: Path, what: str) -> str:
    return f"with open({str(mark)!r}, 'a') as file: file.write({what + chr(10)!r})"


def set_decoys(directory: Path, mark: Path) -> None:
    """Python files that leave a mark when they are imported, and a package as transformers looks for."""
    for name in DECOYS:
        (directory / f"{name}.py").write_text(code(mark, f"{directory.name}/{name}.py") + "\n")
    (directory / "custom_generate").mkdir()
    (directory / "custom_generate" / "generate.py").write_text(code(mark, "custom_generate") + "\n")


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def model(root: Path, name: str) -> Path:
    return shutil.copytree(resolve_model("tiny"), root / name)


def write_models(root: Path, mark: Path) -> None:
    with_code = model(root, "model_with_code")
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
        change_json(with_code / name, auto_map=AUTO_MAP)
    change_json(with_code / "tokenizer_config.json", tokenizer_class="TrapTokenizer", processor_class="TrapProcessor")
    (with_code / "generation_config.json").write_text(json.dumps({"custom_generate": "."}))
    torch.save({"x": Trap(mark)}, with_code / "pytorch_model.bin")
    for name, kernel in (
        ("model_with_kernel", {"attn_implementation": "someone/trap"}),
        ("model_with_module", {"transformers_weights": "trap.bin"}),
    ):
        change_json(model(root, name) / "config.json", **kernel)
    for name in (
        "model_pickle",
        "model_pickle_called_safetensors",
        "model_cut",
        "model_shards",
        "model_adapter_beside",
    ):
        weights = model(root, name) / "model.safetensors"
        torch.save({"x": Trap(mark)}, weights.with_name("pytorch_model.bin"))
        if name == "model_pickle":
            weights.unlink()
        elif name == "model_pickle_called_safetensors":
            shutil.move(weights.with_name("pytorch_model.bin"), weights)
        elif name == "model_cut":
            weights.write_bytes(weights.read_bytes()[:-100])
        elif name == "model_shards":
            weights.unlink()
            (weights.parent / "model.safetensors.index.json").write_text(
                json.dumps({"metadata": {}, "weight_map": {"x": "pytorch_model.bin"}})
            )
        else:
            (weights.parent / "adapter_config.json").write_text(
                json.dumps({"peft_type": "LORA", "base_model_name_or_path": "trap"})
            )
            torch.save({"x": Trap(mark)}, weights.with_name("adapter_model.bin"))


def write_adapters(root: Path, mark: Path) -> None:
    golden = Path(__file__).parents[1] / "data" / "golden" / "adapter_S"
    for name, values in (
        ("adapter_pickle", {}),
        (
            "adapter_megatron",
            {"megatron_config": {"x": 1}, "megatron_core": "megatron", "target_modules": ["embed_tokens"]},
        ),
        (
            "adapter_with_code",
            {
                "auto_mapping": {"base_model_class": "Model", "parent_library": "trap"},
                "base_model_name_or_path": "trap",
            },
        ),
    ):
        adapter = shutil.copytree(golden, root / name)
        change_json(adapter / "adapter_config.json", **values)
        torch.save({"x": Trap(mark)}, adapter / "adapter_model.bin")
        if name == "adapter_pickle":
            (adapter / "adapter_model.safetensors").unlink()


def small_model() -> tuple[nn.Module, dict[str, torch.optim.Optimizer]]:
    """What `write_checkpoints` has saved, as it was made."""
    policy = nn.Linear(2, 2)
    return nn.ModuleDict({"policy": policy}), {"policy": torch.optim.AdamW(policy.parameters())}


def write_checkpoints(root: Path, mark: Path) -> None:
    """Of a small model in place of a policy; the optimiser has stepped, so that what is no tensor is stored too."""
    module, optimizers = small_model()
    sum(parameter.sum() for parameter in module.parameters()).backward()  # type: ignore[union-attr]
    optimizers["policy"].step()
    good = root / "checkpoint" / "checkpoints" / "iteration_000003"
    (good / "learners").mkdir(parents=True)
    fsdp.init_process_group(torch.device("cpu"), 0, 1, torch.distributed.HashStore(), 60.0)
    try:
        save_sharded(good / "learners", module, optimizers)
    finally:
        torch.distributed.destroy_process_group()
    CheckpointStore.write_facts(
        good, iteration=3, policy_version=4, settings=Settings().to_dict(), models={}, algorithm={}
    )
    for name in (
        "class_and_ctor_args.pkl",
        "algorithm_state.pkl",
    ):  # RLlib unpickles the first; nothing of ours reads either
        (good / name).write_bytes(pickle.dumps(Trap(mark)))
    changes: dict[str, Callable[[Path], None]] = {
        "checkpoint_metadata": lambda shards: (shards / ".metadata").write_bytes(pickle.dumps(Trap(mark))),
        "checkpoint_tensor": lambda shards: put_payload(shards, "model.policy.weight", mark),
        "checkpoint_number": lambda shards: put_payload(shards, ".lr", mark),
    }
    for name, change in changes.items():
        checkpoint = shutil.copytree(root / "checkpoint", root / name) / "checkpoints" / "iteration_000003"
        change(checkpoint / "learners" / "shards")
        seal(checkpoint)  # who makes a trap can do that too
    shutil.rmtree(root / "checkpoint")


def put_payload(shards: Path, name: str, mark: Path) -> None:
    """Have a trap read in place of the first stored item whose name ends so."""
    metadata = pickle.loads((shards / ".metadata").read_bytes())
    place = next(place for index, place in metadata.storage_data.items() if index.fqn.endswith(name))
    file = shards / place.relative_path
    payload = shards / "payload"
    torch.save(Trap(mark), payload)
    content = file.read_bytes()
    file.write_bytes(content + payload.read_bytes())
    place.offset, place.length = len(content), payload.stat().st_size
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))
    payload.unlink()


def write_runs(root: Path, mark: Path) -> None:
    """A run whose settings are YAML that makes objects, and one whose checkpoint's settings name a module."""
    yaml = root / "run_with_yaml"
    yaml.mkdir()
    (yaml / "config.yaml").write_text(f"run: !!python/object/apply:builtins.exec [{json.dumps(code(mark, 'YAML'))}]\n")
    (yaml / "metrics.jsonl").write_text("{}\n")
    named = root / "run_with_module" / "checkpoints" / "iteration_000003"
    (named / "learners").mkdir(parents=True)
    (named / "learners" / "rank_0").write_text("weights")
    settings = Settings().to_dict()
    settings["env"]["name"] = "trap:Env"
    CheckpointStore.write_facts(named, iteration=3, policy_version=4, settings=settings, models={}, algorithm={})
    seal(named)


def write_judges(root: Path, mark: Path) -> None:
    from judge_helpers import write_untrained_judge
    from test_vision_language import write_model

    classifier = write_untrained_judge(root / "judge_classifier_pickle")
    torch.save({"x": Trap(mark)}, classifier / "model.safetensors")
    with_code = write_model(root / "judge_with_code")
    shutil.copytree(with_code, root / "judge_pickle")
    (root / "judge_pickle" / "model.safetensors").unlink()
    torch.save({"x": Trap(mark)}, root / "judge_pickle" / "pytorch_model.bin")
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        change_json(with_code / name, auto_map=AUTO_MAP)


def write_data(root: Path, mark: Path) -> None:
    from rlds_files import features, write_metadata

    named = features()
    named["featuresDict"]["features"]["episode_metadata"]["pythonClassName"] = "trap.Features"
    write_metadata(root / "data_with_class", named)
    with zipfile.ZipFile((root / "start_states").with_suffix(".pruned_init"), "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Trap(mark), protocol=2))
    folder = root / "states"
    folder.mkdir()
    shutil.move(root / "start_states.pruned_init", folder / "task.pruned_init")
