"""The `vlarl` command as a user meets it: help and mistakes are answered in one line, with exit code 2, at once."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from vlarl_rllib.models.fingerprint import model_fingerprints
from vlarl_rllib.runs.checkpoints import CheckpointStore
from vlarl_rllib.runs.directory import RunDirectory
from vlarl_rllib.settings import Settings

CPU_SECONDS = 1.0
"""What an answer may cost. Wall time says little on a machine that is busy with something else."""
ATTEMPTS = 5
"""The least of so many counts: CPU time grows too where cores share their caches with others."""
HEAVY = ("ray", "torch", "transformers", "vllm", "libero", "mujoco")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a config, a run, an unfinished run and some broken checkpoints; the commands run there."""
    root = tmp_path_factory.mktemp("cli")
    (root / "good.yaml").write_text("env: {name: synthetic}\nmodel: {path: tiny}\n")
    (root / "wrong_key.yaml").write_text("training: {lrr: 1}\n")
    (root / "wrong_type.yaml").write_text("training: {lr: fast}\n")
    (root / "broken.yaml").write_text("training: {lr: [1\nrun: {}\n")
    for name, config in {"other_model": {"model_type": "llama"}, "no_sizes": {"model_type": "openvla"}}.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
    (root / "cut_short").mkdir()
    (root / "cut_short" / "config.json").write_text('{"model_type": "open')
    run = RunDirectory(root / "runs" / "done")
    with run.claimed(Settings()), CheckpointStore(run.path / "checkpoints", keep=1).writing(5) as directory:
        (directory / "learners").mkdir()
        (directory / "learners" / "rank_0").write_text("weights")
        CheckpointStore.write_facts(
            directory,
            iteration=5,
            policy_version=6,
            settings=Settings().to_dict(),
            models=model_fingerprints(Settings()),
            algorithm={},
        )
    with RunDirectory(root / "runs" / "without_checkpoint").claimed(Settings()):
        pass
    fine_tuned = RunDirectory(root / "runs" / "fine_tuned")
    steps = Settings().sft.steps
    with fine_tuned.claimed(Settings()), fine_tuned.checkpoints(unit="step").writing(steps) as directory:
        (directory / "learners").mkdir()
        (directory / "learners" / "rank_0").write_text("weights")
        (fine_tuned.path / "summary.json").write_text(json.dumps({"steps": steps}))
    return root


