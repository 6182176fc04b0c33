"""`vlarl train` as a user runs it: killed, interrupted, resumed, in a directory that is not to be trusted, and what is
left behind."""

import itertools
import json
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_helpers import CONFIG, Command
from wandb_files import history_of, read_records, run_of

from vlarl_rllib.models.presets import write_checkpoint
from vlarl_rllib.rewards.classifier import ClassifierConfig, SuccessClassifier

DECOYS = (
    "__future__", "numpy", "json", "torch", "safetensors", "yaml", "typer", "pydantic", "ray", "rich", "transformers",
    "socket", "logging", "typing",
    "psutil", "gymnasium", "numba", "mujoco", "PIL", "vllm", "tokenizers", "peft", "setproctitle", "pyarrow", "pandas",
    "matplotlib", "cloudpickle",
    "wandb",
)  # fmt: skip
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "secret-of-aws", "AWS_SESSION_TOKEN": "token-of-aws", "HF_TOKEN": "token-of-hf",
    "WANDB_API_KEY": "a" * 20 + "7" * 20,
}  # fmt: skip


def files_with_secrets(directory: Path) -> list[str]:
    return [
        str(file)
        for file in directory.rglob("*")
        if file.is_file()
        and not file.is_symlink()
        and any(secret.encode() in file.read_bytes() for secret in SECRETS.values())
    ]


def make_model_with_decoys(directory: Path) -> None:
    """A model, and beside it modules called like those that a run imports, which leave a file `ran`."""
    write_checkpoint("tiny", directory)
    for name in DECOYS:
        (directory / f"{name}.py").write_text(
            f"open({str(directory / 'ran')!r}, 'a').write({name!r} + ' ')\nraise ImportError({name!r})\n"
        )


def steps_on_wandb(run: Path) -> list[dict[str, Any]]:
    return [step for file in run.glob("wandb/offline-run-*/*.wandb") for step in history_of(file)]


def assert_logged_to_wandb(run: Path) -> None:
    """The settings, the rows, and of the evaluation a table and films; offline, as far as a kill let it."""
    [file] = run.glob("wandb/offline-run-*/*.wandb")
    told, config = run_of(file)
    assert (told.run_id, told.display_name, told.project) == ((run / "wandb" / "id.txt").read_text(), "run", "test")
    assert config["env"]["max_steps"] == 8 and "num_env_runners" not in config
    evaluation, first, *_ = history_of(file)
    assert (evaluation["_step"], evaluation["evaluation/episodes"]) == (0, 2)
    assert (first["_step"], first["env_steps"]) == (1, 32) and first["seconds/sample"] > 0.0
    table = json.loads((file.parent / "files" / evaluation["evaluation/tasks/path"]).read_text())
    assert [row[0] for row in table["data"]] == [0, 1] and all(row[1] for row in table["data"])
    film = (file.parent / "files" / evaluation["evaluation/films/videos"][0]["path"]).read_bytes()
    assert film in [video.read_bytes() for video in run.glob("videos/*.mp4")]


def assert_continued_on_wandb(run: Path, rows: list[dict[str, Any]]) -> None:
    """One run there, resumed too; what was logged are the rows."""
    files = list(run.glob("wandb/offline-run-*/*.wandb"))
    told = [record.run for file in files for record in read_records(file) if record.WhichOneof("record_type") == "run"]
    assert len(told) >= 2, "of the run that was killed, and of the resumed one"
    assert {one.run_id for one in told} == {(run / "wandb" / "id.txt").read_text()}
    logged = [step for step in steps_on_wandb(run) if step["_step"]]
    assert logged and all(step["token_checksum"] == rows[step["_step"] - 1]["token_checksum"] for step in logged)


def killed_among_decoys(root: Path) -> Command:
    """A run that was killed, with everything of it gone; nothing that lay about ran, and no secret was written."""
    model = root / "model"
    model.mkdir()
    make_model_with_decoys(model)
    (model / "t.yaml").write_text(CONFIG)
    sets = ("model.path=.", "run.checkpoint_every=1", "run.wandb=test", "evaluation.episodes=2")
    options = [part for override in sets for part in ("--set", override)]
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as scratch:
        killed = Command(
            root, "train", "t.yaml", "--run-dir", str(root / "run"), *options, "--resume", "auto", cwd=model,
            variables={**SECRETS, "RAY_TMPDIR": scratch, "WANDB_MODE": "offline"},
        )  # fmt: skip
        killed.wait_until(lambda: len(killed.rows()) >= 3 and len(steps_on_wandb(killed.path)) >= 2)
        killed.process.kill()
        killed.process.wait()
        killed.leaves_nothing(60)  # of a killed driver
        assert not (model / "ran").exists(), (model / "ran").read_text()
        private = Path(scratch, f"vlarl-{os.getuid()}")
        assert list(private.glob("ray/session_*/logs/*")), "Ray's session is not where it was to go"
        assert private.stat().st_mode & 0o777 == 0o700
        assert files_with_secrets(private) == []
    assert files_with_secrets(killed.path) == []
    assert_logged_to_wandb(killed.path)
    assert yaml.safe_load((killed.path / "config.yaml").read_text())["model"]["path"] == str(model)
    return killed


