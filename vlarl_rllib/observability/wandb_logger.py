"""Runs on Weights & Biases, as one of Tune's loggers.

Ray's own logger hands RLlib's result on: some hundred numbers under RLlib's names, RLlib's fields as the config, a
trial's number as the run's id, so that a resumed run is another one. It knows neither films nor tables, waits up to
half an hour at the end, and puts the API key into a runtime environment, which Ray writes into logs. What would be left
of it is the queue to a process, which an actor's method calls are.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.tune.logger import LoggerCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vlarl_rllib.errors import one_line
from vlarl_rllib.observability.metrics import iteration_row
from vlarl_rllib.observability.wandb_run import WandbRun
from vlarl_rllib.process.lost_output import LOST
from vlarl_rllib.process.own_files import is_inside, replace_file
from vlarl_rllib.process.signals import END
from vlarl_rllib.rllib_compat import trial_path
from vlarl_rllib.settings.overrides import with_keys

logger = logging.getLogger(__name__)

ID_FILE = Path("wandb", "id.txt")
"""In a run's directory: what the run is called on W&B, for as long as the directory is there."""
MAX_NAME = 80
"""Characters of a run's name in its id; W&B takes 128."""
FINISH_SECONDS, HURRY_SECONDS = 60.0, 1.0
"""Of waiting for the last uploads, and where a signal has asked for the end."""


def wandb_logger(project: str, group: str | None = None) -> LoggerCallback:
    """Log every trial to W&B, each under its run directory's name.

    Args:
        project: on W&B.
        group: of several runs there, such as an experiment's name; None = in no group.
    """
    return WandbLogger(project, group)


class WandbLogger(LoggerCallback):
    """See `wandb_logger`. Nothing that W&B does, or does not do, ends a run."""

    def __init__(self, project: str, group: str | None) -> None:
        self._project, self._group = project, group
        self._actors: dict[Any, Any] = {}
        """By trial."""
        self._calls: list[Any] = []
        """Under way."""
        self._ending: dict[Any, Any] = {}
        """Actors by their last call."""
        self._told: set[str] = set()

    def __reduce__(self) -> Any:
        """Tune pickles its callbacks for `Tuner.restore`; processes and calls are not kept."""
        return WandbLogger, (self._project, self._group)

    def log_trial_start(self, trial: Any) -> None:
        if trial in self._actors:
            return
        run_dir = Path(trial.config.get("run_dir") or trial_path(trial))
        settings = with_keys(trial.config["vla"], trial.config.get("sampled", {}))
        options = {"project": self._project, "group": self._group, "name": run_dir.name, "id": run_id(run_dir)}
        variables = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        again = {"max_restarts": 3, "max_task_retries": 3}  # W&B drops a step that it has
        actor = ray.remote(num_cpus=0, scheduling_strategy=here, **again)(WandbRun)
        self._actors[trial] = actor.remote(str(run_dir), settings, options, variables)

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        if trial not in self._actors:
            self.log_trial_start(trial)
        if "vlarl_details" in result:
            self._calls.append(self._actors[trial].log.remote(iteration_row(result)))
        self._tell(0.0)

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        if actor := self._actors.pop(trial, None):
            self._ending[actor.finish.remote()] = actor

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        for trial in list(self._actors):
            self.log_trial_end(trial)
        self._tell(HURRY_SECONDS if END.signal else FINISH_SECONDS)
        if self._ending:
            logger.warning("W&B has not taken everything in time; send the rest with: wandb sync RUN_DIR/wandb/*run-*")

    def _tell(self, seconds: float) -> None:
        """Wait so long for calls to end, and say what is the matter, each thing once."""
        waiting = [*self._calls, *self._ending]
        done, left = ray.wait(waiting, num_returns=len(waiting), timeout=seconds) if waiting else ([], [])
        for call in done:
            try:
                trouble = ray.get(call)
            except RayError as error:
                trouble = f"the process that logs to W&B has died ({one_line(error)})"
            if trouble and trouble not in self._told:
                self._told.add(trouble)
                logger.warning("%s; the run goes on", trouble)
            if actor := self._ending.pop(call, None):
                ray.kill(actor)
        self._calls = [call for call in left if call not in self._ending]


def run_id(run_dir: Path) -> str:
    """What W&B calls the run in this directory: its name and eight digits of its own, since a name such as `smoke` is
    given again when the directory is gone, and a run is continued under its id."""
    file = run_dir / ID_FILE
    try:
        known = file.read_text().strip() if is_inside(file, run_dir) else ""
    except (OSError, UnicodeDecodeError):
        known = ""
    if re.fullmatch(r"[\w-]{1,128}", known, re.ASCII):
        return known
    new = f"{re.sub(r'[^A-Za-z0-9_-]+', '-', run_dir.name)[:MAX_NAME]}-{secrets.token_hex(4)}"
    with LOST.counting(str(ID_FILE)):
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, new)
    return new