MISTAKES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "an unknown command": (["trian"], ("trian", "Did you mean 'train'?")),
    "an unknown option": (["train", "--bogus"], ("No such option: --bogus",)),
    "a misspelt option": (["train", "good.yaml", "--run-dri", "x"], ("--run-dri", "--run-dir")),
    "an option without its value": (["train", "good.yaml", "--run-dir"], ("--run-dir", "requires an argument")),
    "one argument too many": (["train", "good.yaml", "wrong_key.yaml"], ("unexpected", "wrong_key.yaml")),
    "a number that is none": (["make-checkpoint", "tiny", "new", "--seed", "one"], ("--seed", "integer")),
    "collecting nowhere": (["collect", "good.yaml"], ("--out: missing", "give a directory")),
    "a quickstart of nothing": (["quickstart"], ("CONFIG: missing", "configs/quickstart.yaml")),
    "no config": (["train"], ("CONFIG: missing", "configs/libero_smoke_cpu.yaml")),
    "a missing file": (["train", "absent.yaml"], ("absent.yaml: no such file",)),
    "a missing file for the doctor": (["doctor", "absent.yaml"], ("absent.yaml: no such file",)),
    "no policy for the doctor": (["doctor", "./absent"], ("CHECKPOINT: no such run or directory", "/absent'")),
    "a suite of a config": (
        ["doctor", "good.yaml", "--suite", "libero_goal"],
        ("--suite: is about CHECKPOINT", "leave it out"),
    ),
    "a deep look at a policy": (["doctor", "tiny", "--deep"], ("--deep: is about CONFIG", "leave it out")),
    "half a machine": (["doctor", "good.yaml", "--cpus", "4"], ("--cpus, --gpus, --memory: give all three",)),
    "a policy for no suite": (
        ["doctor", "tiny", "--suite", "libero_spatail"],
        ("--suite: 'libero_spatail'", "libero_spatial"),
    ),
    "not YAML": (["train", "broken.yaml"], ("broken.yaml: not valid YAML",)),
    "a wrong key": (["train", "wrong_key.yaml"], ("training.lrr: unknown key", "did you mean training.lr?")),
    "a wrong type": (["train", "wrong_type.yaml"], ("training.lr: 'fast'", "valid number")),
    "a wrong override": (["train", "good.yaml", "--set", "training.lr"], ("--set training.lr:", "section.key=value")),
    "no such model": (
        ["train", "good.yaml", "--set", "model.path=./absent"],
        ("model.path: no such directory", "/absent'", "presets are tiny"),
    ),
    "a directory without a model": (
        ["train", "good.yaml", "--set", "model.path=runs"],
        ("model.path:", "has no config.json"),
    ),
    "an adapter that is none": (
        ["train", "good.yaml", "--set", "model.lora.adapter=runs"],
        ("model.lora.adapter: ", "/runs: no PEFT adapter here (adapter_config.json is missing)"),
    ),
    "a critic of another size": (
        ["train", "good.yaml", "--set", "model.critic=separate", "--set", "model.critic_path=mini"],
        ("model.critic_path: mini sees 112 pixels, the policy 28", "choose one of that size"),
    ),
    "another kind of model": (
        ["train", "good.yaml", "--set", "model.path=other_model"],
        ("model.path:", "must be 'openvla'"),
    ),
    "a model without sizes": (
        ["train", "good.yaml", "--set", "model.path=no_sizes"],
        ("model.path:", "/no_sizes has no 'image_sizes'"),
    ),
    "half a model": (
        ["train", "good.yaml", "--set", "model.path=cut_short"],
        ("model.path:", "cut_short/config.json cannot be read"),
    ),
    "a judge that is nowhere": (
        ["train", "good.yaml", "--set", "rewards.process=1", "--set", "rewards.judge=absent"],
        ("rewards.judge: ", "/absent has no config.json", "vlarl reward-model"),
    ),
    "a judge that cannot judge": (
        ["train", "good.yaml", "--set", "rewards.process=1", "--set", "rewards.judge=other_model"],
        ("rewards.judge: ", "/other_model holds a model of type 'llama'", "vision-language model"),
    ),
    "a wrong unnorm_key": (
        ["train", "good.yaml", "--set", "model.unnorm_key=bridge"],
        ("model.unnorm_key: 'bridge'", "choose from libero_10"),
    ),
    "resume without a run": (["train", "--resume"], ("--resume: needs --run-dir",)),
    "resume with a changed config": (
        ["train", "--resume", "--run-dir", "runs/done", "--set", "run.seed=1"],
        ("--resume:", "no CONFIG, --set"),
    ),
    "resume of nothing": (["train", "--resume", "--run-dir", "runs/absent"], ("--run-dir: runs/absent holds no run",)),
    "resume without a checkpoint": (
        ["train", "--resume", "--run-dir", "runs/without_checkpoint"],
        ("--resume:", "no complete checkpoint"),
    ),
    "resume auto nowhere": (["train", "good.yaml", "--resume", "auto"], ("--resume auto: needs --run-dir",)),
    "resume auto of nothing without a config": (
        ["train", "--resume", "auto", "--run-dir", "runs/absent"],
        ("CONFIG: missing",),
    ),
    "resume auto with another config": (
        ["train", "good.yaml", "--run-dir", "runs/done", "--resume=auto"],
        ("env.name: 'synthetic' in config.yaml, but the run was made with 'libero'",),
    ),
    "resume auto of fine-tuning with another config": (
        ["sft", "good.yaml", "--run-dir", "runs/fine_tuned", "--resume", "auto"],
        ("env.name: 'synthetic' in config.yaml, but the run was made with 'libero'",),
    ),
    "resume auto of training where fine-tuning was": (
        ["train", "good.yaml", "--run-dir", "runs/fine_tuned", "--resume", "auto"],
        ("--run-dir: runs/fine_tuned holds a run already",),
    ),
    "resume with another word": (["train", "--run-dir", "runs/done", "--resume=perhaps"], ("--resume", "perhaps")),
    "a job without a run directory": (["submit", "good.yaml", "--address", "head"], ("--run-dir: missing",)),
    "a job with a relative run directory": (
        ["submit", "good.yaml", "--address", "head", "--run-dir", "runs/x"],
        ("--run-dir: runs/x is relative", "Ray's cache of the upload", "give an absolute path"),
    ),
    "a job nowhere": (["submit", "good.yaml", "--run-dir", "/runs/x"], ("--address: missing", "http://head:8265")),
    "a job with a wrong key": (
        ["submit", "good.yaml", "--address", "head", "--run-dir", "/runs/x", "--set", "training.lrr=1"],
        ("training.lrr: unknown key",),
    ),
    "jobs of no cluster": (["jobs", "list"], ("--address: missing",)),
    "an unknown command about jobs": (["jobs", "lst"], ("lst",)),
    "a run directory that holds a run": (
        ["train", "good.yaml", "--run-dir", "runs/done"],
        ("--run-dir: runs/done holds a run already", "--resume"),
    ),
    "a run directory that is a file": (
        ["train", "good.yaml", "--run-dir", "good.yaml"],
        ("--run-dir:", "good.yaml cannot be made"),
    ),
    "no checkpoint to start from": (
        ["train", "good.yaml", "--resume-from", "runs/without_checkpoint"],
        ("--resume-from:", "no checkpoint here"),
    ),
    "other adapters than the checkpoint's": (
        ["train", "good.yaml", "--resume-from", "runs/done", "--set", "model.lora={rank: 4}"],
        (
            "model.lora.rank: 4, but the weights of iteration_000005 were trained with None",
            "start without --resume-from",
        ),
    ),
    "another model than the checkpoint's": (
        ["train", "good.yaml", "--resume-from", "runs/done", "--set", "model.path=mini"],
        ("model.path: 'mini', but",),
    ),
    "no suite": (["eval", "tiny"], ("--suite: missing", "libero_spatial")),
    "an unknown suite": (
        ["eval", "tiny", "--suite", "libero_spatail"],
        ("--suite: 'libero_spatail'", "did you mean libero_spatial?"),
    ),
    "a task that is not in the suite": (
        ["eval", "tiny", "--suite", "libero_goal", "--tasks", "0,10"],
        ("--tasks: 10", "0 to 9"),
    ),
    "tasks that are no numbers": (
        ["eval", "tiny", "--suite", "libero_goal", "--tasks", "all"],
        ("--tasks: 'all'", "such as 0,3"),
    ),
    "too many trials": (
        ["eval", "tiny", "--suite", "libero_goal", "--trials", "51"],
        ("--trials: 51", "between 1 and 50"),
    ),
    "no checkpoint to evaluate": (
        ["eval", "./absent", "--suite", "libero_goal"],
        ("CHECKPOINT: no such run or directory", "/absent'"),
    ),
    "a run without a checkpoint to evaluate": (
        ["eval", "runs/without_checkpoint", "--env", "synthetic"],
        ("CHECKPOINT:", "has no config.json"),
    ),
    "results over other things": (
        ["eval", "tiny", "--env", "synthetic", "--out", "other_model"],
        ("--out: other_model holds other things",),
    ),
    "results over a file": (
        ["eval", "tiny", "--env", "synthetic", "--out", "good.yaml"],
        ("--out: good.yaml cannot be made",),
    ),
    "no data for a reward model": (
        ["reward-model", "--data", "absent", "--out", "new"],
        ("--data: absent: no data set below it",),
    ),
    "a reward model over another": (
        ["reward-model", "--data", "absent", "--out", "other_model"],
        ("--out: other_model", "give a new directory"),
    ),
    "a reward model without steps": (
        ["reward-model", "--data", "absent", "--out", "new", "--steps", "0"],
        ("--steps: 0 must be at least 1",),
    ),
    "an unknown preset": (["make-checkpoint", "large", "new"], ("PRESET: 'large'", "choose from tiny, small, mini")),
    "a checkpoint over another": (
        ["make-checkpoint", "tiny", "other_model"],
        ("DIRECTORY: other_model", "give a new directory"),
    ),
}


