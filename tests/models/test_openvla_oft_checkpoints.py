"""How OpenVLA-OFT is told from OpenVLA, where its layout comes from, and the files of its own parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.parity_oft import GoldenOFT
from tests.hostile.traps import Trap
from vlarl_rllib.evaluation.libero_protocol import EvaluationRequest
from vlarl_rllib.models.family import ActionFormat, family_name, family_of, load_family
from vlarl_rllib.models.openvla_oft import OFTLayout, OpenVLAOFTForActionPrediction
from vlarl_rllib.models.presets import presets, resolve_model, write_checkpoint
from vlarl_rllib.runs.doubts import doubts
from vlarl_rllib.runs.export import write_model
from vlarl_rllib.runs.preflight import check, check_model
from vlarl_rllib.settings import Settings, SettingsError
from vlarl_rllib.settings.published import PUBLISHED_MODELS
from vlarl_rllib.weights.source import iterate_weights

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "T"
HEAD, PROJECTOR = "action_head--1000_checkpoint.pt", "proprio_projector--1000_checkpoint.pt"
REGRESSING = OFTLayout(num_images=2, proprio=True, l1_head=True)
REFERENCE = "openvla_oft?num_images=2&proprio=true"


@pytest.fixture
def foreign(golden_t: GoldenOFT, tmp_path: Path) -> Path:
    """T as published checkpoints are, but for its towers' sizes."""
    directory = shutil.copytree(golden_t.directory, tmp_path / "T")
    change_json(directory / "config.json", vision_towers=golden_t.vision_towers)
    return directory


@pytest.fixture
def of_tokens(foreign: Path) -> Path:
    """The same without parts of its own."""
    for name in (HEAD, PROJECTOR):
        (foreign / name).unlink()
    return foreign


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def settings(path: Path | str, **model: Any) -> Settings:
    env = {"name": "synthetic"}
    return Settings.from_dict({"model": {"path": str(path), "unnorm_key": "libero_spatial"} | model, "env": env})


# What kind it is, and its layout


def test_the_files_beside_the_weights_tell_what_it_is(foreign: Path) -> None:
    assert family_name(str(foreign)) == "openvla_oft"
    family = family_of(str(foreign))
    assert family.layout(str(foreign)) == REGRESSING  # type: ignore[attr-defined]
    facts = family.read_facts(str(foreign))
    assert facts.actions == ActionFormat(8, 7, range(128, 384), parallel=True, stop_token=True)
    assert facts.actions.num_tokens == 56 and facts.actions.num_targets == 57
    assert (facts.cameras, facts.state_size, facts.regresses) == (("main", "wrist"), 8, True)
    assert "2 image(s) and the state, 8 regressed actions a pass, a stop token" in (family.describe(str(foreign)) or "")


def test_a_checkpoint_that_says_nothing_is_openvla_unless_the_settings_say_otherwise(of_tokens: Path) -> None:
    path = str(of_tokens)
    assert family_name(path) == "openvla" and family_name(path, "openvla_oft") == "openvla_oft"
    facts = family_of(path, "openvla_oft").read_facts(path)
    assert (facts.cameras, facts.state_size, facts.regresses) == (("main",), 0, False)
    chosen = settings(of_tokens, family="openvla_oft", oft={"chunk": 4, "stop_token": False}).model
    assert chosen.family_reference == "openvla_oft?chunk=4&stop_token=false"
    short = family_of(path, chosen.family_reference).read_facts(path)
    assert short.actions == ActionFormat(4, 7, range(128, 384), parallel=True, stop_token=False)
    assert short.actions.num_targets == 28
    assert family_name(path, "?chunk=4") == "openvla?chunk=4"
    assert settings(of_tokens).model.family_reference is None


@pytest.mark.parametrize("name", [name for name, model in PUBLISHED_MODELS.items() if "oft" in model.family])
def test_published_ones_are_known_by_their_names(name: str) -> None:
    published = PUBLISHED_MODELS[name]
    family: Any = load_family("openvla_oft")
    assert family.claims(published.hub_id, {"model_type": "openvla"})
    assert OFTLayout().with_options(family._published(published.hub_id)) == (
        REGRESSING if name.startswith("openvla-7b-oft") else OFTLayout()
    )


