"""A whole run from a directory that is not to be trusted, with secrets in the environment, on a machine that others use too."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from vlarl_rllib.models.presets import write_checkpoint

CONFIG = """
env: {name: synthetic, tasks: [0, 1], num_envs: 2, num_processes: 1, models_per_process: 2, max_steps: 8}
rollout: {steps_per_iteration: 16}
engines: {num: 0}
learners: {num: 0, micro_batch_size: 16}
training: {minibatch_size: 16}
evaluation: {episodes: 0}
run: {iterations: 1, dashboard: false}
"""
DECOYS = (
    "numpy", "json", "torch", "safetensors", "yaml", "typer", "pydantic", "ray", "rich", "transformers", "socket", "logging", "typing", "psutil",
    "gymnasium", "numba", "mujoco", "PIL", "vllm", "tokenizers", "peft", "setproctitle", "pyarrow", "pandas", "matplotlib", "cloudpickle",
)  # fmt: skip
SECRETS = {"AWS_SECRET_ACCESS_KEY": "secret-of-aws", "AWS_SESSION_TOKEN": "token-of-aws", "HF_TOKEN": "token-of-hf", "WANDB_API_KEY": "key-of-wandb"}


def files_with_secrets(directory: Path) -> list[str]:
    return [
        str(file)
        for file in directory.rglob("*")
        if file.is_file() and not file.is_symlink() and any(secret.encode() in file.read_bytes() for secret in SECRETS.values())
    ]


def test_a_model_directory_runs_no_code_and_no_secret_is_written(tmp_path: Path) -> None:
    write_checkpoint("tiny", tmp_path)
    (tmp_path / "t.yaml").write_text(CONFIG)
    for name in DECOYS:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r} + ' ')\nraise ImportError({name!r})\n")
    with tempfile.TemporaryDirectory(dir="/tmp") as scratch:
        environment = {**os.environ, **SECRETS, "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": scratch}
        for name in ("RAY_ADDRESS", "PYTHONSAFEPATH"):
            environment.pop(name, None)
        command = [sys.executable, "-m", "vlarl_rllib", "train", "t.yaml", "--set", "model.path=.", "--run-dir", "run"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()

        private = Path(scratch, f"vlarl-{os.getuid()}")
        assert list(private.glob("ray/session_*/logs/*")), "Ray's session is not where it was to go"
        assert private.stat().st_mode & 0o777 == 0o700
        assert files_with_secrets(private) == []
    assert files_with_secrets(tmp_path / "run") == []
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["path"] == str(tmp_path)
