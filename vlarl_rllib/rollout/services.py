"""What the Algorithm starts before RLlib's own actors, each in its bundle of the plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from vlarl_rllib.engines.pool import EnginePool
from vlarl_rllib.engines.protocol import EngineSpec
from vlarl_rllib.models.family import load_family
from vlarl_rllib.rewards.worker import PATIENCE_SECONDS, RewardService
from vlarl_rllib.rollout.slot_env import all_spaces
from vlarl_rllib.settings import Role, RuntimeArgs, Settings, calculate_runtime_args
from vlarl_rllib.telemetry.actors import ActorNames


def start_engines(spec: EngineSpec, settings: Settings) -> EnginePool:
    engines, plan = settings.engines, calculate_runtime_args(settings)
    options = [
        {"num_cpus": engines.cpus, "num_gpus": engines.gpus, **_in_bundle(plan, Role.ENGINE, index)}
        for index in range(engines.num)
    ]
    return EnginePool(spec, engines.num, actor_options=options, start_timeout_seconds=engines.start_timeout_seconds)


def start_reward_worker(settings: Settings, run: str) -> RewardService:
    rewards, place = settings.rewards, _in_bundle(calculate_runtime_args(settings), Role.REWARD_WORKER)
    options = {"num_cpus": rewards.judge_cpus, "num_gpus": rewards.judge_gpus, **place}
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


def runner_options(plan: RuntimeArgs, names: ActorNames) -> Callable[[str], dict[str, Any]]:
    """From a runner's role to Ray options for it: its name; outside of a placement group, where RLlib looks for its
    bundle, also the nodes that it may lie on."""
    grouped = ray.util.get_current_placement_group() is not None
    place = {} if grouped else plan.bundles[plan.bundle_of(Role.RUNNER)].options
    return lambda role: place | names.of(role)


def runner_spaces(spec: EngineSpec, num_envs: int) -> dict[str, Any]:
    """What RLlib asks a runner for, of one that is not there yet.

    Args:
        spec: of its policy.
    """
    spec = spec.here()
    facts = load_family(spec.family).read_facts(spec.model_path)
    return all_spaces(facts.image_size, facts.actions, num_envs)


def _in_bundle(plan: RuntimeArgs, role: Role, index: int = 0) -> dict[str, Any]:
    """Ray options for an actor in its bundle of the trial's placement group; outside of one, on a node as good."""
    group, place = ray.util.get_current_placement_group(), plan.bundle_of(role, index)
    if group is None:
        return plan.bundles[place].options
    return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, place)}
