"""One LIBERO environment for all tests of this folder: building its model takes seconds and about a gigabyte."""

from collections.abc import Iterator

import pytest
from env_helpers import TASK

from vlarl_rllib.envs import EnvSpec
from vlarl_rllib.envs.libero import LiberoEnv


@pytest.fixture(scope="session")
def libero_env() -> Iterator[LiberoEnv]:
    env = LiberoEnv(EnvSpec(name="libero", suite="libero_spatial", fast_render=True))
    env.reset(seed=0, options={"task_id": TASK})
    yield env
    env.close()
