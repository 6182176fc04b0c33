"""Trained samples a second: the learner's iteration on synthetic contributions, with the score pass and without.

The score pass is the one that the settings ask for: where the sampler's values and log-probs serve, as those of these
contributions then do, it is of the frames behind fragments and a micro-batch, and the plain loop makes none.

N = decisions, A = tokens of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from vlarl_rllib.bench.measure import (
    device_of,
    forget_peak,
    matmul_rate,
    name_of,
    peak_memory_gb,
    profiled,
    rate,
    threads,
)
from vlarl_rllib.bench.plain import PlainTrainer, micro_batches, moved
from vlarl_rllib.bench.policy import BenchPolicy
from vlarl_rllib.bench.result import CEILING, PLAIN, PRODUCT, Result
from vlarl_rllib.config import VLAPPOConfig
from vlarl_rllib.learner.collate import RolloutBatch, UpdatePlan, collate
from vlarl_rllib.learner.device_batch import DeviceBatch
from vlarl_rllib.learner.learner_group import VLALearnerGroup
from vlarl_rllib.learner.passes import PPOPasses
from vlarl_rllib.learner.sharded_policy import CRITIC, POLICY, ShardedPolicy
from vlarl_rllib.rllib_compat import without_tensorflow
from vlarl_rllib.rollout.slot_env import slot_spaces
from vlarl_rllib.runs.ray_session import ray_session
from vlarl_rllib.settings import Role, Settings, calculate_runtime_args
from vlarl_rllib.types import DURATION_KEY, INITIAL_VERSION, INSTRUCTION_KEY, LOG_PROBS_KEY, VALUE_KEY, VERSION_KEY

with without_tensorflow():
    from ray.rllib.env.single_agent_episode import SingleAgentEpisode

UNIT = "trained samples/s"


def measure(settings: Settings, profile: bool) -> Result:
    """One learner in this process, whatever the settings say of others; see `alone`."""
    settings = alone(settings)
    policy, device = BenchPolicy(settings), device_of(settings.learners.gpus)
    with threads(settings.learners.cpus):
        result = Result.of("update", settings, name_of(device))
        peak = matmul_rate(device, getattr(torch, settings.model.dtype))
        # RLlib asks Ray for the GPU of a learner
        with ray_session(calculate_runtime_args(settings).only(Role.ALGORITHM), settings):
            group = learner_group(settings, policy)
            try:
                product, operations = _product(group, policy, device, profile)
            finally:
                group.shutdown()
                del group  # the plain loop needs its memory
        plain = plain_rates(policy, device)
    result.profile = operations
    ceilings = update_ceilings(policy, peak)
    for scored, what in ((True, "update with its score pass"), (False, "update alone")):
        ceiling = ceilings[scored] if ceilings else None
        value, memory = product[scored]
        result.add(what, PRODUCT, value, UNIT, plain=plain[scored][0], ceiling=ceiling, memory_gb=memory)
        result.add(
            f"{policy.plain_loop}, {what}", PLAIN, plain[scored][0], UNIT, ceiling=ceiling, memory_gb=plain[scored][1]
        )
        if ceiling is not None:
            result.add(f"products, {what}", CEILING, ceiling, UNIT)
    result.counted = counted(policy, peak)
    return result


def alone(settings: Settings) -> Settings:
    """The same with one learner in this process and nothing sampled ahead."""
    return settings.replaced(
        learners={"num": 0}, rollout={"async_mode": False}, weights={"transport": "auto"}, engines={"gpus": 0.0}
    )


def learner_group(settings: Settings, policy: BenchPolicy) -> VLALearnerGroup:
    """As an Algorithm makes it."""
    config = VLAPPOConfig.from_settings(settings)
    config.validate()
    spaces = slot_spaces(policy.facts.image_size, policy.facts.actions)
    return config.build_learner_group(spaces={"__env__": spaces, "__env_single__": spaces, "default_policy": spaces})  # type: ignore[no-any-return]


def learner_memory_gb(learner: Any) -> float:
    """Of a learner's process, for `VLALearner.apply`."""
    return peak_memory_gb(learner.choose_device())


def contributions(settings: Settings, policy: BenchPolicy) -> list[list[SingleAgentEpisode]]:
    """What the slots of an iteration would bring, drawn at random: a fragment each that goes on."""
    plan, actions = calculate_runtime_args(settings), policy.facts.actions
    steps = settings.rollout.steps_per_iteration
    even = -float(np.log(len(actions.token_ids)))
    portions = []
    for slot in range(plan.num_slots):
        frames, tokens = policy.frames(steps + 1, slot), policy.tokens(steps, slot)
        rewards = np.random.default_rng(slot).normal(size=steps)
        episode = SingleAgentEpisode()
        episode.custom_data[INSTRUCTION_KEY] = policy.instruction(slot)
        episode.add_env_reset(frames[0])
        for step in range(steps):
            extra = {
                LOG_PROBS_KEY: np.full(actions.num_tokens, even, np.float32),
                DURATION_KEY: actions.num_actions,
                VERSION_KEY: INITIAL_VERSION,
                **({VALUE_KEY: 0.0} if settings.training.values == "engine" else {}),
            }
            episode.add_env_step(frames[step + 1], tokens[step], float(rewards[step]), extra_model_outputs=extra)
        portions.append([episode.to_numpy()])
    return portions


