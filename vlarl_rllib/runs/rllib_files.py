"""The files by which RLlib's own `Algorithm.from_checkpoint` knows a checkpoint.

RLlib unpickles the class and its arguments from `class_and_ctor_args.pkl`. Nothing of ours reads that file:
`VLAPPO.from_checkpoint` takes the settings from `facts.json`. So load checkpoints of strangers through that one.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from ray import cloudpickle
from ray.rllib.utils.checkpoints import CHECKPOINT_VERSION_LEARNER_AND_ENV_RUNNER

from vlarl_rllib.process.storage import Place


def write_rllib_files(directory: Place, algorithm_class: type, config: dict[str, Any]) -> None:
    """Make `directory` one that `Algorithm.from_checkpoint` builds `algorithm_class(config)` from, and restores it
    from.

    Args:
        config: RLlib's, as a dictionary of plain values.
    """
    facts = {
        "type": "Algorithm",
        "checkpoint_version": str(CHECKPOINT_VERSION_LEARNER_AND_ENV_RUNNER),
        "format": "cloudpickle",
    }
    (directory / "rllib_checkpoint.json").write_text(json.dumps(facts))
    # Tune works with a copy of the class
    named = getattr(sys.modules.get(algorithm_class.__module__), algorithm_class.__name__, algorithm_class)
    (directory / "class_and_ctor_args.pkl").write_bytes(
        cloudpickle.dumps({"class": named, "ctor_args_and_kwargs": ((config,), {})})
    )
    (directory / "algorithm_state.pkl").write_bytes(cloudpickle.dumps({}))  # RLlib looks whether it is there
