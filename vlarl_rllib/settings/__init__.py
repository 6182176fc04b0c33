"""Every setting of a run: typed, documented, validated before anything starts.

`Settings.from_yaml(path, overrides)` is the one way in. A mistake is a `SettingsError` whose text is one line with the key,
the value, the rule and the remedy. Neither Ray nor torch is imported here, so that a wrong key is answered in well under a second.
"""

from vlarl_rllib.errors import SettingsError
from vlarl_rllib.plan import LIBERO_TASKS, RuntimeArgs, calculate_runtime_args
from vlarl_rllib.settings.schema import (
    NOT_YET,
    EnvSettings,
    FSDPSettings,
    LearnerSettings,
    LoraSettings,
    ModelSettings,
    RewardSettings,
    Settings,
    SFTSettings,
    WeightSettings,
    default_statistics,
    known_keys,
)

__all__ = [
    "LIBERO_TASKS",
    "NOT_YET",
    "EnvSettings",
    "FSDPSettings",
    "LearnerSettings",
    "LoraSettings",
    "ModelSettings",
    "RewardSettings",
    "RuntimeArgs",
    "SFTSettings",
    "Settings",
    "SettingsError",
    "WeightSettings",
    "calculate_runtime_args",
    "default_statistics",
    "known_keys",
]