class UpdateLoop:
    """Optimiser steps on a batch as the learner makes them, on targets that are given."""

    def __init__(
        self, sharded: ShardedPolicy, batch: RolloutBatch, settings: Settings, num_actions: int, device: torch.device
    ) -> None:
        self._sharded, self._settings = sharded, settings
        self._passes = PPOPasses(sharded, settings, num_actions)
        self._data = DeviceBatch(batch, device, fixed_length=sharded.fixed_shapes)
        old, rewards = (tensor.to(device) for tensor in (batch.behaviour_log_probs, batch.rewards))
        self._targets = {
            "old_log_probs": old,
            "behaviour_log_probs": old,
            "old_values": torch.zeros_like(rewards),
            "advantages": rewards,
            "value_targets": rewards,
        }

    def run(self) -> float:
        """An epoch; decisions."""
        count = self._data.batch.num_decisions
        plan = UpdatePlan(steps=(count,), owners=(0,), num_ranks=1, seed=0)
        steps = []
        for minibatch in plan.minibatches(
            0, 1, self._settings.training.minibatch_size, self._settings.learners.micro_batch_size
        ):
            for index, rows in enumerate(minibatch.forwards):
                self._sharded.reduce_gradients(in_this_pass=index == len(minibatch.forwards) - 1)
                self._passes.learn(self._data, self._targets, rows, minibatch.num_valid, warm_up=False)
            steps.append(self._sharded.step((POLICY, CRITIC)))
        self._sharded.settle(steps)
        return float(count)


def _product(
    group: VLALearnerGroup, policy: BenchPolicy, device: torch.device, profile: bool
) -> tuple[dict[bool, tuple[float, float]], list[Any]]:
    """Rate and memory with the score pass and without, and the profile of the former."""
    settings, portions = policy.settings, contributions(policy.settings, policy)
    decisions = [sum(map(len, portion)) for portion in portions]
    iterations = iter(range(10**9))

    def receive() -> None:
        group.receive(portions, decisions)

    def update() -> float:
        # the first iterations are not those of a critic's warm-up
        group.update(iteration=settings.training.critic_warmup_iterations + next(iterations), timesteps={})
        return float(sum(decisions) * settings.training.num_epochs)

    def received_update() -> None:
        receive()
        update()

    sharded = group._learner.sharded
    batch = collate(portions, policy.processor.prompt_ids, policy.facts.actions)
    loop = UpdateLoop(sharded, batch, settings, policy.facts.actions.num_actions, device)
    found = {}
    for scored, call, prepare in ((True, update, receive), (False, loop.run, lambda: None)):
        forget_peak(device)
        found[scored] = rate(call, device, prepare=prepare), peak_memory_gb(device)
    return found, profiled(received_update, device) if profile else []


def plain_rates(policy: BenchPolicy, device: torch.device) -> dict[bool, tuple[float, float]]:
    """Rate and memory of the plain loop on the same batch, with the score pass before it and without."""
    forget_peak(device)
    settings = policy.settings
    batch = collate(contributions(settings, policy), policy.processor.prompt_ids, policy.facts.actions)
    trainer = PlainTrainer(policy, device, lr=settings.training.lr, value_head=True)
    inputs = plain_inputs(policy, batch)
    micro, everything = settings.learners.micro_batch_size, np.arange(batch.num_decisions)

    def score() -> None:
        for rows in micro_batches(everything, micro):
            log_probs, values = trainer.score(moved(inputs, rows, device))
            log_probs.cpu(), values.cpu()

    def optimize() -> float:
        for chosen in micro_batches(np.random.default_rng(0).permutation(everything), settings.training.minibatch_size):
            for rows in micro_batches(chosen, micro):
                old, rewards = (tensor[rows].to(device) for tensor in (batch.behaviour_log_probs, batch.rewards))
                trainer.ppo_backward(moved(inputs, rows, device), old, rewards, rewards)
            trainer.step()
        return float(len(everything))

    def both() -> float:
        if settings.training.scores_all:
            score()
        return sum(optimize() for _ in range(settings.training.num_epochs))

    calls: dict[bool, Callable[[], float]] = {True: both, False: optimize}
    found = {}
    for scored, call in calls.items():
        forget_peak(device)
        found[scored] = rate(call, device), peak_memory_gb(device)
    return found


def plain_inputs(policy: BenchPolicy, batch: RolloutBatch) -> dict[str, torch.Tensor]:
    """What the model takes for each decision, in host memory as a data loader has it."""
    frames = batch.frames[: batch.num_decisions]
    slots = np.repeat(np.arange(len(batch.contribution_steps)), batch.contribution_steps)
    inputs = policy.processor.raw_inputs(list(frames), [policy.instruction(slot) for slot in slots])
    return inputs | {"action_tokens": torch.from_numpy(batch.tokens)}


def update_ceilings(policy: BenchPolicy, peak: float) -> dict[bool, float] | None:
    """Trained samples a second at the rate `peak`, with the score pass and without; None where nothing is counted.

    The frames behind fragments, one a slot, which are scored and not trained on, are left out, and so is a micro-batch
    that is scored where not all are.
    """
    scored, alone = policy.update_flops(), policy.training_flops()
    return {True: peak / scored, False: peak / alone} if scored and alone else None


def counted(policy: BenchPolicy, peak: float) -> dict[str, float]:
    """For `Result.counted`."""
    numbers = {"product FLOP/s": peak, "weight bytes": float(policy.weight_bytes(policy.settings.model.dtype))}
    if (flops := policy.flops) is not None:
        numbers |= {"score FLOP": flops.score.forward_flops, "sample FLOP": flops.sample}
        numbers |= {"training FLOP": policy.training_flops() or 0.0}
    return numbers
