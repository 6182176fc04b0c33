"""One run on Weights & Biases, in a process of its own: logging in and uploading may take minutes, or fail."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlarl_rllib.envs.registry import task_instructions
from vlarl_rllib.errors import one_line
from vlarl_rllib.process.own_files import is_inside
from vlarl_rllib.settings.in_place import flat

INIT_SECONDS = 60.0
"""Of waiting for W&B's answer to a login, before what is logged goes to the disk alone."""
SERVICE = "WANDB_SERVICE"
"""Variable that leads to the W&B of a process further up, which would still hold the run of a process that has died."""
FLUSH_SECONDS = 1.0
"""Between writes to W&B's file: what a kill costs."""
LEFT_OUT = ("iteration", "initial_evaluation", "evaluation")
"""Keys of a row that are logged under other names, or not."""


class WandbRun:
    """The body of an actor. Its methods return a line about trouble, or None, and raise nothing.

    Args:
        run_dir: where W&B's files go, as `wandb/...`, and where films lie.
        settings: ours, nested: the run's config.
        options: of `wandb.init`.
        variables: of the environment, that W&B reads; the key is one.
    """

    def __init__(
        self, run_dir: str, settings: Mapping[str, Any], options: Mapping[str, Any], variables: Mapping[str, str]
    ) -> None:
        os.environ.update(variables)
        os.environ.pop(SERVICE, None)
        self._run_dir, self._settings, self._options = Path(run_dir), settings, options
        self._run: Any = None
        self._has_revision = False

    def log(self, row: Mapping[str, Any]) -> str | None:
        """An iteration's row of `metrics.jsonl`, with the films and the success by task of its evaluations."""
        try:
            trouble = self._begin()
            if row["initial_evaluation"]:
                self._run.log(self._evaluation(0, row["initial_evaluation"]), step=0, commit=True)
            if not self._has_revision:
                self._has_revision = True
                self._run.config.update({"git_revision": row["git_revision"]}, allow_val_change=True)
            numbers = dict(numbers_of(row))
            if row["evaluation"]:
                numbers |= self._evaluation(row["iteration"], row["evaluation"])
            self._run.log(numbers, step=row["iteration"], commit=True)
            return trouble
        except Exception as error:  # of whatever kind: it is not the run's
            return f"an iteration is not on W&B ({one_line(error)})"

    def finish(self) -> str | None:
        """Wait until everything is written, or sent."""
        try:
            if self._run is not None:
                import wandb

                self._run.finish()
                wandb.teardown()  # waits for the last writes, which `finish` does not
            return None
        except Exception as error:
            return f"the last of it is not on W&B ({one_line(error)})"

    def _begin(self) -> str | None:
        """Log in where that has not been done; where W&B does not answer, the files can be sent later."""
        if self._run is not None:
            return None
        import wandb

        options = {
            **self._options,
            "dir": str(self._run_dir),
            "resume": "allow",
            "config": self._settings,
            "settings": wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,  # of the working directory, which need not be ours
                save_code=False,
                symlink=False,
                x_disable_meta=True,
                init_timeout=INIT_SECONDS,
                x_transaction_log_flush_interval=FLUSH_SECONDS,
            ),
        }
        trouble = None
        try:
            self._run = wandb.init(**options)
        except Exception as error:
            wandb.teardown()  # its service takes the run to be in use
            self._run = wandb.init(**options, mode="offline")
            place = Path(self._run.dir).parent
            trouble = f"W&B does not take the run ({one_line(error)}); send it later with: wandb sync {place}"
        for link in self._run_dir.glob("wandb/*/logs/debug-core.log"):
            with contextlib.suppress(
                OSError
            ):  # it leads to W&B's own log in the home directory: --resume would refuse it
                link.unlink()
        return trouble

    def _evaluation(self, after: int, evaluation: Mapping[str, Any]) -> dict[str, Any]:
        import wandb

        rates = evaluation["success_rate_by_task"]
        names = self._task_names()
        table = wandb.Table(columns=["task", "instruction", "success_rate"])
        for task, rate in rates.items():
            table.add_data(int(task), names[int(task)] if int(task) < len(names) else f"task {task}", rate)
        found = {f"evaluation/{name}": evaluation[name] for name in ("success_rate", "episodes", "mean_length")}
        found |= {f"evaluation/success_rate_by_task/{task}": rate for task, rate in rates.items()}
        films = sorted((self._run_dir / "videos").glob(f"iteration_{after:06d}_*.mp4"))
        films = [film for film in films if is_inside(film, self._run_dir)]
        if films:
            found["evaluation/films"] = [wandb.Video(str(film), caption=film.stem, format="mp4") for film in films]
        return {**found, "evaluation/tasks": table}

    def _task_names(self) -> list[str]:
        env = self._settings["env"]
        try:
            return task_instructions(env["suite"], name=env["name"])
        except (ImportError, ValueError):
            return []


def numbers_of(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """A row's numbers by name, those of a dictionary as `seconds/sample`; what is null, or no number, is left out."""
    for key, value in flat({name: value for name, value in row.items() if name not in LEFT_OUT}):
        if isinstance(value, int | float):
            yield key.replace(".", "/"), value
