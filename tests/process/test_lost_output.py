"""Where output cannot be written, it is lost and counted, and the work goes on."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.tune.execution import tune_controller
from ray.tune.experiment import Trial

from vlarl_rllib.process.lost_output import LOST, keep_trying
from vlarl_rllib.rllib_compat import tolerant_tune
from vlarl_rllib.rollout.video import keep_videos
from vlarl_rllib.runs import tune_output
from vlarl_rllib.types import EpisodeResult

CODE = """
import os, sys, time
from vlarl_rllib.process.console import make_console
from vlarl_rllib.process.lost_output import LOST, tolerate_lost_readers
tolerate_lost_readers()
console = make_console()
for i in range(200):
    console.print(f"line {i}")
    print("to the other", file=sys.stderr)
    time.sleep(0.002)
open(sys.argv[1], "w").write(str(LOST.count))
"""


@pytest.mark.parametrize("redirection", ["| head -2", "> /dev/full", "2>/dev/full >&2", ">&- 2>&-"])
def test_who_prints_learns_nothing_of_a_reader_that_has_gone(redirection: str, tmp_path: Path) -> None:
    (tmp_path / "print.py").write_text(CODE)
    command = f"set -o pipefail; {sys.executable} {tmp_path}/print.py {tmp_path}/lost {redirection}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and "Error" not in done.stderr
    assert int((tmp_path / "lost").read_text()) > 0 or redirection == ">&- 2>&-"


def no_space(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_last_writes_are_tried_again_for_a_while() -> None:
    outcomes: list[Callable[[], None]] = [lambda: None, no_space, no_space]
    assert keep_trying(lambda: outcomes.pop()(), seconds=5.0) is None and outcomes == []
    error = keep_trying(no_space, seconds=0.0)
    assert error is not None and error.errno == errno.ENOSPC


def test_half_a_film_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_half(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:2])
        no_space()
        return 0

    results = [EpisodeResult(0, start, 3, True, 1.0, b"film") for start in range(2)]
    before = LOST.count
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_half)
        keep_videos(tmp_path / "videos", 1, results)
    assert LOST.count == before + 2 and list((tmp_path / "videos").iterdir()) == []
    keep_videos(tmp_path / "videos", 1, results)
    assert len(list((tmp_path / "videos").iterdir())) == 2


class FakeTrial:
    """As much of a trial as Tune's loggers ask for."""

    evaluated_params: dict[str, Any] = {}  # noqa: RUF012
    config: dict[str, Any] = {}  # noqa: RUF012
    checkpoint = None

    def __init__(self, directory: Path) -> None:
        self.local_path = str(directory)
        self.storage = type("Storage", (), {"trial_fs_path": str(directory), "storage_filesystem": None})

    def init_local_path(self) -> None:
        Path(self.local_path).mkdir(exist_ok=True)


LOGGERS = """
import resource, signal, sys, time
from pathlib import Path
from test_lost_output import FakeTrial
from vlarl_rllib.process.lost_output import LOST
from vlarl_rllib.runs.tune_output import loggers
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
trial, losses = FakeTrial(Path(sys.argv[1])), []
for logger in loggers():
    def log(i):
        many = {f"metric_{n}": 1.5 for n in range(400)}
        logger.log_trial_result(i, trial, {"training_iteration": i, "config": {}, **many})
    before = LOST.count
    logger.log_trial_start(trial)
    log(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, -1))  # a longer file fails, as on a full disk
    for i in range(2, 5):
        log(i)
        time.sleep(0.2)  # for TensorBoard's thread
    losses.append(LOST.count - before)
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    log(5)
    logger.log_trial_end(trial)
assert all(losses), losses
"""


def test_tunes_loggers_lose_what_does_not_fit_and_go_on(tmp_path: Path) -> None:
    """In a process of its own, which also has to end: a queue that nobody reads keeps a process alive."""
    command = [sys.executable, "-c", LOGGERS, str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert done.returncode == 0, done.stderr
    assert '"training_iteration": 5' in (tmp_path / "result.json").read_text().splitlines()[-1]


def test_a_dead_thread_of_tensorboards_writer_is_replaced(tmp_path: Path) -> None:
    logger, trial, before = tune_output.TolerantTensorBoard(), FakeTrial(tmp_path), LOST.count

    def writer() -> Any:
        return logger._trial_writer[trial].file_writer.event_writer

    logger.log_trial_start(trial)
    writer()._worker.stop()
    logger.log_trial_result(1, trial, {"training_iteration": 1, "metric": 1.5})
    assert LOST.count == before + 1 and writer()._worker.is_alive()
    logger.log_trial_end(trial)


def test_a_trials_error_is_known_where_tune_cannot_write_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trial, "handle_error", no_space)
    told: list[Any] = []
    with tolerant_tune(lambda trial, error: told.append(error)):
        Trial.handle_error(None, ValueError("boom"))  # type: ignore[arg-type]
    assert [str(error) for error in told] == ["boom"]


def test_snapshots_of_the_experiment_may_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Syncer:
        def sync_up(self, *args: Any) -> bool:
            return True

        def wait(self) -> None:
            return

    class Storage:
        experiment_driver_staging_path = experiment_fs_path = str(tmp_path)
        syncer = Syncer()

    with tolerant_tune(print):
        snapshots = tune_controller._ExperimentCheckpointManager(storage=Storage(), checkpoint_period="auto")  # type: ignore[arg-type]
    before = LOST.count
    snapshots.sync_up_experiment_state(no_space, force=True)
    assert LOST.count == before + 1


NON_BLOCKING = """
import os, sys, time
from vlarl_rllib.process.lost_output import LOST, tolerate_lost_readers
os.set_blocking(1, False)
tolerate_lost_readers()
began = time.process_time()
for i in range(300):
    print("x" * 1000)
sys.stderr.write(f"{LOST.count} {time.process_time() - began}")
"""


def test_a_full_pipe_that_does_not_block_loses_lines() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", NON_BLOCKING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        lost, seconds = process.stderr.read().split()
        process.kill()
    assert int(lost) > 0 and float(seconds) < 1.0
