"""The files by which RLlib's own `Algorithm.from_checkpoint` knows a checkpoint.

RLlib unpickles the class and its arguments from `class_and_ctor_args.pkl`. Nothing of ours reads that file: `VLAPPO.from_checkpoint`
takes the settings from `facts.json`. So load checkpoints of strangers through that one.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

from ray.rllib.utils.checkpoints import CHECKPOINT_VERSION_LEARNER_AND_ENV_RUNNER


def write_rllib_files(directory: Path, algorithm_class: type, config: dict[str, Any]) -> None:
    """Make `directory` one that `Algorithm.from_checkpoint` builds `algorithm_class(config)` from, and restores it from.

    Args:
        config: RLlib's, as a dictionary of plain values.
    """
    facts = {"type": "Algorithm", "checkpoint_version": str(CHECKPOINT_VERSION_LEARNER_AND_ENV_RUNNER), "format": "cloudpickle"}
    (directory / "rllib_checkpoint.json").write_text(json.dumps(facts))
    (directory / "class_and_ctor_args.pkl").write_bytes(pickle.dumps({"class": algorithm_class, "ctor_args_and_kwargs": ((config,), {})}))
    (directory / "algorithm_state.pkl").write_bytes(pickle.dumps({}))  # RLlib looks whether it is there
