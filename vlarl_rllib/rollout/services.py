"""What the Algorithm starts before RLlib's own actors, each in its bundle of the plan."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from vlarl_rllib.engines.pool import EnginePool
from vlarl_rllib.engines.protocol import EngineSpec
from vlarl_rllib.rewards.worker import PATIENCE_SECONDS, RewardService
from vlarl_rllib.settings import Role, Settings, calculate_runtime_args


def start_engines(spec: EngineSpec, settings: Settings) -> EnginePool:
    engines, plan = settings.engines, calculate_runtime_args(settings)
    options = [
        {"num_cpus": engines.cpus, "num_gpus": engines.gpus, **_in_bundle(plan.bundle_of(Role.ENGINE, index))}
        for index in range(engines.num)
    ]
    return EnginePool(spec, engines.num, actor_options=options, start_timeout_seconds=engines.start_timeout_seconds)


def start_reward_worker(settings: Settings, run: str) -> RewardService:
    rewards, bundle = settings.rewards, calculate_runtime_args(settings).bundle_of(Role.REWARD_WORKER)
    options = {"num_cpus": rewards.judge_cpus, "num_gpus": rewards.judge_gpus, **_in_bundle(bundle)}
    assert rewards.judge is not None, "validated with rewards.process"
    patience = max(PATIENCE_SECONDS, 2.0 * rewards.timeout_seconds)
    return RewardService(
        rewards.judge,
        "cuda" if rewards.judge_gpus else "cpu",
        actor_options=options,
        patience_seconds=patience,
        run=run,
        suite=settings.env.label,
    )


def _in_bundle(index: int) -> dict[str, Any]:
    """Ray options for an actor in this bundle of the trial's placement group; none outside of one."""
    group = ray.util.get_current_placement_group()
    return {} if group is None else {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, index)}
