"""What RLlib's EnvRunner is to be, over slots: made from the settings, with environments in subprocesses, players and
callbacks."""

from __future__ import annotations

import tempfile
import traceback
from typing import Any

from vlarl_rllib.rllib_compat import without_tensorflow

with without_tensorflow():
    from ray.rllib.callbacks.utils import make_callback
    from ray.rllib.env.env_context import EnvContext
    from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

from vlarl_rllib.engines.client import SamplerClient
from vlarl_rllib.engines.protocol import EngineSpec
from vlarl_rllib.envs.vector import SlotProcesses
from vlarl_rllib.models.family import load_family
from vlarl_rllib.process.storage import place_of
from vlarl_rllib.rewards import make_rewards
from vlarl_rllib.rollout.loop import Completions, SlotLoop
from vlarl_rllib.rollout.slot_env import SlotVectorEnv
from vlarl_rllib.rollout.telemetry import RunnerTelemetry
from vlarl_rllib.rollout.training_players import RunnerSlots
from vlarl_rllib.settings import Settings, calculate_runtime_args
from vlarl_rllib.telemetry.actors import own_name
from vlarl_rllib.telemetry.recorder import Telemetry
from vlarl_rllib.types import EnvSpec


class SlotsRunner(SingleAgentEnvRunner):
    """One runner: `env.num_envs` slots in `env.num_processes` subprocesses."""

    def __init__(self, *, config: Any, **kwargs: Any) -> None:
        self.settings = Settings.from_dict(config.vla)
        self._engine_spec: EngineSpec = config.engine_spec()
        self._sampler: SamplerClient | None = None
        self._version = 0
        self._failure: str | None = None
        self._trial = 0
        super().__init__(config=config, **kwargs)

    def make_env(self) -> None:
        """Start the environments.

        What goes wrong is kept for `failure`: of an actor that raises while it is made, Ray makes the next one.
        """
        try:
            self._make_env()
        except Exception:
            self._failure = traceback.format_exc()
            return
        context = EnvContext(self.config.env_config, self.worker_index or 0, num_workers=self.num_workers)
        self._call_back("on_environment_created", env=self.env, env_context=context)

    def failure(self) -> str | None:
        """Traceback of what kept this runner from making its environments."""
        return self._failure

    def __repr__(self) -> str:
        """What Ray's dashboard and logs call this actor."""
        return own_name(type(self).__name__)

    def _make_env(self) -> None:
        self.stop()
        self.telemetry = Telemetry(*self._run_labels(), f"runner-{self.worker_index or 0}")
        self._engine_spec = self._engine_spec.here()
        family = load_family(self._engine_spec.family)
        model = family.read_facts(self._engine_spec.model_path)
        env, settings = self.settings.env, self.settings
        plan = calculate_runtime_args(settings)
        runner = max(0, (self.worker_index or 1) - 1)
        slot_tasks = plan.slot_tasks[runner]
        spec = EnvSpec(
            name=env.name,
            suite=env.suite,
            image_size=model.image_size,
            center_crop=settings.center_crop,
            max_steps=env.max_steps,
            fast_render=env.fast_render,
        )
        processes = SlotProcesses(
            spec,
            list(slot_tasks),
            num_processes=plan.num_processes,
            models_per_process=env.models_per_process,
            max_resets=env.max_resets_per_process,
        )
        self.env = SlotVectorEnv(processes, env.num_envs, model.image_size, model.actions)
        self.num_envs = env.num_envs
        codec = family.codec(model, model.action_statistics(settings.unnorm_key))
        self._slots = RunnerSlots(spec, self.env, slot_tasks, runner * env.num_envs, codec, model.actions)
        executed = settings.rollout.execute_actions
        self._slots.check_decisions(executed)
        self._make_players()
        self._loop = SlotLoop(
            processes,
            env.num_envs,
            decode=lambda tokens: codec.decode(tokens)[:executed],
            completions=Completions(),
            request_timeout_seconds=settings.engines.request_timeout_seconds,
            env_timeout_seconds=env.timeout_seconds,
            lockstep=settings.lockstep,
        )
        self._tell = RunnerTelemetry(self.telemetry, self._loop, env.num_envs)

    def _make_players(self) -> None:
        errors = place_of(self.config.run_dir or tempfile.gettempdir()) / "reward_errors"
        self._rewards = make_rewards(self.settings.rewards, self._slots.actions.token_ids, errors)
        self._curriculum, self._players = self._slots.make_players(self.settings, self._rewards)

    def get_spaces(self) -> Any:
        return self.spaces if self.env is None else self.env.spaces

    def make_module(self) -> None:
        if self._failure is None:
            super().make_module()

    def set_state(self, state: Any) -> None:
        if self._failure is None:  # RLlib would end a runner that raises here, and with it what it can tell
            super().set_state(state)

    def assert_healthy(self) -> None:
        assert self._failure or (self.env is not None and self.env.processes.pids()), (
            "the runner has no environment processes"
        )

    def stop(self) -> None:
        if self._sampler is not None:
            self._sampler.close()
        if self.env is not None:
            self.env.close()
            self.telemetry.close()

    def _run_labels(self) -> tuple[str, str]:
        """What metrics say of the run: its name and its suite."""
        return self.config.run_name or "vlarl", self.settings.env.label

    def _call_back(self, name: str, **arguments: Any) -> None:
        functions = getattr(self.config, f"callbacks_{name}")
        make_callback(
            name, self._callbacks, functions, kwargs={"env_runner": self, "metrics_logger": self.metrics, **arguments}
        )