def test_what_this_package_writes_says_what_it_is(foreign: Path, tmp_path: Path) -> None:
    """Weights of a run's policy, all parts among them, with no word in the settings."""
    family = family_of(str(foreign))
    policy = family.load(str(foreign), dtype=torch.float32)
    out = tmp_path / "out"
    tensors = dict(iterate_weights(policy, torch.float32))
    write_model(tensors, family=family, base=str(foreign), out=out, dtype="float32")
    config = json.loads((out / "config.json").read_text())
    assert config["oft"] == REGRESSING.to_dict() and config["model_type"] == "openvla"
    assert "auto_map" not in config, "published code is plain OpenVLA's"
    assert not list(out.glob("*.pt")) and family_name(str(out)) == "openvla_oft"
    again = family_of(str(out)).load(str(out), dtype=torch.float32).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in policy.state_dict().items())
    assert again.keys() == policy.state_dict().keys()
    assert OpenVLAOFTForActionPrediction.from_pretrained(out).layout == REGRESSING
    change_json(out / "config.json", oft=[2])
    with pytest.raises(ValueError, match=r"config\.json: oft is list, must be an object"):
        family_of(str(out), "openvla_oft").read_facts(str(out))


def test_presets_are_whole_and_the_same_each_time(tmp_path: Path) -> None:
    assert [name for name, family in presets().items() if family.name == "openvla_oft"] == ["tiny-oft", "mini-oft"]
    for name in ("one", "two"):
        write_checkpoint("tiny-oft", tmp_path / name)
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    family = family_of(str(tmp_path / "one"))
    assert family.read_facts(str(tmp_path / "one")).actions == family.preset_facts()["tiny-oft"].actions
    policy, processor = family.load(str(tmp_path / "one")), family.processor(str(tmp_path / "one"))
    inputs = processor.raw_inputs([np.zeros((28, 28, 3), np.uint8)] * 4, ["pick up the red cube"] * 4)
    tokens, log_probs, _ = policy.sample_action_tokens(**inputs, temperatures=torch.ones(4), seeds=[1, 2, 3, 4])
    assert len({tuple(row) for row in tokens.tolist()}) == 4
    assert log_probs.mean() < -4.0, "of at most 5.5 nats of entropy"


def test_a_codec_gives_chunks_and_takes_them(of_tokens: Path, golden_t: GoldenOFT) -> None:
    path, statistics = str(of_tokens), golden_t.model("one").config.action_statistics(golden_t.unnorm_key)
    family = load_family("openvla_oft")
    codec = family.codec(family.read_facts(path), statistics)
    for reply, actions in zip(golden_t.arrays["one.greedy_tokens"], golden_t.arrays["one.env_actions"], strict=True):
        np.testing.assert_allclose(codec.decode(reply), actions, atol=2e-8)
    tokens = golden_t.arrays["one.greedy_tokens"]
    np.testing.assert_array_equal(codec.normalized(tokens), golden_t.arrays["one.actions_normalized"])
    again, _ = codec.encode(golden_t.arrays["one.env_actions"])
    arm = np.arange(56) % 7 != 6  # the gripper's number is rounded to open or closed
    np.testing.assert_allclose(again[:, arm], np.maximum(tokens[:, arm], 129), atol=1)
    with pytest.raises(ValueError, match="must be 56 token ids"):
        codec.decode(tokens[0, :7])


# Doubts and mistakes


def test_a_plain_checkpoint_given_as_oft_is_doubted() -> None:
    tiny = resolve_model("tiny")
    (doubt,) = doubts(settings(tiny, family="openvla_oft"))
    assert doubt.startswith("model.family: nothing in ") and "\n" not in doubt
    assert doubts(settings(tiny)) == [] == doubts(settings("tiny-oft"))


def test_one_with_statistics_of_states_is_believed(of_tokens: Path) -> None:
    assert doubts(settings(of_tokens, family="openvla_oft")) == []


