"""Rows of `metrics.jsonl` that no run has made."""

from typing import Any

from vlarl_rllib.runs.files import SHOWN_METRICS, SHOWN_SECONDS


def seconds(**spent: float) -> dict[str, float]:
    return {"startup": 0.0, **dict.fromkeys(SHOWN_SECONDS, 0.0), **spent}


def training_row(iteration: int, **changes: Any) -> dict[str, Any]:
    """One that took 10 s and has 64 environment steps."""
    row = {
        "iteration": iteration, "env_steps": 64 * iteration, "timestamp": 1000.0 + 10.0 * iteration,
        "git_revision": None, "episodes": 4, "success_rate": 0.5, "success_rate_by_task": {}, "return_mean": 0.5,
        "episode_length": 9.0, "seconds": seconds(sample=10.0), "faults": {}, "applied": {"lr": 1e-5, "value_lr": 1e-4},
        "initial_evaluation": None, "evaluation": None, **dict.fromkeys(SHOWN_METRICS, 0.1),
    }  # fmt: skip
    return row | changes