@pytest.mark.timeout(600)
def test_a_run_survives_kills_and_ctrl_c_and_nothing_of_others_runs_or_reads_along(tmp_path: Path) -> None:
    """The model's directory, which the first command runs in, is somebody else's; others use this machine too."""
    killed = killed_among_decoys(tmp_path)
    before = killed.rows()

    resumed = Command(tmp_path, "train", "--resume", "--run-dir", str(killed.path), variables={"WANDB_MODE": "offline"})
    stale = resumed.trial()
    resumed.wait_until(lambda: resumed.trial() != stale and len(resumed.rows()) > len(before))
    seen = resumed.rows()
    os.kill(resumed.trial(), signal.SIGKILL)
    resumed.wait_until(
        lambda: (
            "it starts anew from its newest checkpoint" in resumed.output
            and resumed.rows()[-1]["faults"]["trial_restarts"]
        )
    )
    os.killpg(resumed.process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    assert resumed.end() == 130
    rows, output = resumed.rows(), resumed.output
    assert (
        "SIGINT: ending within 25 s" in output
        and f"stopped with a checkpoint of iteration {len(rows)}; continue" in output
    )
    assert f"--resume --run-dir {resumed.path}" in output
    assert resumed.newest() == resumed.summary()["iterations"] == len(rows)
    assert resumed.summary()["faults"]["trial_restarts"] == 1 and resumed.summary()["wall_seconds"] > 0
    assert [row["iteration"] for row in rows] == list(range(1, len(rows) + 1))
    assert [row["env_steps"] for row in rows] == [32 * row["iteration"] for row in rows]
    for played in (before, seen):  # what was played again came out the same
        assert [row["token_checksum"] for row in played] == [row["token_checksum"] for row in rows[: len(played)]]
    versions = [row["policy_version"] for row in rows]
    assert all(a < b for a, b in itertools.pairwise(versions)), versions
    assert_continued_on_wandb(resumed.path, rows)
    events = b"".join(file.read_bytes() for file in resumed.path.glob("trial_*/events.out.tfevents.*"))
    assert b"ray/tune/vlarl/approx_kl" in events and b"ray/tune/vlarl/seconds/sample" in events


@pytest.mark.timeout(600)
def test_the_smoke_config_on_real_libero_with_real_vllm_and_a_judge(tmp_path: Path) -> None:
    judge = tmp_path / "judge"
    SuccessClassifier(ClassifierConfig(28, ("bowl", "plate"))).save(judge)
    overrides = [
        "run.iterations=2",
        "rollout.steps_per_iteration=8",
        "training.minibatch_size=16",
        "env.max_steps=6",
        "run.dashboard=false",
    ]
    overrides += ["rewards.process=0.1", f"rewards.judge={judge}"]
    options = (part for override in overrides for part in ("--set", override))
    run = Command(tmp_path, "train", "configs/libero_smoke_cpu.yaml", "--run-dir", str(tmp_path / "run"), *options)
    assert run.end(500) == 0, run.output
    assert run.longest_silence("    1/2 ") < 10, run.output
    first, second = run.rows()
    assert first["policy_version"] < second["policy_version"]
    assert first["initial_evaluation"]["episodes"] == second["evaluation"]["episodes"] == 2
    assert first["approx_kl"] > 0.0 and max(row["first_ratio_deviation"] for row in (first, second)) < 1e-4
    summary = run.summary()
    told = [line for line in run.output.splitlines() if line.startswith("self-test")]
    assert [line.partition(":")[0] for line in told] == ["self-test", "self-test of updated weights"]
    assert all(line.endswith(": ok") for line in told) and summary["faults"]["failed_self_tests"] == 0
    assert (
        summary["env_steps"] == 64 and summary["engine"] == "vllm" and summary["versions"]["mujoco"].startswith("3.3.")
    )
    assert summary["faults"]["reward_zeros"] == summary["faults"]["reward_cpu_retries"] == 0, (
        "the reward worker was there from the start"
    )
    assert summary["success_rate_initial"] is not None and summary["success_rate_final"] is not None