def vlarl(arguments: list[str], place: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run the command; its outcome and its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "vlarl_rllib", *arguments], cwd=place, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def vlarl_quickly(arguments: list[str], place: Path) -> subprocess.CompletedProcess[str]:
    """Run the command and assert what it may cost."""
    seconds = []
    for _ in range(ATTEMPTS):
        done, cost = vlarl(arguments, place)
        seconds.append(cost)
        if cost < CPU_SECONDS:
            return done
    pytest.fail(f"vlarl {' '.join(arguments)} took {min(seconds):.2f} CPU seconds at best, may take {CPU_SECONDS:g}")


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_at_once(case: str, place: Path) -> None:
    arguments, parts = MISTAKES[case]
    done = vlarl_quickly(arguments, place)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("vlarl: ")
    for part in parts:
        assert part in line


@pytest.mark.parametrize("arguments", [["--help"], []], ids=["--help", "nothing"])
def test_help_names_the_commands_at_once(arguments: list[str], place: Path) -> None:
    done = vlarl_quickly(arguments, place)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage:" in done.stdout
    for command in ("train", "submit", "jobs", "eval", "reward-model", "doctor", "make-checkpoint"):
        assert f"  {command} " in done.stdout


def test_help_of_a_command_names_its_options_at_once(place: Path) -> None:
    done = vlarl_quickly(["train", "--help"], place)
    assert (done.returncode, done.stderr) == (0, "")
    for option in ("--set", "--run-dir", "--resume", "--resume-from"):
        assert option in done.stdout


