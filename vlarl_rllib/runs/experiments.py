"""The directory of a Tune experiment, looked at before Ray starts.

runs/NAME/experiment.yaml   the experiment with its config, complete
          ranking.json      every sample with the mean over its seeds; ranking.csv has a row for each trial
          000_lr_1e-05/     a trial: the directory of a run
          tuner.pkl ...     Tune's state, for --restore
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from pathlib import Path

from vlarl_rllib.process.own_files import refuse_links
from vlarl_rllib.runs.directory import WRITTEN
from vlarl_rllib.settings import SettingsError
from vlarl_rllib.settings.experiment import Experiment

logger = logging.getLogger(__name__)

EXPERIMENT_FILE = "experiment.yaml"
STATE_FILE = "tuner.pkl"
"""Tune's, a pickle."""
TRIALS_FILES = "experiment_state-*.json"
"""Tune's, one of each start: what has become of the trials."""


def new_experiment(path: Path) -> Path:
    """Where a new experiment goes. Raises `SettingsError` where that holds one, or a run, already."""
    directory = path.resolve()
    refuse_links(directory, "--run-dir")
    if any(directory.glob(TRIALS_FILES)):  # one that was killed before may be started again in place
        raise SettingsError(
            f"--run-dir: {path} holds an experiment already; go on with it by --restore, or give another directory"
        )
    for name in WRITTEN:
        if (directory / name).exists():
            raise SettingsError(f"--run-dir: {path} holds a {name}, which is another's; give another directory")
    return directory


def open_experiment(path: Path) -> tuple[Path, Experiment]:
    """The directory of an experiment to be gone on with, and the experiment.

    Tune's state of it is a pickle, which runs code when it is read: so it must be this user's own.

    Raises:
        SettingsError: there is none, or it is somebody else's.
    """
    directory = path.resolve()
    for name in (EXPERIMENT_FILE, STATE_FILE, TRIALS_FILES):
        if not any(directory.glob(name)):
            raise SettingsError(
                f"--run-dir: {path} holds no experiment that was begun ({name} is missing); start it anew, or give its "
                "directory"
            )
    for file in (directory, directory / STATE_FILE):
        if file.stat().st_uid != os.getuid():
            raise SettingsError(
                f"--restore: {file} belongs to another user, and reading Tune's state runs what is in it; start the "
                "experiment anew"
            )
    refuse_links(directory, "--run-dir")
    _pass_over_cut_files(directory)
    return directory, Experiment.from_yaml(directory / EXPERIMENT_FILE)


def _pass_over_cut_files(directory: Path) -> None:
    """Have Tune take an older state where a kill has cut the newest while it was written.

    Raises `SettingsError` where none is whole.
    """
    for file in sorted(directory.glob(TRIALS_FILES), reverse=True):
        try:
            json.loads(file.read_bytes())
        except ValueError:
            logger.warning("%s is damaged; an older state is taken", file.name)
            file.rename(file.with_suffix(".damaged"))
        else:
            return
    raise SettingsError(
        f"--restore: {directory} has no whole {TRIALS_FILES} any more; start the experiment anew in another directory"
    )


def check_searcher(experiment: Experiment) -> None:
    """Raise `SettingsError` where what draws the samples is not installed."""
    if experiment.spec.sampler == "optuna" and importlib.util.find_spec("optuna") is None:
        raise SettingsError("sampler: optuna is not installed; pip install optuna, or use random")
