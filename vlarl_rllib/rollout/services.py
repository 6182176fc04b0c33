"""What the Algorithm starts before RLlib's own actors, in bundles counted from the end: RLlib counts its own from the
front."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from vlarl_rllib.engines.pool import EnginePool
from vlarl_rllib.engines.protocol import EngineSpec
from vlarl_rllib.rewards.worker import PATIENCE_SECONDS, RewardService
from vlarl_rllib.settings import Settings


def start_engines(spec: EngineSpec, settings: Settings) -> EnginePool:
    """In the last bundles."""
    engines = settings.engines
    options = [
        {"num_cpus": engines.cpus, "num_gpus": engines.gpus, **_in_bundle(engines.num - index)}
        for index in range(engines.num)
    ]
    return EnginePool(spec, engines.num, actor_options=options, start_timeout_seconds=engines.start_timeout_seconds)


def start_reward_worker(settings: Settings) -> RewardService:
    """In the bundle before the engines'."""
    rewards = settings.rewards
    options = {"num_cpus": rewards.judge_cpus, "num_gpus": rewards.judge_gpus, **_in_bundle(settings.engines.num + 1)}
    assert rewards.judge is not None, "validated with rewards.process"
    patience = max(PATIENCE_SECONDS, 2.0 * rewards.timeout_seconds)
    return RewardService(
        rewards.judge, "cuda" if rewards.judge_gpus else "cpu", actor_options=options, patience_seconds=patience
    )


def _in_bundle(from_the_end: int) -> dict[str, Any]:
    """Ray options for an actor in the trial's bundle that is so many from the end, the last one 1; none outside a
    placement group."""
    group = ray.util.get_current_placement_group()
    return (
        {}
        if group is None
        else {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, group.bundle_count - from_the_end)}
    )
