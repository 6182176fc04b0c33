"""How commands end: by signals in every phase, with Ray or the trial gone, and without anybody or anything to write
to."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_helpers import CONFIG, Command


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Starts `vlarl train`; whatever is left of it is killed."""
    (tmp_path / "t.yaml").write_text(CONFIG)
    commands: list[Command] = []

    def start(*overrides: str, root: Path = tmp_path, **options: Any) -> Command:
        sets = (part for override in overrides for part in ("--set", override))
        commands.append(
            Command(root, "train", str(tmp_path / "t.yaml"), "--run-dir", str(root / "run"), *sets, **options)
        )
        return commands[-1]

    yield start
    for command in commands:
        for process in command.processes():
            process.kill()
        command.process.wait()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "vlarl-test", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("a small disk to fill cannot be mounted here: that needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    free = os.statvfs(disk)
    with (disk / "fill").open("wb") as file:
        file.write(bytes(free.f_bavail * free.f_frsize - leave))
    return disk / "fill"


def test_neither_a_lost_reader_nor_a_full_disk_nor_a_closed_terminal_costs_an_iteration(
    train: Callable[..., Command], small_disk: Path
) -> None:
    run = train("run.checkpoint_every=2", root=small_disk, stdout=subprocess.PIPE)
    assert run.process.stdout is not None
    run.process.stdout.readline()
    run.process.stdout.close()  # `| head -1`
    run.wait_until(lambda: len(run.rows()) >= 3)
    filled = fill(small_disk)
    time.sleep(5)
    assert run.process.poll() is None and len(run.rows()) < 20
    filled.unlink()
    before = len(run.rows())
    run.wait_until(lambda: len(run.rows()) > before + 2)
    os.killpg(run.process.pid, signal.SIGHUP)  # a terminal sends it to all that it runs
    assert run.end() == 0
    iterations = [row["iteration"] for row in run.rows()]
    assert iterations == list(range(1, len(iterations) + 1)) and run.newest() == run.summary()["iterations"] == len(
        iterations
    )
    faults = run.summary()["faults"]
    assert (
        faults["failed_checkpoints"] >= 1
        and faults["lost_output"] >= 3
        and faults["trial_restarts"] == faults["repeated_iterations"] == 0
    )


@pytest.mark.slow
def test_a_dead_raylet_ends_the_run_with_the_way_on(train: Callable[..., Command]) -> None:
    run = train("run.checkpoint_every=1")
    run.wait_until(lambda: len(run.rows()) >= 2)
    raylet = run.child("raylet")
    raylet.kill()
    assert run.end() == 1
    last = run.output.splitlines()[-1]
    assert last.startswith(
        f"Ray has ended: its raylet (process {raylet.pid}) died; continue from iteration {run.newest()} with: "
        "vlarl train"
    )
    assert run.summary()["iterations"] == len(run.rows()) and "raylet" in (run.path / "error.txt").read_text()


def test_sigterm_to_the_whole_group_while_ray_starts_has_its_word(train: Callable[..., Command]) -> None:
    """As `timeout` and service managers send it: Ray's processes must not end before the command has ended them."""
    run = train()
    run.wait_until(lambda: any(child.name() == "gcs_server" for child in psutil.Process(run.process.pid).children()))
    os.killpg(run.process.pid, signal.SIGTERM)
    assert run.end() == 0
    last = "stopped; nothing was finished yet that could be kept: start again with the same command"
    assert run.output.splitlines()[-1] == last and "Traceback" not in run.output


# The other phases take a run each.


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.4, 1.5, 5.0, 7.0, 9.0, 12.0, 15.0, 18.0])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_no_early_signal_is_lost(
    train: Callable[..., Command], seconds: float, number: signal.Signals, code: int
) -> None:
    run = train()
    time.sleep(seconds)
    run.process.send_signal(number)
    assert run.end() == code
    assert run.output.splitlines()[-1].startswith(("stopped", "report:")) and "Traceback" not in run.output


@pytest.mark.slow
def test_a_frozen_trial_starts_anew(train: Callable[..., Command]) -> None:
    run = train("run.iterations=8")
    run.wait_until(lambda: len(run.rows()) >= 6)
    os.kill(run.trial(), signal.SIGSTOP)
    frozen = time.monotonic()
    run.wait_until(lambda: "gave no sign of life for 45 s" in run.output)
    assert time.monotonic() - frozen < 60
    assert run.end(120) == 0 and run.summary()["faults"]["trial_restarts"] == 1 and len(run.rows()) == 8


@pytest.mark.slow
def test_ray_job_stop_leaves_a_checkpoint(train: Callable[..., Command]) -> None:
    run = train("rollout.steps_per_iteration=200", "run.checkpoint_every=100")
    run.wait_until(lambda: len(run.rows()) >= 2)
    time.sleep(1.0)
    run.process.terminate()
    time.sleep(3.0)  # RAY_JOB_STOP_WAIT_TIME_S
    run.process.kill()
    run.process.wait()
    assert run.newest() == len(run.rows()) == 2
    assert f"continue from iteration 2 with: vlarl train --resume --run-dir {run.path}" in run.output


@pytest.mark.slow
def test_an_update_that_takes_too_long_is_given_up(train: Callable[..., Command]) -> None:
    run = train("run.stop_seconds=1", "training.num_epochs=300")
    run.wait_until(lambda: len(run.rows()) >= 1)
    time.sleep(4.0)
    run.process.terminate()
    assert run.end() == 0
    assert "iteration 1 has no checkpoint: a resumed run plays" in run.output and run.newest() == 0


@pytest.mark.slow
def test_a_second_signal_ends_at_once_and_leaves_nothing(train: Callable[..., Command]) -> None:
    run = train()
    run.wait_until(lambda: len(run.rows()) >= 6)
    run.process.terminate()
    time.sleep(0.3)
    run.process.terminate()
    assert run.end(2.0) == 0 and "SIGTERM again: ended at once; continue from iteration" in run.output


@pytest.mark.slow
def test_a_disk_that_stays_full_is_told_at_the_end(train: Callable[..., Command], small_disk: Path) -> None:
    """stdout is on another one, where it can be read."""
    output = (small_disk.parent / "output.txt").open("w")
    run = train("run.iterations=40", "run.checkpoint_every=2", root=small_disk, stdout=output)
    run.wait_until(lambda: len(run.rows()) >= 3)
    fill(small_disk)
    assert run.end(180) == 1
    text = Path(output.name).read_text()
    assert "40/40" in text and "could not be written" in text and "continue from iteration" in text
