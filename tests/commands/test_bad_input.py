"""Configs, command lines, files and environments that cannot work: each is one line with the cause and a remedy, exit
code 2, and no Ray."""

import json
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from vlarl_rllib import cli
from vlarl_rllib.models.family import read_facts
from vlarl_rllib.models.presets import resolve_model
from vlarl_rllib.process.surroundings import (
    check_ray,
    check_wandb,
    keep_caches_where_they_can_be_written,
    user_directory,
)
from vlarl_rllib.runs.preflight import check_model
from vlarl_rllib.runs.sealing import seal
from vlarl_rllib.settings import SettingsError

GOOD = "env: {name: synthetic, num_envs: 2, num_processes: 1}\nengines: {num: 0}\nlearners: {num: 0}\n"
LONG = "x" * 80
CLOSED = "127.0.0.1:1"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a few files, and an environment in which a run could start."""
    files = {
        "good.yaml": GOOD,
        "twice.yaml": "run: {seed: 1}\nenv: {name: synthetic}\nrun: {iterations: 2}\n",
        "list.yaml": "- run\n",
        "deep.yaml": "run: " + "[" * 5000,
        "tag.yaml": "run: !!python/object/apply:os.system [ls]\n",
        "model/config.json": json.dumps({"model_type": "llama"}),
        "tiny/config.json": json.dumps({"model_type": "openvla"}),
        "someone/config.json": "{}",
        "runs/none_yet/config.yaml": GOOD,
        "damaged/pointer.json": json.dumps({"checkpoint": str(tmp_path / "gone")}),
        "half/facts.json": '{"iteration": 1',
        "dotted.yaml": "training.lr: 1.0e-4\n",
        "dotted_below.yaml": "model: {lora.rank: 4}\n",
        "sixty.yaml": "run: {iterations: 3:20}\n",
        "theirs/report.html": "<p>mine</p>",
        "mine/config.yaml": "# with my own words\n" + GOOD,
        "runs/linked/config.yaml": GOOD,
        "linked_again/checkpoints/notes": "",
        "step_000001/data.json": "{}",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "runs" / "linked" / "trial_a").symlink_to(tmp_path / "someone")
    (tmp_path / "linked_again" / "checkpoints" / "iteration_000001").symlink_to(tmp_path / "someone")
    seal(tmp_path / "step_000001")
    (tmp_path / "picture.yaml").write_bytes(b"\x89PNG\r\n\x1a\n\x00")
    monkeypatch.chdir(tmp_path)
    for name in (
        "RAY_ADDRESS",
        "RAY_TMPDIR",
        "TMPDIR",
        "WANDB_API_KEY",
        "WANDB_MODE",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
        "NETRC",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(psutil, "process_iter", lambda attributes: [])
    if "ray" in sys.modules:  # other tests may have started one in this process
        monkeypatch.setattr("ray.is_initialized", lambda: False)
    return tmp_path


def told(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command answers with, which also loads no Ray."""
    loaded = "ray" in sys.modules
    monkeypatch.setattr(sys, "argv", ["vlarl", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    written = capsys.readouterr()
    assert end.value.code == 2
    assert written.out == ""
    (line,) = written.err.splitlines()
    assert line.startswith("vlarl: ") and len(line) < 700
    assert ("ray" in sys.modules) == loaded
    return line


def of_key(key: str, value: object) -> list[str]:
    return ["train", "good.yaml", "--set", f"{key}={value}"]


MISTAKES: dict[str, tuple[list[str], str]] = {
    # Files
    "no file": (["train", "absent.yaml"], "absent.yaml: no such file; give the path"),
    "a directory": (["train", "model"], "model: is a directory; give the path of a YAML file in it"),
    "a picture": (["train", "picture.yaml"], "byte 0 is no UTF-8 text); give a YAML file"),
    "a list": (["train", "list.yaml"], "holds list, must hold sections such as `model:`"),
    "a section twice": (
        ["train", "twice.yaml"],
        "twice.yaml: not valid YAML (line 3: run stands here twice, first in line 1; keep one)",
    ),
    "5,000 brackets": (["train", "deep.yaml"], "more than 20 lists or sections in each other"),
    "a tag of Python": (["train", "tag.yaml"], "could not determine a constructor for the tag"),
    "a name too long": (["train", "x" * 300], "File name too long"),
    "a doctor's file": (["doctor", "twice.yaml"], "keep one"),
    # --set
    "an override without a value": (["train", "good.yaml", "--set", "run.seed"], "must read section.key=value"),
    "an override of nothing": (["train", "good.yaml", "--set", "=1"], "must read section.key=value"),
    "a key twice in an override": (
        of_key("run", "{seed: 1, seed: 2}"),
        "seed stands here twice, both in this line; keep one",
    ),
    "an alias in an override": (
        of_key("run.seed", "[&a 1, *a]"),
        "*a repeats another value, which is not supported; write it out",
    ),
    "brackets in an override": (of_key("run.seed", "[" * 5000), "more than 20 lists or sections"),
    "a tag in an override": (of_key("run.seed", "!!python/name:os.system"), "could not determine a constructor"),
    "a key without a name": (of_key("run.", "1"), "run.: unknown key; keys of run are"),
    "a key with a blank": (of_key("run.the seed", "1"), "run.the seed: unknown key; did you mean run.seed?"),
    "a key of another section": (of_key("run.lr", "1"), "run.lr: unknown key; did you mean"),
    # Values
    "a runner without CPUs": (
        of_key("rollout.cpus_per_runner", 0),
        "reserves nothing, and Ray places no process that reserves nothing; use at least",
    ),
    "an engine without CPUs": (
        ["train", "good.yaml", "--set", "engines={num: 1, cpus: 0}"],
        "engines.cpus: 0 reserves nothing, and Ray places no process that reserves nothing; use at least",
    ),
    "a learner without CPUs": (
        ["train", "good.yaml", "--set", "learners={num: 1, cpus: 0}"],
        "learners.cpus: 0 reserves nothing",
    ),
    "a share too small": (of_key("rollout.cpus_per_runner", 1e-9), "less than Ray can reserve; use at least 0.001"),
    "a GPU and a half": (
        ["train", "good.yaml", "--set", "engines={num: 1, gpus: 1.5}"],
        "engines.gpus: 1.5 is more than one GPU and not whole; use",
    ),
    "no slot": (of_key("env.num_envs", 0), "greater than or equal to 1"),
    "a billion slots": (of_key("env.num_envs", 10**9), "less than or equal to 1024"),
    "a billion tasks": (
        of_key("env.tasks", 10**9),
        "env.tasks: 1000000000 is more than the 4 tasks of synthetic; give fewer, or null",
    ),
    "a billion tasks to show": (of_key("collect.tasks", 10**9), "collect.tasks: 1000000000 is more than the 4 tasks"),
    "no task": (of_key("env.tasks", "[]"), "at least 1 item"),
    "a task twice": (of_key("env.tasks", "[0, 0]"), "names a task twice; list each once"),
    "no such task": (of_key("env.tasks", "[9]"), "9 is not a task of synthetic, whose tasks are 0 to 3"),
    "a seed beyond 32 bits": (of_key("run.seed", 10**12), "less than or equal to 1000000000"),
    "a time without end": (of_key("env.timeout_seconds", "1e300"), "less than or equal to 1000000"),
    "no time at all": (of_key("learners.timeout_seconds", "1e-300"), "greater than or equal to 0.01"),
    "a learning rate that lost its sign": (
        of_key("training.lr", "1e5"),
        "less than or equal to 1 (AdamW learning rate",
    ),
    "a reward beyond float32": (of_key("rewards.success", "1e308"), "less than or equal to 1000000"),
    "yes for a number": (of_key("training.lr", "yes"), "true and false are no value of this key"),
    "yes in a list": (of_key("env.tasks", "[yes]"), "true and false are no value of this key"),
    "a minibatch too large": (
        of_key("training.minibatch_size", 257),
        "more than the 256 steps of an iteration; lower it or raise",
    ),
    "a warm-up without an end": (
        ["train", "good.yaml", "--set", "sft={steps: 5, warmup_steps: 5}"],
        "use less than sft.steps = 5",
    ),
    "a frozen temperature": (of_key("rollout.temperature", 0.001), "greater than or equal to 0.01"),
    "half a kilobyte of value": (of_key("training.lr", "x" * 500), "valid number"),
    "a key with a dot in a file": (
        ["train", "dotted.yaml"],
        "training.lr: unknown key; nest it: training: {lr: ...}; keys with dots are for --set",
    ),
    "a key with a dot below a section": (
        ["train", "dotted_below.yaml"],
        "nest it: model: {lora: {rank: ...}}; keys with dots",
    ),
    # Paths and models
    "a number to the base of 60": (["train", "sixty.yaml"], "3:20 is a number to the base of 60 in YAML; write it out"),
    "no regular file": (["train", "/dev/null"], "/dev/null: is no regular file; give the path of a YAML file"),
    "an empty run directory's name": (["train", "good.yaml", "--run-dir", ""], "an empty path; give one"),
    "a directory with somebody's report": (["train", "good.yaml", "--run-dir", "theirs"], "holds a report.html that"),
    "a directory with somebody's config": (
        ["train", "good.yaml", "--run-dir", "mine"],
        "mine holds a config.yaml that is no run's",
    ),
    "a link out of a run": (
        ["train", "--resume", "--run-dir", "runs/linked"],
        "linked/trial_a is a link that leads out of ",
    ),
    "a link out of a run's checkpoints": (
        ["train", "good.yaml", "--run-dir", "linked_again"],
        "is a link that leads out of ",
    ),
    "a checkpoint of fine-tuning": (
        ["train", "good.yaml", "--resume-from", "step_000001"],
        "is a checkpoint of vlarl sft; set model.path to model/",
    ),
    "a file as a directory": (["make-checkpoint", "tiny", "good.yaml/x"], "Not a directory"),
    "a run that is none": (["eval", "runs/none", "--env", "synthetic"], "CHECKPOINT: no such run or directory '"),
    "a run for a model": (of_key("model.path", "runs/x"), "/runs/x'; presets are"),
    "a model beside others": (of_key("model.path", "someone/x"), "/someone/x'; presets are"),
    "a home that is nobody's": (of_key("model.path", "~nobody_of_that_name/x"), "model.path: no such directory '"),
    "a misspelt preset": (of_key("model.path", "tyni"), "'tyni' is no directory, preset or hub id; presets are tiny"),
    "another kind of model": (of_key("model.path", "model"), "must be 'openvla'; other policies are not supported"),
    "a directory named as a preset": (
        of_key("model.path", "./tiny"),
        "/tiny has no 'image_sizes'; give a whole checkpoint",
    ),
    "no judge": (["train", "good.yaml", "--set", "rewards={process: 1, judge: absent}"], "/absent has no config.json"),
    "an empty path": (of_key("model.path", "''"), "at least 1 character"),
    "a path with a NUL": (of_key("model.path", '"a/b/c\\0"'), "embedded null byte"),
    "no checkpoint behind the pointer": (["export", "damaged", "new"], "RUN_OR_CHECKPOINT: "),
    "half a checkpoint": (["export", "half", "new"], "RUN_OR_CHECKPOINT: "),
    "half a checkpoint to evaluate": (["eval", "half", "--env", "synthetic"], "CHECKPOINT: "),
    "a run directory in a file": (
        ["train", "good.yaml", "--run-dir", "good.yaml/x"],
        "cannot be made (Not a directory); give another directory",
    ),
    # The command line
    "no such command": (["tarin"], "Did you mean 'train'?"),
    "no such option": (["train", "good.yaml", "--run_dir", "x"], "--run-dir"),
    "no config": (["train"], "CONFIG: missing; give a YAML file"),
    "resuming nothing": (["train", "--resume"], "--resume: needs --run-dir"),
    "resuming a run without a checkpoint": (
        ["train", "--resume", "--run-dir", "runs/none_yet"],
        "no complete checkpoint",
    ),
    "no such task to evaluate": (
        ["eval", "tiny", "--env", "synthetic", "--tasks", "7"],
        "7 is not a task of synthetic, whose tasks are 0 to 3",
    ),
    "half a task": (["eval", "tiny", "--env", "synthetic", "--tasks", "0.5"], "must be task numbers with commas"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(
    case: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, phrase = MISTAKES[case]
    assert phrase in told(arguments, monkeypatch, capsys)


SURROUNDINGS: dict[str, tuple[dict[str, str], list[str], str]] = {
    "a dead cluster": (
        {"RAY_ADDRESS": CLOSED},
        [],
        f"RAY_ADDRESS: nothing answers at {CLOSED} (Connection refused); start that cluster, or unset",
    ),
    "no cluster": (
        {"RAY_ADDRESS": "auto"},
        [],
        "auto, but no Ray cluster runs on this machine; start one with `ray start --head`, or unset",
    ),
    "an address without a port": (
        {"RAY_ADDRESS": "10.0.0.1"},
        [],
        "RAY_ADDRESS: '10.0.0.1' is no address; give host:port",
    ),
    "a port too high": ({"RAY_ADDRESS": "10.0.0.1:99999"}, [], "is no address; give host:port"),
    "an address with a blank": ({"RAY_ADDRESS": "my head:6379"}, [], "is no address; give host:port"),
    "Ray Client": (
        {"RAY_ADDRESS": "ray://10.0.0.1:10001"},
        [],
        "is an address of Ray Client, which signals and progress do not pass; run vlarl on",
    ),
    "another auth mode": (
        {"RAY_AUTH_MODE": "password"},
        [],
        "RAY_AUTH_MODE: 'password' does not exist; choose token or disabled",
    ),
    "no token for a cluster": (
        {"RAY_AUTH_MODE": "token", "RAY_ADDRESS": CLOSED},
        [],
        "token, but there is none; set RAY_AUTH_TOKEN or",
    ),
    "a token file that is none": (
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "absent"},
        [],
        "RAY_AUTH_TOKEN_PATH: absent holds no token",
    ),
    "a long directory": ({"RAY_TMPDIR": "/" + LONG}, [], "is too long: Ray's sockets would have paths of "),
    "no directory": (
        {"RAY_TMPDIR": "/proc/absent"},
        [],
        "RAY_TMPDIR: /proc/absent cannot be written to (No such file or directory); set RAY_TMPDIR",
    ),
    "a file for a directory": ({"RAY_TMPDIR": "/dev/null"}, [], "cannot be written to (Not a directory)"),
    "no login": (
        {},
        ["--set", "run.wandb=project"],
        "there is no login to api.wandb.ai; run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE",
    ),
    "no GPU": ({}, ["--set", "learners.gpus=1"], "this machine shows none; set them to 0 to run on the CPU"),
}


@pytest.mark.parametrize("case", SURROUNDINGS)
def test_surroundings_without_a_way_to_run(
    case: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment, options, phrase = SURROUNDINGS[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert phrase in told(["train", "good.yaml", "--run-dir", "runs/new", *options], monkeypatch, capsys)
    assert not (place / "runs" / "new").exists()


def test_a_cluster_that_has_gone(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(place))
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    (place / "ray").mkdir()
    (place / "ray" / "ray_current_cluster").write_text(CLOSED)
    assert f"auto means the cluster at {CLOSED}" in told(["train", "good.yaml"], monkeypatch, capsys)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with a name that Ray's sockets fit behind, which pytest's own are too long for; TMPDIR for the
    test."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        monkeypatch.setenv("TMPDIR", directory)
        yield Path(directory)


def test_somebody_elses_directory(
    place: Path, short: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    os.symlink("/tmp", short / f"vlarl-{os.getuid()}")
    monkeypatch.setenv("RAY_TMPDIR", str(short))
    assert "belongs to somebody else; set RAY_TMPDIR" in told(["train", "good.yaml"], monkeypatch, capsys)


def test_a_full_disk(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "runs/new/config.yaml")

    monkeypatch.setattr("vlarl_rllib.runs.directory.replace_file", refuse)
    line = told(["train", "good.yaml", "--run-dir", "runs/new"], monkeypatch, capsys)
    assert "runs/new/config.yaml: No space left on device; make room, or give another path" in line


def test_too_little_shared_memory(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: type("Usage", (), {"free": 64e6 if path == "/dev/shm" else 1e12})
    )
    assert "/dev/shm: 64 MB are left, and Ray's object store needs 100 MB; make room, or raise its size" in told(
        ["train", "good.yaml"], monkeypatch, capsys
    )


def test_a_full_disk_for_ray(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 5e6}))
    assert "has 5 MB left, and Ray needs 100 MB; set RAY_TMPDIR" in told(["train", "good.yaml"], monkeypatch, capsys)


@pytest.mark.parametrize(
    ("problem", "phrase"),
    [
        ("GatedRepoError", "model.path: nobody/else: is gated; accept its terms on the hub, and log in"),
        (
            "RepositoryNotFoundError",
            "model.path: nobody/else: is not on the hub, or private; check the name, or log in",
        ),
    ],
)
def test_what_the_hub_refuses(problem: str, phrase: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    def refuse(checkpoint: str, family: str | None) -> None:
        error = getattr(errors, problem)
        raise error.__new__(error)

    monkeypatch.setattr("vlarl_rllib.runs.preflight.read_facts", refuse)
    monkeypatch.setattr("vlarl_rllib.process.surroundings.unreachable", lambda host, port: None)
    with pytest.raises(SettingsError, match=f"^{phrase}"):
        check_model("nobody/else", "libero_spatial")


def test_a_hub_that_is_not_reached_is_not_asked(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(checkpoint: str, family: str | None) -> None:
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        raise FileNotFoundError(f"{checkpoint}: is not in the local cache")

    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setenv("HF_ENDPOINT", f"http://{CLOSED}")
    monkeypatch.delenv("HTTP_PROXY", raising=False)
    monkeypatch.delenv("http_proxy", raising=False)
    monkeypatch.setattr("vlarl_rllib.runs.preflight.read_facts", read)
    with pytest.raises(SettingsError, match=r"^model.path: nobody/else: is not in the local cache"):
        check_model("nobody/else", "libero_spatial")


def test_a_login_is_found_in_all_its_places(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="no login"):
        check_wandb("project")
    (place / ".netrc").write_text("machine api.wandb.ai login user password 0123\n")
    (place / ".netrc").chmod(0o600)
    check_wandb("project")
    (place / ".netrc").unlink()
    for name, value in (("WANDB_API_KEY", "0123"), ("WANDB_MODE", "offline"), ("WANDB_MODE", "disabled")):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            check_wandb("project")


def test_what_takes_connections_is_taken_for_a_cluster_so_far(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        check_ray()


def test_ray_gets_a_short_private_directory(place: Path, short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = short / f"vlarl-{os.getuid()}"
    directory.mkdir(mode=0o755)
    assert user_directory() == directory
    assert directory.stat().st_mode & 0o777 == 0o700
    for unfit in (f"/tmp/{LONG}", "/proc/absent"):  # usual under Slurm
        monkeypatch.setenv("TMPDIR", unfit)
        assert user_directory() == Path("/tmp", f"vlarl-{os.getuid()}")


def test_a_home_that_takes_no_files_is_done_without(place: Path, short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/proc/absent")
    path = resolve_model("tiny")
    assert path.startswith(f"{short}/vlarl-") and read_facts(path).image_size == 28
    for name in ("NUMBA_CACHE_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    keep_caches_where_they_can_be_written()
    assert os.environ["NUMBA_CACHE_DIR"].startswith(str(short)) and os.environ["MPLCONFIGDIR"].startswith(str(short))
