"""`vlarl doctor`: plans for stated machines, what a policy is and should score, and what the deep check concludes."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vlarl_rllib.commands.checkpoint import report_checkpoint
from vlarl_rllib.commands.deep_check import shortened, verdict
from vlarl_rllib.commands.doctor import report_on, report_on_nodes
from vlarl_rllib.errors import SettingsError
from vlarl_rllib.models.family import ActionFormat, load_family
from vlarl_rllib.models.fingerprint import model_fingerprints
from vlarl_rllib.models.presets import write_checkpoint
from vlarl_rllib.observability.self_test import expectation
from vlarl_rllib.runs.capacity import Machine, estimate, place, problems, too_few_cpus
from vlarl_rllib.runs.checkpoints import CheckpointStore
from vlarl_rllib.runs.directory import RunDirectory
from vlarl_rllib.settings import Settings, calculate_runtime_args
from vlarl_rllib.settings.plan import Role
from vlarl_rllib.settings.published import PUBLISHED_MODELS

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
COMMAND = re.compile(
    r"vlarl doctor configs/(\S+) --cpus (\d+) --gpus (\d+) --memory (\d+)(?: --gpu-memory (\d+))?$", re.MULTILINE
)
OF_NODES = re.compile(r"vlarl doctor configs/(\S+)((?: --node \S+)+)$", re.MULTILINE)
ON_NODES = [file for file in CONFIGS if OF_NODES.search(file.read_text())]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, with a table's cells on one line each."""
    return " ".join(re.sub(r"[│┃━┏┓┗┛┡┩┳┻╇└┘┴─┐┌]", " ", capsys.readouterr().out).split())


# Plans


