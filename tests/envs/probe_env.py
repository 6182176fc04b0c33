"""Environments that misbehave or tell about their process; subprocesses import them as `probe_env:Class`."""

import os
import sys
import tempfile
import time
from typing import Any

import numpy as np

from vlarl_rllib.envs import EnvSpec
from vlarl_rllib.envs.libero import LiberoEnv
from vlarl_rllib.envs.synthetic import SyntheticEnv

HEAVY = ("torch", "ray", "transformers", "vllm", "tensorflow")


def loaded_heavy_modules() -> str:
    return ",".join(name for name in HEAVY if name in sys.modules)


class TellingLiberoEnv(LiberoEnv):
    """The instruction is the list of heavy modules in this process."""

    def reset(self, **kwargs: Any) -> Any:
        observation, info = super().reset(**kwargs)
        return observation, {**info, "instruction": loaded_heavy_modules()}


class CountingEnv(SyntheticEnv):
    """Each of its resets adds a file, named by task, to the folder that its suite names."""

    def reset(self, **kwargs: Any) -> Any:
        observation, info = super().reset(**kwargs)
        with tempfile.NamedTemporaryFile(dir=self.env_spec.suite, prefix=f"{info['task_id']}-", delete=False):
            return observation, info


class CrashingEnv(SyntheticEnv):
    """Takes its process along when it is built."""

    def __init__(self, spec: EnvSpec) -> None:
        os._exit(3)


class RaisingEnv(SyntheticEnv):
    """Raises in steps that point to the left."""

    def step(self, action: np.ndarray) -> Any:
        if action[0] < 0:
            raise ZeroDivisionError("pointed to the left")
        return super().step(action)


class SlowEnv(SyntheticEnv):
    """A step takes far longer than anybody wants to wait."""

    def step(self, action: np.ndarray) -> Any:
        time.sleep(600)
        return super().step(action)


class OddEnv(SyntheticEnv):
    """Its suite says what a step returns in place of what it should."""

    def step(self, action: np.ndarray) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        image = observation["image"]
        changed: dict[str, Any] = {
            "a float image": ({"image": image / 255.0}, reward, terminated, truncated, info),
            "another size": ({"image": image[:8, :8]}, reward, terminated, truncated, info),
            "no image": ({}, reward, terminated, truncated, info),
            "NaN": (observation, float("nan"), terminated, truncated, info),
            "two rewards": (observation, np.zeros(2), terminated, truncated, info),
            "a text": (observation, reward, "no", truncated, info),
            "no success": (observation, reward, terminated, truncated, {}),
            "four things": (observation, reward, terminated, info),
        }
        return changed[self.env_spec.suite]
