"""PPO fine-tuning of vision-language-action models as a native RLlib algorithm.

Importing this package loads none of torch, Ray, vLLM or LIBERO; the two names below are looked up on first use.
"""

from vlarl_rllib.process.import_path import is_our_command, leave_working_directory

if is_our_command():  # before anything is imported that the working directory might hold
    leave_working_directory()

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["VLAPPO", "VLAPPOConfig", "__version__"]

if TYPE_CHECKING:
    from vlarl_rllib.algorithm import VLAPPO
    from vlarl_rllib.config import VLAPPOConfig


def __getattr__(name: str) -> Any:
    if name == "VLAPPO":
        from vlarl_rllib.algorithm import VLAPPO

        return VLAPPO
    if name == "VLAPPOConfig":
        from vlarl_rllib.config import VLAPPOConfig

        return VLAPPOConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