@pytest.mark.parametrize(
    ("oft", "message"),
    [
        ({"num_images": 3}, "model.oft.num_images"),
        ({"chunk": 0}, "model.oft.chunk"),
        ({"proprio": 2}, "model.oft.proprio"),
        ({"images": 2}, "model.oft.images"),
    ],
)
def test_an_impossible_layout_is_refused(oft: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=rf"^{message}") as caught:
        settings("tiny-oft", family="openvla_oft", oft=oft)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("openvla_oft?images=2", "'images' is no option of OpenVLA-OFT; choose from num_images, proprio, chunk, stop_"),
        ("openvla_oft?num_images=3", "num_images is 3, must be a number from 1 to 2"),
        ("openvla_oft?proprio=1", "proprio is 1, must be true or false"),
        ("openvla_oft?chunk=many", "chunk is 'many', must be a number, true or false"),
        ("openvla?chunk=8", r"the family openvla has none; leave out chunk \(model.oft\)"),
    ],
)
def test_an_unknown_option_is_refused(reference: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^model.family is '{reference.replace('?', '[?]')}', but {message}"):
        load_family(reference)


def test_contradictions_are_refused_in_one_line(foreign: Path, of_tokens: Path) -> None:
    for name in (HEAD, PROJECTOR):
        shutil.copyfile(GOLDEN / name, foreign / name)
    for path, model, message in (
        (foreign, {"oft": {"l1_head": False}}, f"was trained with {HEAD}, so model.oft.l1_head is true"),
        (foreign, {"oft": {"proprio": False}}, f"was trained with {PROJECTOR}, so model.oft.proprio is true"),
        ("tiny-oft", {"oft": {"chunk": 4}}, "model.oft: preset tiny-oft is made as it is"),
        ("tiny", {"family": "openvla", "oft": {"chunk": 4}}, "model.oft: preset tiny is made as it is"),
        (resolve_model("tiny"), {"oft": {"chunk": 4}}, "the family openvla has none; leave out chunk"),
    ):
        chosen = settings(path, **model)
        with pytest.raises(SettingsError, match=message) as caught:
            check_model(chosen.model.path, chosen.unnorm_key, chosen.model.family_reference)
        assert "\n" not in str(caught.value)


def test_what_cannot_be_played_is_refused(foreign: Path, of_tokens: Path) -> None:
    with pytest.raises(SettingsError, match=r"^model.path: .* is to see main and wrist camera, and 8 numbers of the"):
        check(settings(of_tokens, family="openvla_oft", oft={"num_images": 2, "proprio": True}))
    check(settings(of_tokens, family="openvla_oft"))
    shutil.copyfile(GOLDEN / HEAD, foreign / HEAD)
    with pytest.raises(SettingsError, match=r"^model.path: .* regresses its actions, so none has a probability"):
        check(settings(foreign))
    request = EvaluationRequest(str(foreign), env="synthetic", unnorm_key="libero_spatial", engine="torch")
    with pytest.raises(SettingsError, match=r"^CHECKPOINT: .* regresses its actions"):
        request.check()


# Files of its own parts


def test_parts_come_from_their_files(foreign: Path, golden_t: GoldenOFT) -> None:
    stored = torch.load(foreign / HEAD, weights_only=True)
    assert all(name.startswith("module.") for name in stored)
    head = golden_t.model("two").action_head
    assert head is not None
    loaded = {f"module.{name}": tensor for name, tensor in head.state_dict().items()}
    assert loaded.keys() == stored.keys() and all(torch.equal(loaded[name], stored[name]) for name in stored)


def test_parts_come_from_the_hub_too(golden_t: GoldenOFT, tmp_path: Path) -> None:
    commit = "0123456789012345678901234567890123456789"
    repository = tmp_path / "models--someone--oft"
    shutil.copytree(golden_t.directory, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    options = {"num_images": 2, "proprio": True, "l1_head": True, "vision_towers": golden_t.vision_towers}
    cached = OpenVLAOFTForActionPrediction.from_pretrained(
        "someone/oft", cache_dir=str(tmp_path), local_files_only=True, dtype=torch.float32, **options
    )
    expected = golden_t.model("two").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in cached.state_dict().items())


def test_a_part_that_is_missing_doubled_damaged_or_a_trap_is_one_line(foreign: Path, tmp_path: Path) -> None:
    mark, file, another = tmp_path / "mark", foreign / PROJECTOR, foreign / "proprio_projector--2000_checkpoint.pt"
    whole, damaged = file.read_bytes(), rf"{PROJECTOR}: .*copy it again"

    def refused(kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message) as caught:
            load_family(REFERENCE).load(str(foreign), dtype=torch.float32)
        assert "\n" not in str(caught.value)

    torch.save({"module.fc1.weight": Trap(mark)}, file)
    refused(ValueError, damaged)
    assert not mark.exists(), "the pickle was run"
    for content in ({"module.fc1.weight": torch.zeros(3)}, torch.zeros(3), ["fc1"]):
        torch.save(content, file)
        refused(ValueError, damaged)
    file.write_bytes(whole[:1000])
    refused(ValueError, damaged)
    another.write_bytes(whole)
    refused(ValueError, r"has 2 files proprio_projector--\*checkpoint.pt, from .* on; leave one")
    another.unlink()
    file.unlink()
    refused(FileNotFoundError, r"no proprio_projector--\*_checkpoint\.pt and no such weights")
