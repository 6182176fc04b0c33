"""Environments that vision-language-action policies act in, and the subprocesses that run them.

Importing this package loads no simulator: LIBERO, robosuite and MuJoCo are imported when an environment is built.
"""

from __future__ import annotations

from vlarl_rllib.envs.registry import (
    horizon,
    make_env,
    num_initial_states,
    num_tasks,
    split_initial_states,
    task_instructions,
    training_and_held_out_states,
)
from vlarl_rllib.types import EnvSpec

__all__ = [
    "EnvSpec",
    "horizon",
    "make_env",
    "num_initial_states",
    "num_tasks",
    "split_initial_states",
    "task_instructions",
    "training_and_held_out_states",
]