@pytest.mark.parametrize("file", [file for file in CONFIGS if file not in ON_NODES], ids=lambda file: file.stem)
def test_every_config_has_room_where_it_says(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (stated,) = COMMAND.findall(file.read_text())
    assert stated[0] == file.name
    cpus, gpus, memory, gpu_memory = (int(number or 80) for number in stated[1:])
    settings, machine = Settings.from_yaml(file), Machine(cpus, gpus, memory, gpu_memory)
    assert report_on(settings, machine), said(capsys)
    assert "the plan fits that machine" in said(capsys)
    plan = calculate_runtime_args(settings)
    cards, left = place(plan, gpus)
    assert not left and sum(map(len, cards)) == sum("GPU" in one.resources for one in plan.bundles)
    assert not gpus or too_few_cpus(plan, machine) is None, "it is to be placed on a cluster's node too"


@pytest.mark.parametrize("file", ON_NODES, ids=lambda file: file.stem)
def test_a_config_for_several_nodes_has_room_on_those_that_it_names(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ((name, nodes),) = OF_NODES.findall(file.read_text())
    assert name == file.name
    machines = [Machine.parsed(text, 80.0) for text in nodes.replace("--node", "").split()]
    assert report_on_nodes(Settings.from_yaml(file), machines), said(capsys)
    assert "the plan fits on those nodes" in said(capsys)


def test_simulators_stand_beside_the_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    machines = [Machine(16, 4, 256, 80.0), Machine(64, 0, 128, 80.0, {"simulator": 4})]
    report_on_nodes(config("libero_spatial_2nodes"), machines)
    text = said(capsys)
    assert "node 2: 64 CPU, simulator 4 4 x runner (15 CPU, simulator 1)" in text
    assert "on GPU 3 learner, engine; about 53.2 of 80 GB" in text
    assert "memory of an engine about 20.1 GB: weights 15.1, cache 3.4" in text
    # 12 bytes of each of 110.8 million adapter parameters, kept twice and written a third time
    assert "a checkpoint about 1.3 GB" in text and "4.0 GB" in text
    assert not report_on_nodes(config("libero_spatial_2nodes"), machines[:1])
    assert "none has the resource simulator; start one with ray start --resources=" in said(capsys)


def test_shards_over_several_nodes_are_a_remark(capsys: pytest.CaptureFixture[str]) -> None:
    """Two nodes of two GPUs: SPREAD puts two learners on each."""
    settings = config("libero_spatial_4gpu").replaced(placement={"strategy": "SPREAD"})
    machines = [Machine(32, 2, 256, 80.0)] * 2
    assert report_on_nodes(settings, machines)
    advice = "learners.fsdp.mesh: [1, 4] divides the weights over 2 nodes"
    assert advice in (text := said(capsys)) and "[2, 2] keeps shards within a node, and takes 2 times" in text
    assert report_on_nodes(settings.replaced(learners={"fsdp": {"mesh": [2, 2]}}), machines)
    assert advice not in said(capsys)
    packed = settings.replaced(placement={"strategy": "PACK"})
    assert not report_on_nodes(packed, machines) and "set placement.strategy to SPREAD" in said(capsys)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("cpus=4", "memory is missing, or no amount"),
        ("memory=4,cpus=nan", "cpus is missing, or no amount"),
        ("cpus=4,memory", "'memory' is no name=value"),
        ("cpus=4,memory=8,gpus=1.5", "gpus=1.5 is no number of GPUs"),
    ],
)
def test_a_node_that_is_described_wrongly_is_a_line(text: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        Machine.parsed(text, 80.0)


def config(name: str) -> Settings:
    return Settings.from_yaml(next(file for file in CONFIGS if file.stem == name))


def test_four_cards_hold_an_engine_and_a_learner_each(capsys: pytest.CaptureFixture[str]) -> None:
    settings = config("libero_spatial_4gpu")
    plan = calculate_runtime_args(settings)
    cards, _ = place(plan, 4)
    assert [sorted(card, key=str) for card in cards] == [[Role.ENGINE, Role.LEARNER]] * 4
    for card in cards:
        assert 40.0 < (estimate(settings, plan).of(card) or 0.0) < 80
    report_on(settings, Machine(64, 4, 256, 80.0))
    assert "on GPU 3 learner, engine; about 59.1 of 80 GB, of them 5.9 to draw frames" in said(capsys)


LANGUAGE = {"lora": {"rank": 32, "targets": "language_model"}}


@pytest.mark.parametrize(
    ("model", "learners", "measured_gb"),
    [  # docs/doctor.md
        ({}, {"micro_batch_size": 16}, 45.7),
        ({}, {"micro_batch_size": 4, "compile": False}, 26.4),
        ({}, {"micro_batch_size": 8, "merge_ahead": True, "fsdp": {"checkpoint_activations": True}}, 37.7),
        (LANGUAGE, {"micro_batch_size": 32}, 56.4),
        ({"quantization": "8bit"}, {"micro_batch_size": 4}, 21.3),
        ({"quantization": "4bit"}, {"micro_batch_size": 4}, 17.1),
    ],
)
def test_the_estimate_of_a_learner_is_near_what_was_measured(
    model: dict[str, Any], learners: dict[str, Any], measured_gb: float
) -> None:
    learners = {"activation_memory_budget": 1.0} | learners
    settings = config("libero_spatial_1gpu").replaced(model=model, learners=learners)
    assert estimate(settings, calculate_runtime_args(settings)).learner == pytest.approx(measured_gb, rel=0.06)


def test_the_cache_of_a_decision_is_what_an_engine_reserves() -> None:
    """256 patches, 48 of a prompt and 7 actions fill 20 blocks of 16; 2 x 32 layers x 4096 numbers of 2 bytes each."""
    assert load_family("openvla").cache_bytes(None, "bfloat16") == 20 * 16 * 2 * 32 * 4096 * 2


def test_weights_that_are_merged_ahead_take_as_much_again() -> None:
    without = config("libero_spatial_1gpu")
    ahead = without.replaced(learners={"merge_ahead": True})
    plan = calculate_runtime_args(without)
    more = (estimate(ahead, plan).learner or 0.0) - (estimate(without, plan).learner or 0.0)
    assert more == pytest.approx(2 * 7.541, rel=1e-3)
    assert not without.replaced(learners={"merge_ahead": None, "num": 2}).merge_ahead


@pytest.mark.parametrize(
    ("machine", "changes", "told"),
    [
        (Machine(16, 0, 64, 80.0), {}, r"no place on 0 GPU\(s\) for learner \(0.6 GPU\), engine \(0.4 GPU\)"),
        (Machine(16, 1, 64, 80.0), {"engines": {"gpus": 0.5}}, r"no place on 1 GPU\(s\) for engine \(0.5 GPU\)"),
        (Machine(16, 1, 64, 48.0), {}, "about 63 GB on GPU 0 of 48; lower learners.micro_batch_size"),
        (Machine(16, 1, 64, 80.0), {"model": {"lora": None}}, r"about 1\d\d GB on GPU 0 of 80"),
        (Machine(16, 1, 8, 80.0), {}, "take 11 GB or more of 8; lower env.num_processes"),
    ],
)
def test_what_has_no_room_is_a_line(machine: Machine, changes: dict[str, Any], told: str) -> None:
    settings = config("libero_spatial_1gpu").replaced(**changes)
    (problem,) = problems(settings, calculate_runtime_args(settings, cores=16), machine)
    assert re.search(told, problem) and "\n" not in problem


def test_more_cpus_than_there_are_are_a_remark(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_on(config("libero_spatial_1gpu"), Machine(12, 1, 64, 80.0))
    assert "the plan reserves 13 CPUs of 12" in said(capsys)


# Policies


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for libero_goal alone, called like a published one."""
    directory = tmp_path_factory.mktemp("models") / "openvla-7b-finetuned-libero-goal"
    write_checkpoint("tiny", directory)
    values = json.loads((directory / "config.json").read_text())
    values["norm_stats"] = {"libero_goal_no_noops": values["norm_stats"]["libero_goal"]}
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def test_a_models_directory(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_checkpoint(str(tiny), suite=None, env=None, family=None)
    text = said(capsys)
    for part in (
        "family openvla",
        "two vision towers (3 blocks x 64 and 3 blocks x 64), projector, language model (2 layers x 64)",
        "685,696 parameters in 130 tensors (F32 685,696)",
        "1 action(s) of 7 tokens, each of 256 bins (ids 256 to 511), one after the other",
        "action statistics libero_goal_no_noops",
        "used for libero_goal: 10 tasks, 300 steps an episode",
        "libero_goal: q01 -0.879 -0.755 -0.938",
        r"'In: What action should the robot take to open the middle drawer of the cabinet?\nOut:'",
        "centre crop yes (nothing in a checkpoint says",
        "agentview drawn at 256 x 256, turned by 180 degrees, JPEG round trip as TensorFlow's (quality 95), Lanczos-3 "
        "to 224 x 224, central 90 % of the area, bicubic to 28 x 28",
        "if it is the one it is called after: 79.2 +- 1 %",
        "--suite libero_goal",
    ):
        assert part in text, text


def test_other_statistics_than_the_suites_are_told(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not report_checkpoint(str(tiny), suite="libero_10", env=None, family=None)
    text = said(capsys)
    assert "'libero_10' is not in this checkpoint's norm_stats; choose from libero_goal_no_noops" in text
    assert "nothing was published for it here" in text


@pytest.mark.parametrize("name", [name for name, model in PUBLISHED_MODELS.items() if model.result])
def test_a_published_name_says_what_it_should_score_also_without_a_network(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*arguments: Any) -> None:
        raise SettingsError("CHECKPOINT: cannot be fetched from the hub")

    monkeypatch.setattr("vlarl_rllib.commands.checkpoint.model_facts", unreachable)
    assert not report_checkpoint(name, suite=None, env=None, family=None)
    text, result = said(capsys), PUBLISHED_MODELS[name].result
    error = f" +- {result.standard_error:g}" if result.standard_error else ""
    assert f"should score {result.success:g}{error} % ({result.source[:16]}" in text
    assert f"vlarl eval {name} --suite {result.suite}" in text and "yes (published: trained with random crops)" in text
    assert "Lanczos-3 to 224 x 224, central 90 % of the area" in text and "cannot be fetched from the hub" in text


def test_a_published_model_that_was_not_made_for_libero_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*arguments: Any) -> None:
        raise SettingsError("CHECKPOINT: cannot be fetched from the hub")

    monkeypatch.setattr("vlarl_rllib.commands.checkpoint.model_facts", unreachable)
    report_checkpoint("openvla/openvla-7b", suite=None, env=None, family=None)
    text = said(capsys)
    assert "nothing on libero, which it was not trained on" in text and "statistics are bridge_orig" in text
    report_checkpoint("openvla-7b", suite="libero_goal", env=None, family=None)
    assert "vlarl eval openvla-7b --suite libero_goal --no-center-crop" in said(capsys)


def test_the_spread_is_that_of_both_numbers() -> None:
    """84.7 %: 0.9 of three seeds, and sqrt(84.7 x 15.3 / 500) = 1.61 of 500 episodes."""
    result = PUBLISHED_MODELS["openvla-7b-finetuned-libero-spatial"].result
    assert result.spread(500) == pytest.approx(1.96 * math.hypot(0.9, 1.61), abs=0.01)


def test_an_adapter_is_no_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(facts | {"base_model_name_or_path": "openvla/openvla-7b"}))
    save_file({"q_proj.lora_A.weight": torch.zeros(4, 8)}, tmp_path / "adapter_model.safetensors")
    assert report_checkpoint(str(tmp_path), suite=None, env=None, family=None)
    text = said(capsys)
    assert "a PEFT adapter (LoRA) of rank 4, alpha 4; no policy yet" in text
    assert "for the model openvla/openvla-7b" in text and "32 parameters in 1 tensors (F32 32)" in text


def test_a_run_says_where_it_is_and_where_it_came_from(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings.from_dict(
        {"model": {"path": str(tiny), "lora": {"rank": 8}, "center_crop": False}, "env": {"suite": "libero_goal"}}
    )
    run = RunDirectory(tmp_path / "run")
    with run.claimed(settings), CheckpointStore(run.path / "checkpoints", keep=1).writing(5) as directory:
        (directory / "learners").mkdir()
        models = model_fingerprints(settings)
        CheckpointStore.write_facts(
            directory, iteration=5, policy_version=6, settings=settings.to_dict(), models=models, algorithm={}
        )
    played = {"success_rate": 0.5, "episodes": 64}
    row = {"iteration": 1, "initial_evaluation": played, "evaluation": None}
    (run.path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert report_checkpoint(str(run.path), suite=None, env=None, family=None)
    text = said(capsys)
    for part in (
        "iteration 5 of 10, vlarl train",
        "LoRA adapters of rank 8, merged by vlarl export and eval",
        "50.0 % of 64 behind iteration 0",
        "no (as the run that trained it)",
        "--suite libero_goal --no-center-crop",
        "Lanczos-3 to 224 x 224, no crop",
    ):
        assert part in text, text
    assert "should score" not in text


def test_looking_at_a_policy_loads_neither_torch_nor_transformers(tiny: Path) -> None:
    code = (
        "import sys\nfrom vlarl_rllib.cli import main\n"
        f"sys.argv = ['vlarl', 'doctor', {str(tiny)!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "loaded = {'torch', 'transformers', 'ray', 'vllm'} & set(sys.modules)\nassert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# The deep check


def rows(kl: float, gap: float, failed: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    return [
        {"self_test": {"failed": [], "told": "..."}, "approx_kl": kl},
        {"self_test": {"failed": list(failed), "told": "..."}, "logprob_gap_mean": gap},
    ]


@pytest.mark.parametrize(
    ("rows", "line", "good"),
    [
        # 0.14 nats of KL over 7 tokens: sqrt(0.28 / 7) = 0.2 a token, far above float32's bound of 1e-4
        (rows(0.14, 6e-7), "passed: the update moved a token by about 2.0e-01 nats, and the gap is 6.0e-07", True),
        (rows(1e-9, 6e-7), "passed but for the weights' travel", True),
        (rows(0.14, 0.2, ("log-prob gap",)), "deep check failed: log-prob gap; see the line above", False),
    ],
)  # fmt: skip
def test_what_the_deep_check_concludes(rows: list[dict[str, Any]], line: str, good: bool) -> None:
    expected = expectation(Settings(), ActionFormat(1, 7, range(256, 512)))
    found, passed = verdict(rows, expected)
    assert line in found and passed is good


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_can_be_looked_at_deeply(file: Path) -> None:
    settings = Settings.from_yaml(file)
    short = shortened(settings)
    assert (short.engines, short.learners, short.env, short.model) == (
        settings.engines, settings.learners, settings.env, settings.model,
    )  # fmt: skip
    plan = calculate_runtime_args(short)
    assert plan.bundles == calculate_runtime_args(settings).bundles and plan.optimizer_steps == 4
