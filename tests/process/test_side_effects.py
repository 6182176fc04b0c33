"""A script or notebook that imports this package keeps its environment variables and log levels, and what others see of
Ray and Tune."""

import json
import logging
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from ray.tune import tune as tune_module
from ray.tune.execution import class_cache

from vlarl_rllib.process.environment import environment_defaults
from vlarl_rllib.rllib_compat import tolerant_tune

ROOT = Path(__file__).parents[2]
REPORT = """
import json, logging, os, sys
known = {name: logger for name, logger in logging.Logger.manager.loggerDict.items() if hasattr(logger, "filters")}
levels = {name: [logger.level, len(logger.filters)] for name, logger in known.items() if logger.level or logger.filters}
loaded = [name for name in ("tensorflow", "jax", "ray.rllib") if name in sys.modules]
print(json.dumps({"environment": dict(os.environ), "levels": levels, "root": logging.root.level, "loaded": loaded}))
"""
DEPENDENCIES = "import torch._inductor.codecache, transformers, ray.tune, ray.rllib.algorithms.ppo"
OURS = """
from vlarl_rllib import VLAPPO, VLAPPOConfig
VLAPPOConfig.from_yaml("configs/quickstart.yaml").validate()
"""
ENTRIES = (
    "vlarl_rllib.config", "vlarl_rllib.algorithm", "vlarl_rllib.rollout.env_runner", "vlarl_rllib.learner.learner",
    "vlarl_rllib.evaluation.workers", "vlarl_rllib.commands.train", "vlarl_rllib.commands.sft",
    "vlarl_rllib.commands.quickstart",
)  # fmt: skip
"""What a script, a command or an actor imports first."""
FIRST_IMPORT_OF_RLLIB = """
import importlib, os, sys
import ray, torch

class Finder:
    def find_spec(self, name, *where):
        if name == "ray.rllib":
            os._exit(0 if {"RLLIB_TEST_NO_TF_IMPORT", "RLLIB_TEST_NO_JAX_IMPORT"} <= os.environ.keys() else 1)

for entry in ENTRIES:
    if not (pid := os.fork()):
        sys.meta_path.insert(0, Finder())
        importlib.import_module(entry)
        os._exit(2)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0, (entry, {1: "imports RLlib with TensorFlow", 2: "imports no RLlib"}.get(code, code))
"""
TORCH_ALONE = {"RLLIB_TEST_NO_TF_IMPORT", "RLLIB_TEST_NO_JAX_IMPORT"}


def state_after(program: str, **environment: str) -> dict[str, Any]:
    given = {name: value for name, value in os.environ.items() if name not in TORCH_ALONE}
    done = subprocess.run(
        [sys.executable, "-c", program + REPORT],
        cwd=ROOT,
        env=given | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    state = json.loads(done.stdout.splitlines()[-1])
    for name in TORCH_ALONE & environment.keys():
        del state["environment"][name]
    return state


def test_a_script_that_builds_a_config_keeps_its_environment_and_log_levels() -> None:
    """What torch, transformers and RLlib do to them by themselves is theirs; TensorFlow is not for RLlib to import and
    to set up."""
    with ThreadPoolExecutor(2) as together:
        with_us = together.submit(state_after, OURS + DEPENDENCIES)
        without_us = together.submit(state_after, DEPENDENCIES, **dict.fromkeys(TORCH_ALONE, "1"))
    assert with_us.result() == without_us.result() and with_us.result()["loaded"] == ["ray.rllib"]


def test_rllib_is_imported_without_tensorflow_whatever_comes_first() -> None:
    state_after(f"ENTRIES = {ENTRIES!r}\n{FIRST_IMPORT_OF_RLLIB}")


def test_a_default_is_for_a_time_and_the_users_value_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLARL_TEST_GIVEN", "user's")
    with environment_defaults(VLARL_TEST_GIVEN="ours", VLARL_TEST_NEW="ours"):
        assert (os.environ["VLARL_TEST_GIVEN"], os.environ["VLARL_TEST_NEW"]) == ("user's", "ours")
    assert os.environ["VLARL_TEST_GIVEN"] == "user's" and "VLARL_TEST_NEW" not in os.environ


def test_a_commands_tune_is_quiet_and_hands_no_secrets_on_and_the_next_one_is_as_before() -> None:
    def state() -> tuple[dict[str, str], int, set[str]]:
        return dict(os.environ), logging.getLogger("ray.tune").level, set(class_cache.ENV_VARS_TO_PROPAGATE)

    before = state()
    assert "AWS_SECRET_ACCESS_KEY" in before[2]
    handler = signal.getsignal(signal.SIGUSR1)
    with tolerant_tune(print):
        environment, level, handed_on = state()
        assert not tune_module._setup_signal_catching().is_set()
        assert signal.getsignal(signal.SIGUSR1) is handler, "a scheduler's warning, which a command listens to"
    assert environment["TUNE_DISABLE_SIGINT_HANDLER"] == "1" and environment["RAY_AIR_NEW_OUTPUT"] == "0"
    assert environment["RAY_CHDIR_TO_TRIAL_DIR"] == "0" and "RAY_CHDIR_TO_TRIAL_DIR" in handed_on
    assert level == logging.CRITICAL and not any(name.startswith("AWS_") for name in handed_on)
    assert state() == before
