"""The small half of docs/quick_start_single_gpu.md, typed line by line."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pages import ROOT, blocks

(BLOCK,) = [block for block in blocks(ROOT / "docs" / "quick_start_single_gpu.md") if block.language == "sh"]
MINUTES = 10


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_line_does_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    rows = tmp_path / "runs" / "small" / "metrics.jsonl"
    for line in BLOCK.text.splitlines():
        began = time.monotonic()
        arguments = shlex.split(line, comments=True)
        command = subprocess.Popen(
            arguments, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        interrupted = "# Ctrl-C" in line
        while interrupted and not (rows.exists() and rows.read_text()):
            assert command.poll() is None and time.monotonic() - began < 60 * MINUTES
            time.sleep(0.2)
        if interrupted:
            command.send_signal(signal.SIGINT)
        output = command.communicate(timeout=60 * MINUTES)[0]
        print(f"{time.monotonic() - began:6.1f} s  {line}")
        assert command.returncode == (130 if interrupted else 0), f"{line}\n{output}"
    assert [json.loads(row)["iteration"] for row in rows.read_text().splitlines()] == [1, 2, 3, 4]
    for evaluation in ("before", "after", "exported"):
        episodes = (tmp_path / "runs" / evaluation / "episodes.jsonl").read_text().splitlines()
        assert len(episodes) == 4
    assert (tmp_path / "runs" / "small" / "report.html").exists()
    slower = [json.loads(row) for row in (tmp_path / "runs" / "slower" / "metrics.jsonl").read_text().splitlines()]
    assert slower and all(row["applied"]["lr"] == 5e-6 for row in slower)
    assert {file.name for file in (tmp_path / "exported").iterdir()} >= {"config.json", "tokenizer.json"}
