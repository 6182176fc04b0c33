"""Presets: complete, deterministic checkpoints, and how a model name is resolved."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vlarl_rllib.models import presets
from vlarl_rllib.models.openvla import OpenVLAForActionPrediction, OpenVLAProcessor
from vlarl_rllib.models.openvla.presets import PRESETS, build_config
from vlarl_rllib.models.presets import resolve_model, write_checkpoint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_checkpoint("tiny", directory)
    return directory


def file_bytes(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_seed_gives_the_same_bytes_and_leaves_torchs_generator_alone(tiny, tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    write_checkpoint("tiny", tmp_path / "same")
    assert torch.equal(torch.rand(1), expected)
    write_checkpoint("tiny", tmp_path / "other", seed=1)
    assert file_bytes(tmp_path / "same") == file_bytes(tiny)
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != (tiny / "model.safetensors").read_bytes()
    names = {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(file_bytes(tiny)) == names


def test_the_first_policy_explores_and_sees_image_and_instruction(tiny):
    model, processor = OpenVLAForActionPrediction.from_pretrained(tiny), OpenVLAProcessor.from_pretrained(tiny)
    generator = np.random.default_rng(0)
    scenes = [np.kron(generator.integers(0, 256, (4, 4, 3)), np.ones((16, 16, 1))).astype(np.uint8) for _ in range(8)]
    inputs = processor(images=scenes, instructions=["pick up the red cube"] * 8, raw_images=True)
    tokens = torch.full((8, 7), model.action_token_ids[100])
    with torch.no_grad():
        logits = model.action_logits(**inputs, action_tokens=tokens)
        others = processor(images=scenes, instructions=["open the middle drawer"] * 8, raw_images=True)
        other_logits = model.action_logits(**others, action_tokens=tokens)
    assert 0.7 < logits.std(dim=-1).mean() < 1.4
    # of at most log 256 = 5.55 nats
    assert torch.distributions.Categorical(logits=logits).entropy().min() > 4.5
    assert logits.std(dim=0).mean() > 0.2
    assert (logits - other_logits).abs().mean() > 0.2
    prediction = model.predict_action(**inputs, unnorm_key="tabletop", do_sample=True, seeds=list(range(8)))
    assert np.abs(prediction.actions).max() <= 1.0
    assert len({tuple(row) for row in prediction.tokens.tolist()}) == 8


def test_config_of_a_preset_fits_vllm(tiny):
    config = OpenVLAForActionPrediction.from_pretrained(tiny).config
    text = config.text_config
    # the image's stand-in must be in the vocabulary, and vLLM's CPU attention has few head sizes
    assert config.image_token_index == config.pad_token_id == 512 < text.vocab_size == 576
    assert text.hidden_size // text.num_attention_heads == 32
    assert config.action_token_ids == range(256, 512)
    suites = {"libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90", "tabletop"}
    assert set(config.norm_stats) == suites
    assert config.action_statistics("libero_goal")["q99"] == [
        *(0.9375, 0.9107142686843872, 0.9375, 0.20357142388820648, 0.26357144117355347, 0.375),
        1.0,
    ]


def test_mini_has_about_thirty_million_parameters():
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(build_config(PRESETS["mini"]))
    assert 28e6 < sum(parameter.numel() for parameter in model.parameters()) < 33e6


def libero_instructions() -> list[str]:
    """Every instruction of the five suites, from the installed package's source (importing it may ask questions)."""
    spec = importlib.util.find_spec("libero")
    if spec is None:
        pytest.skip("libero is not installed")
    roots = [Path(root) for root in spec.submodule_search_locations or []]
    files = [path for root in roots for path in sorted(root.rglob("libero_suite_task_map.py"))]
    if not files:
        pytest.skip("the installed libero has no libero_suite_task_map.py")
    assignment = ast.parse(files[0].read_text()).body[0]
    tasks = ast.literal_eval(assignment.value)
    names = [name for suite in ("spatial", "object", "goal", "10", "90") for name in tasks[f"libero_{suite}"]]
    return [re.sub(r"^[A-Z_0-9]*SCENE\d+_", "", name).replace("_", " ") for name in names]


def test_every_libero_instruction_is_in_the_vocabulary(tiny):
    processor = OpenVLAProcessor.from_pretrained(tiny)
    unknown = processor.tokenizer.unk_token_id
    instructions = libero_instructions()
    assert len(instructions) == 130
    for instruction in instructions:
        ids = processor.prompt_ids(instruction)
        assert unknown not in ids, instruction
        # <s> In : What action should the robot take to ... ? \n Out :
        assert len(ids) == 14 + len(instruction.split())


def test_an_unknown_word_is_one_unknown_token(tiny):
    processor = OpenVLAProcessor.from_pretrained(tiny)
    ids, known = processor.prompt_ids("push the zeppelin"), processor.prompt_ids("push the plate")
    assert len(ids) == len(known)
    assert [a for a, b in zip(ids, known, strict=True) if a != b] == [processor.tokenizer.unk_token_id]


def test_resolving_a_preset_writes_it_once(tmp_path, monkeypatch):
    first = resolve_model("tiny", tmp_path)
    monkeypatch.setattr(presets, "write_checkpoint", lambda *arguments: pytest.fail("written twice"))
    assert resolve_model("tiny", tmp_path) == first
    assert [path.name for path in tmp_path.iterdir()] == [Path(first).name]


def test_resolving_yields_to_a_process_that_was_faster(tmp_path, monkeypatch):
    target = Path(resolve_model("tiny", tmp_path / "a")).name

    def slow_write(name, directory):
        (tmp_path / "b" / target).mkdir(parents=True)
        for place in (tmp_path / "b" / target, directory):
            (place / "config.json").write_text("{}")

    monkeypatch.setattr(presets, "write_checkpoint", slow_write)
    assert resolve_model("tiny", tmp_path / "b") == str(tmp_path / "b" / target)
    assert [path.name for path in (tmp_path / "b").iterdir()] == [target]


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def broken_write(name, directory):
        raise OSError("disk full")

    monkeypatch.setattr(presets, "write_checkpoint", broken_write)
    with pytest.raises(OSError, match="disk full"):
        resolve_model("tiny", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_names_directories_and_hub_ids_resolve(tiny, tmp_path):
    assert resolve_model(tiny, tmp_path) == str(tiny)
    assert resolve_model("openvla-7b", tmp_path) == "openvla/openvla-7b"
    spatial = resolve_model("openvla-7b-finetuned-libero-spatial", tmp_path)
    assert spatial == "openvla/openvla-7b-finetuned-libero-spatial"
    assert resolve_model("someone/else", tmp_path) == "someone/else"
    for unknown in ("tyni", "./none", "/no/such/dir"):
        with pytest.raises(
            ValueError, match=r"no directory, preset or Hub id.*tiny, small, mini, tiny-oft, mini-oft, openvla-7b"
        ):
            resolve_model(unknown, tmp_path)
    with pytest.raises(ValueError, match="preset 'tyni' does not exist; choose from tiny, small, mini"):
        write_checkpoint("tyni", tmp_path)


def test_models_and_presets_import_without_torch():
    code = "import sys; from vlarl_rllib.models.presets import preset_facts; preset_facts('tiny'); "
    code += "print('torch' in sys.modules)"
    root = Path(presets.__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert result.stdout.strip() == "False"