@pytest.mark.parametrize("command", ["train", "sft"])
def test_resume_auto_of_what_is_complete_says_so_and_is_no_failure(command: str, place: Path) -> None:
    run = {"train": "runs/done", "sft": "runs/fine_tuned"}[command]
    config = place / run / "config.yaml"
    before = config.read_text()
    config.write_text(before.replace("iterations: 10\n", "iterations: 5\n"))
    done, _ = vlarl([command, "--run-dir", run, "--resume", "auto"], place)
    config.write_text(before)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{run} has all its " in done.stdout and done.stdout.endswith("nothing is left to do\n")


def test_a_mistake_leaves_nothing_behind(place: Path) -> None:
    before = sorted(place.rglob("*"))
    for case in ("a wrong unnorm_key", "no checkpoint to start from", "an unknown preset"):
        vlarl(MISTAKES[case][0], place)
    assert sorted(place.rglob("*")) == before


def test_no_answer_loads_ray_or_torch(place: Path) -> None:
    code = (
        "import json, os, sys\n"
        "from vlarl_rllib.cli import main\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['vlarl', *arguments]\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as end:\n"
        "        assert end.code in (0, 2), (arguments, end.code)\n"
        "    loaded = {name.partition('.')[0] for name in sys.modules} & set(json.loads(os.environ['HEAVY']))\n"
        "    assert not loaded, (arguments, loaded)\n"
    )
    invocations = [["--help"], *(arguments for arguments, _ in MISTAKES.values())]
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(invocations)],
        cwd=place,
        env={**os.environ, "HEAVY": json.dumps(HEAVY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
