"""An environment and a learner that take their time without working; other processes import them by name."""

import time
from typing import Any

import numpy as np

from vlarl_rllib import VLAPPOConfig
from vlarl_rllib.envs.synthetic import SyntheticEnv
from vlarl_rllib.learner.learner import VLALearner
from vlarl_rllib.rollout.env_runner import VLAEnvRunner

STEP_SECONDS, UPDATE_SECONDS = 0.15, 2.5


class SleepingEnv(SyntheticEnv):
    def step(self, action: np.ndarray) -> Any:
        time.sleep(STEP_SECONDS)
        return super().step(action)


class SleepingLearner(VLALearner):
    def update(self, *arguments: Any, **options: Any) -> Any:
        time.sleep(UPDATE_SECONDS)
        return super().update(*arguments, **options)


class SleepingRunner(VLAEnvRunner):
    def make_env(self) -> None:
        """Settings only take environments of installed packages."""
        env = self.settings.env.model_copy(update={"name": f"{__name__}:SleepingEnv"})
        self.settings = self.settings.model_copy(update={"env": env})
        super().make_env()


class SleepingConfig(VLAPPOConfig):
    def __init__(self, algo_class: Any = None) -> None:
        super().__init__(algo_class)
        self.env_runners(env_runner_cls=SleepingRunner)

    def get_default_learner_class(self) -> type:
        return SleepingLearner
