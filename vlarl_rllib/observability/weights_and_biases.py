"""Weights & Biases, through Ray's logger, but for the way of the API key."""

from __future__ import annotations

import os
from typing import Any

import ray
from ray.air.integrations.wandb import WANDB_ENV_VAR, WandbLoggerCallback, _WandbLoggingActor
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class _LoggingActor(_WandbLoggingActor):
    def __init__(self, *args: Any, api_key: str | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if api_key:
            os.environ[WANDB_ENV_VAR] = api_key


class WandbLogger(WandbLoggerCallback):
    """Hands the key to the logging process as an argument: Ray's own way is a runtime environment, which is written into logs for all to read."""

    _logger_actor_cls = _LoggingActor

    def _start_logging_actor(self, trial: Any, exclude_results: list[str], **options: Any) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._remote_logger_class = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)(self._logger_actor_cls)
        super()._start_logging_actor(trial, exclude_results, api_key=os.environ.get(WANDB_ENV_VAR), **options)
