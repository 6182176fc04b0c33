"""What `vlarl train` says at its end, and the exit code."""

import io
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from vlarl_rllib.commands.train import _finish
from vlarl_rllib.process.signals import END
from vlarl_rllib.runs.directory import RowLog, RunDirectory
from vlarl_rllib.settings import Settings

RESUME = "--resume --run-dir"


@pytest.fixture(autouse=True)
def _nothing_asked() -> Iterator[None]:
    END._reset()
    yield
    END._reset()


@pytest.mark.parametrize(
    ("number", "done", "kept", "abandoned", "code", "said"),
    [
        (None, 9, 9, False, 0, ("done: ",)),
        (
            None,
            8,
            5,
            False,
            1,
            ("iteration 8 has no checkpoint (writing it failed), the newest is of iteration 5", RESUME),
        ),
        (
            signal.SIGINT,
            4,
            4,
            False,
            130,
            ("stopped with a checkpoint of iteration 4; continue from iteration 4 with: vlarl train", RESUME),
        ),
        (signal.SIGTERM, 4, 4, False, 0, ("stopped with a checkpoint of iteration 4", RESUME)),
        (signal.SIGTERM, 4, 3, False, 1, ("writing it failed", RESUME)),
        (
            signal.SIGTERM,
            4,
            3,
            True,
            0,
            ("iteration 4 has no checkpoint: a resumed run plays them again", "continue from iteration 3", RESUME),
        ),
        (signal.SIGTERM, 4, 0, True, 0, ("iterations 1 to 4 have no checkpoint", "start again with the same command")),
        (signal.SIGTERM, 0, 0, True, 0, ("stopped; nothing was finished yet",)),
        (
            signal.SIGTERM,
            9,
            9,
            False,
            0,
            ("stopped behind the last iteration; its evaluation was dropped: vlarl eval", "--env synthetic"),
        ),
    ],
)
def test_the_last_words_and_the_exit_code(
    tmp_path: Path,
    number: signal.Signals | None,
    done: int,
    kept: int,
    abandoned: bool,
    code: int,
    said: tuple[str, ...],
) -> None:
    run, console = RunDirectory(tmp_path), Console(file=io.StringIO(), width=500)
    log = RowLog(run)
    log.rows = [{"iteration": iteration, "evaluation": None} for iteration in range(1, done + 1)]
    if kept:
        with run.checkpoints().writing(kept):
            pass
    settings = Settings.from_dict({"env": {"name": "synthetic"}, "run": {"iterations": 9}})
    END.signal, END.sigterm_code = number, 0
    assert _finish(settings, run, log, abandoned, console) == code
    text = console.file.getvalue()
    assert all(part in text for part in said), text
