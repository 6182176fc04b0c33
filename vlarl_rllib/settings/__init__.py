"""Every setting of a run: typed, documented, validated before anything starts.

`Settings.from_yaml(path, overrides)` is the one way in. A mistake is a `SettingsError` whose text is one line with the
key, the value, the rule and the remedy. Neither Ray nor torch is imported here, so that a wrong key is answered in well
under a second.
"""

from vlarl_rllib.errors import SettingsError
from vlarl_rllib.settings.load import Settings, known_keys
from vlarl_rllib.settings.model import LoraSettings, ModelSettings
from vlarl_rllib.settings.plan import Role, RuntimeArgs, calculate_runtime_args
from vlarl_rllib.settings.schema import (
    EnvSettings,
    FSDPSettings,
    LearnerSettings,
    RewardSettings,
    Sections,
    SFTSettings,
    WeightSettings,
)

__all__ = [
    "EnvSettings",
    "FSDPSettings",
    "LearnerSettings",
    "LoraSettings",
    "ModelSettings",
    "RewardSettings",
    "Role",
    "RuntimeArgs",
    "SFTSettings",
    "Sections",
    "Settings",
    "SettingsError",
    "WeightSettings",
    "calculate_runtime_args",
    "known_keys",
]
