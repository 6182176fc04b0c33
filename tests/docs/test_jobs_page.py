"""What docs/jobs.md tells to type. A head to submit to, and the whole way: tests/e2e/test_jobs.py."""

import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vlarl_rllib.cli import main
from vlarl_rllib.commands import jobs, submit, train

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "docs/jobs.md").read_text(), re.DOTALL | re.MULTILINE)
WAITS = "echo began\nwhile sleep 0.1; do :; done"
EXAMPLES = {"CONFIG": "configs/libero_smoke_cpu.yaml", "JOB": "job-20260101-000000", "$PWD": str(ROOT)}


def commands() -> Iterator[list[str]]:
    """Those of ours, with the placeholders filled in."""
    for kind, text in BLOCKS:
        for line in [] if kind else text.splitlines():
            for name, value in EXAMPLES.items():
                line = line.replace(name, value)
            words = shlex.split(line.partition("   ")[0])
            if words[0].removeprefix(".venv/bin/") == "vlarl":
                yield words[1:]


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_each_command_does_what_it_is_for(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    class Cluster:
        def __init__(self, address: str) -> None:
            assert address.startswith("http://")

        def __getattr__(self, name: str) -> Any:
            return lambda job: asked.append(f"{name} {job}") or 0

    monkeypatch.setattr(jobs, "Cluster", Cluster)
    monkeypatch.setattr(jobs, "list_jobs", lambda address: asked.append("list") or 0)
    monkeypatch.setattr(submit, "submit", lambda settings, what, address: asked.append(what.entrypoint) or 0)
    monkeypatch.setattr(train, "run_training", lambda settings, run, resume_from: asked.append(str(run.path)) or 0)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    arguments = [str(tmp_path / "run") if word == "DIRECTORY" else word for word in arguments]
    monkeypatch.setattr(sys, "argv", ["vlarl", *arguments])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0 and len(asked) == 1


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (0, False)])
def test_the_slurm_script_passes_the_warning_on_and_asks_for_another_turn(
    code: int, requeued: bool, tmp_path: Path
) -> None:
    """With a run that takes a second to end, and a Slurm that is a file."""
    (script,) = (text for kind, text in BLOCKS if kind == "bash")
    programs = {
        ".venv/bin/vlarl": f"trap 'sleep 1; echo checkpoint; exit {code}' USR1\n{WAITS}",
        "scontrol": "echo scontrol $*",
    }
    for name, text in programs.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(0o700)
    (tmp_path / "job.sh").write_text(script)
    job = subprocess.Popen(
        ["bash", "job.sh"], cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "42"},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert job.stdout is not None and job.stdout.readline() == "began\n"
    time.sleep(0.2)
    job.send_signal(signal.SIGUSR1)  # to the batch script alone, as `B:` says
    output, _ = job.communicate(timeout=20)
    assert output == "checkpoint\n" + ("scontrol requeue 42\n" if requeued else "") and job.returncode == code
