"""No file that a user receives runs code, from wherever it is opened: what is read is read as data, and the rest is
refused in a line."""

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vlarl_rllib.commands.checkpoint import report_checkpoint
from vlarl_rllib.errors import SettingsError

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "rewards"), str(HERE.parent / "data")]  # whose helpers write judges and data

import open_everything  # noqa: E402
import traps  # noqa: E402
from traps import Trap  # noqa: E402

ROOT = HERE.parents[1]
WEIGHTS = "weights in another format"
EXPECTED = {
    "model_with_code": "read",
    "model_with_kernel": "attn_implementation is 'someone/trap', which would run code from elsewhere",
    "model_with_module": "transformers_weights is 'trap.bin'",
    "model_pickle": WEIGHTS,
    "model_pickle_called_safetensors": "is no whole safetensors file",
    "model_cut": "is damaged: its header describes",
    "model_shards": "names 'pytorch_model.bin', which is no safetensors file of this directory",
    "model_adapter_beside": "holds an adapter (adapter_config.json) beside the model",
    "adapter_pickle": WEIGHTS,
    "adapter_megatron": "the adapter uses megatron_config, megatron_core, which is not supported",
    "adapter_with_code": "tensors do not fit this model",
    "checkpoint_metadata": "the checkpoint names builtins.exec, which torch's checkpoints have no use for; do not "
    "trust it",
    "checkpoint_tensor": "UnpicklingError",
    "checkpoint_number": "UnpicklingError",
    "run_with_yaml": "not valid YAML",
    "run_with_module": "env.name: 'trap:Env' is not allowed",
    "judge_classifier_pickle": "is not the file that config.json was written with",
    "judge_with_code": "read",
    "judge_pickle": WEIGHTS,
    "data_with_class": "is of class 'trap.Features', which is none of TensorFlow Datasets' own; its code is not run",
    "states": "it refers to __builtin__.exec",
}
"""By directory: that it is read, or what is said."""


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("downloads")
    mark = root / "mark"
    for write in (
        traps.write_models,
        traps.write_adapters,
        traps.write_checkpoints,
        traps.write_runs,
        traps.write_judges,
        traps.write_data,
    ):
        write(root, mark)
    (root / "working").mkdir()
    for directory in filter(Path.is_dir, list(root.iterdir())):
        traps.set_decoys(directory, mark)
    return root


@pytest.fixture(autouse=True)
def unmarked(downloads: Path) -> Iterator[None]:
    """Nothing has left a mark, neither before nor after."""
    (downloads / "mark").unlink(missing_ok=True)
    yield
    assert not (downloads / "mark").exists(), (downloads / "mark").read_text()


def test_every_file_has_its_expectation(downloads: Path) -> None:
    assert {path.name for path in downloads.iterdir() if path.is_dir()} == {*EXPECTED, "working"}


def test_the_traps_spring(downloads: Path) -> None:
    """Else none of the other tests could fail."""
    for spring in (
        lambda: pickle.loads(pickle.dumps(Trap(downloads / "mark"))),
        lambda: subprocess.run([sys.executable, "-c", "import trap"], cwd=downloads / "working", check=True),
        lambda: subprocess.run(
            [sys.executable, "-m", "open_everything"],
            cwd=downloads / "working",
            env=os.environ | {"PYTHONPATH": str(HERE)},
        ),
    ):
        spring()
        assert (downloads / "mark").read_text()
        (downloads / "mark").unlink()


@pytest.mark.parametrize("name", EXPECTED)
def test_opened_from_elsewhere(name: str, downloads: Path) -> None:
    outcome = open_everything.opened(downloads / name, str(downloads / name))
    assert EXPECTED[name] in outcome


@pytest.mark.parametrize("name", [name for name in EXPECTED if name.startswith("model_") and EXPECTED[name] != "read"])
def test_models_are_refused_before_a_run_starts_too(name: str, downloads: Path) -> None:
    with pytest.raises((ValueError, OSError)) as caught:
        open_everything.check_model(str(downloads / name))
    assert EXPECTED[name] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_doctor_looks_at_everything_and_has_a_line_for_what_is_no_policy(name: str, downloads: Path) -> None:
    refused = ""
    try:
        report_checkpoint(str(downloads / name), suite=None, env=None, family=None)
    except SettingsError as error:
        refused = str(error)
    assert "\n" not in refused
    if name.startswith("model_"):
        assert (refused == "") == (EXPECTED[name] == "read")


def test_opened_from_inside_among_decoys(downloads: Path, tmp_path: Path) -> None:
    """As `vlarl` runs: a script of another folder, whose own is first in the search path."""
    program = tmp_path / "program.py"
    program.write_text((HERE / "open_everything.py").read_text())
    skipped = () if importlib.util.find_spec("tensorflow_datasets") else ("working",)
    directories = [str(downloads / name) for name in ("working", *EXPECTED) if name not in skipped]
    done = subprocess.run(
        [sys.executable, str(program), *directories],
        cwd=downloads / "working",
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert outcomes.pop("working", "read") == "read"
    assert {name: EXPECTED[name] in outcome for name, outcome in outcomes.items()} == dict.fromkeys(EXPECTED, True), (
        outcomes
    )


ENGINE = """
import os, sys
from vlarl_rllib.engines.protocol import EngineSpec
from vlarl_rllib.engines.actor import engine_env_vars
spec = EngineSpec(sys.argv[1], "openvla", "float32", gpus=0, max_batch=2, enforce_eager=True, mix_calls=False, seed=0)
os.environ.update(engine_env_vars(spec))
from vlarl_rllib.engines.vllm.compat import build_engine
from vlarl_rllib.engines.vllm.plugin import TRANSFER_BACKEND, architecture_of, register
from vlarl_rllib.models.openvla.family import FAMILY
register(in_process=FAMILY.vllm_model)
try:
    config = FAMILY.load_config(spec.model_path)
    build_engine(spec, config, 7, architecture_of(FAMILY.vllm_model), TRANSFER_BACKEND)
    outcome = "read"
except Exception as error:
    outcome = str(error)
print("\\n" + outcome.splitlines()[0], flush=True)
os._exit(0)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None or torch.version.cuda is not None, reason="needs vLLM for CPUs"
)
def test_vllm_falls_back_to_no_pickle(downloads: Path) -> None:
    command = [sys.executable, "-P", "-c", ENGINE, str(downloads / "model_pickle")]
    done = subprocess.run(
        command,
        cwd=downloads / "model_pickle",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "Cannot find any model weights" in done.stdout.splitlines()[-1], done.stdout + done.stderr
