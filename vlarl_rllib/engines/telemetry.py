"""What engines tell of themselves: read once a second from the numbers that they keep anyway."""

from __future__ import annotations

from typing import Protocol

from vlarl_rllib.engines.step_loop import StepLoop
from vlarl_rllib.models.family import ActionFormat
from vlarl_rllib.telemetry.recorder import Telemetry, watch_gpu_memory


class Sampling(Protocol):
    """What samples, whether in an actor of its own or in a runner's process."""

    @property
    def policy_version(self) -> int: ...

    @property
    def num_decisions(self) -> int: ...

    @property
    def busy_seconds(self) -> float: ...


def watch_sampling(telemetry: Telemetry, engine: Sampling, actions: ActionFormat) -> None:
    """Tell how much `engine` samples, and with which weights."""

    def read() -> None:
        decisions = engine.num_decisions
        telemetry.total("decisions", decisions)
        telemetry.total("actions", decisions * actions.num_actions)
        telemetry.total("tokens", decisions * actions.num_tokens)
        telemetry.total("engine_busy_seconds", engine.busy_seconds)
        telemetry.set("engine_policy_version", engine.policy_version)

    telemetry.watch(read)


def watch_loop(telemetry: Telemetry, loop: StepLoop, actions: ActionFormat) -> None:
    """The same of an engine actor, and how long its callers wait."""

    def read() -> None:
        telemetry.set("engine_queue_length", loop.num_waiting, state="waiting")
        telemetry.set("engine_queue_length", loop.num_in_flight, state="in the model")
        telemetry.total("engine_load_seconds", loop.load_seconds)
        for _ in range(len(loop.latencies)):
            telemetry.observe("engine_latency_seconds", loop.latencies.popleft())

    watch_sampling(telemetry, loop, actions)
    telemetry.watch(read)
    watch_gpu_memory(telemetry)
