"""Engines and runners as in training, without an Algorithm and without learners: the actors of an evaluation, and of
the benchmark of rollouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlarl_rllib.config import VLAPPOConfig
from vlarl_rllib.engines.actor import EngineActor
from vlarl_rllib.engines.pool import EnginePool
from vlarl_rllib.rllib_compat import kill_runners, make_runner_group
from vlarl_rllib.rollout.runner_pool import RunnerCalls, require_runners
from vlarl_rllib.rollout.services import runner_options
from vlarl_rllib.settings import Role, RuntimeArgs, Settings, calculate_runtime_args
from vlarl_rllib.telemetry.actors import ActorNames
from vlarl_rllib.weights.sync import LoadedWeights

if TYPE_CHECKING:
    from ray.rllib.env.env_runner_group import EnvRunnerGroup


@dataclass(frozen=True)
class Workers:
    """What is running."""

    calls: RunnerCalls
    pool: EnginePool | None

    def restarts(self) -> dict[str, int]:
        """How often a runner or an engine was replaced."""
        return {
            "runner_restarts": self.calls.num_restarts,
            "engine_restarts": self.pool.num_restarts if self.pool else 0,
        }


def evaluation_plan(settings: Settings) -> RuntimeArgs:
    """Of runners and engines alone."""
    return calculate_runtime_args(settings).only(Role.RUNNER, Role.ENGINE)


@contextmanager
def start_workers(
    settings: Settings,
    name: str,
    *,
    make_calls: Callable[..., RunnerCalls] = RunnerCalls,
    engine_class: type[EngineActor] = EngineActor,
) -> Iterator[Workers]:
    """Engines that serve the checkpoint as it is, and runners; all are gone afterwards.

    Args:
        name: what they are called on Ray's dashboard and in metrics, before a slash and their role.
        make_calls: of what calls the runners, with `RunnerCalls`' arguments.
        engine_class: of the engines' actors.

    Raises:
        RuntimeError: an engine does not start.
    """
    config = VLAPPOConfig.from_settings(settings)
    config.run_name = name
    config.validate()
    config.freeze()
    engines = settings.engines
    plan = evaluation_plan(settings)
    options = [
        {"num_cpus": engines.cpus, "num_gpus": engines.gpus, **bundle.options}
        for bundle in plan.bundles
        if bundle.role is Role.ENGINE
    ]
    pool: EnginePool | None = None
    runners: EnvRunnerGroup | None = None
    try:
        if engines.num:
            pool = EnginePool(
                config.engine_spec(),
                engines.num,
                actor_options=options,
                start_timeout_seconds=engines.start_timeout_seconds,
                engine_class=engine_class,
            )
        runners = make_runner_group(config, runner_options(plan, ActorNames(name)))
        require_runners(runners)
        if pool is not None:
            pool.wait_until_ready()
        calls = make_calls(
            runners,
            LoadedWeights(pool),
            pool,
            restore_runners=runners.probe_unhealthy_env_runners,
            timeout_seconds=settings.rollout.timeout_seconds,
        )
        yield Workers(calls, pool)
    finally:
        if runners is not None:
            kill_runners(runners)
        if pool is not None:
            pool.shutdown()
