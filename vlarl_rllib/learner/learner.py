"""PPO on an FSDP2-sharded policy, as an RLlib Learner.

RLlib's own update loop forwards a whole batch at once, shards episodes unevenly and steps per minibatch without
accumulation. Here `update` keeps RLlib's place and hooks but runs: one pass in parts for values and log-probs, GAE,
then for each minibatch as many forward and backward passes as memory asks for and one optimiser step. Every rank makes
the same number of forwards, always: FSDP gathers parameters in each, so an unequal number would hang until the process
group's time-out.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import ray

from vlarl_rllib.rllib_compat import without_tensorflow

with without_tensorflow():
    from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner

from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.utils.metrics import (
    ALL_MODULES,
    NUM_ENV_STEPS_TRAINED,
    NUM_ENV_STEPS_TRAINED_LIFETIME,
    NUM_MODULE_STEPS_TRAINED_LIFETIME,
)
from torch import Tensor

from vlarl_rllib.errors import lower_the_rates
from vlarl_rllib.learner import fsdp
from vlarl_rllib.learner.advantages import advantages_and_targets
from vlarl_rllib.learner.collate import RolloutBatch, UpdatePlan, collate
from vlarl_rllib.learner.device_batch import DeviceBatch
from vlarl_rllib.learner.history import averaged
from vlarl_rllib.learner.loss import added_up
from vlarl_rllib.learner.passes import PPOPasses
from vlarl_rllib.learner.rank import Rank
from vlarl_rllib.learner.scores import Gaps, RolloutScores, measure_gaps, score_rollout
from vlarl_rllib.learner.sharded_policy import CRITIC, POLICY, OptimizerStep, ShardedPolicy
from vlarl_rllib.models.build import build_models
from vlarl_rllib.models.family import family_of
from vlarl_rllib.models.presets import models_here
from vlarl_rllib.process.storage import FileFacts, place_of
from vlarl_rllib.settings import Settings
from vlarl_rllib.telemetry.recorder import Telemetry, watch_gpu_memory
from vlarl_rllib.types import WeightBucket, WeightManifest

logger = logging.getLogger(__name__)

FIRST_MINIBATCH = ("policy_loss", "value_loss", "ratio_deviation", "clip_fraction")
"""What is also logged of an iteration's first minibatch alone, before the weights have moved."""


class VLALearner(Rank, PPOTorchLearner):
    """One FSDP rank. `config.vla` holds the settings; see `config.VLAPPOConfig`."""

    sharded: ShardedPolicy

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.settings = Settings.from_dict(self.config.vla)
        self._batch: RolloutBatch | None = None
        self._gaps = Gaps()
        """As of when decisions of the newest policy came in last."""

    def join(self, rank: int, world_size: int, address: str, port: int) -> int:
        self._set_learner_index_and_placement_group(learner_index=rank, placement_group=None)
        return super().join(rank, world_size, address, port)

    def build(self) -> None:
        self.telemetry = Telemetry(*self._run_labels(), f"learner-{self._rank}")
        watch_gpu_memory(self.telemetry)
        self.join_alone()
        super().build()

    def _run_labels(self) -> tuple[str, str]:
        """What metrics say of the run: its name and its suite."""
        return self.config.run_name or "vlarl", self.settings.env.label

    def shutdown(self) -> None:
        if hasattr(self, "sharded"):
            self.sharded.close()
            self.telemetry.close()
        self.leave()

    def reconfigure(self, config: Any) -> None:
        """Learn for another trial from now on, whose settings differ in what `in_place.IN_PLACE` names; its weights are
        to come, by `begin_anew` or `load_sharded`."""
        self.config, self.settings, self._batch = config, Settings.from_dict(config.vla), None
        training = self.settings.training
        self.sharded.reconfigure(
            self.settings,
            lr=training.lr,
            weight_decay=training.weight_decay,
            if_diverged=lower_the_rates(training.rates),
        )
        self._passes = PPOPasses(self.sharded, self.settings, self._actions.num_actions)
        self.telemetry.follow(*self._run_labels())
        self.entropy_coeff_schedulers_per_module.clear()
        self.metrics.reset()
        self._weights_seq_no = 0

    def begin_anew(self) -> None:
        """Go back to the weights that the run begins with, fresh parts by its seed, and forget all moments. Reads the
        model again."""
        self.sharded.begin_anew(*build_models(self.settings.model, self.settings.run.seed, self._device))

    # What RLlib's build() asks for

    def _make_module(self) -> Any:
        """Sharding comes before the optimisers, which RLlib keys by parameter identity."""
        module, training, model = super()._make_module(), self.settings.training, models_here(self.settings.model)
        family = family_of(model.path, model.family_reference)
        self._processor = family.processor(model.path)
        self._actions = family.read_facts(model.path).actions
        self.sharded = ShardedPolicy(
            module[DEFAULT_MODULE_ID].policy,
            module[DEFAULT_MODULE_ID].critic,
            family,
            self._actions,
            self.settings,
            device=self._device,
            rank=self._rank,
            world_size=self._world_size,
            lr=training.lr,
            weight_decay=training.weight_decay,
            if_diverged=lower_the_rates(training.rates),
        )
        self._passes = PPOPasses(self.sharded, self.settings, self._actions.num_actions)
        return module

    def _map_module_to_device(self, module: Any) -> None:
        """Nothing: FSDP places the shards."""

    def _make_modules_ddp_if_necessary(self) -> None:
        """Nothing: FSDP reduces the gradients."""

    def add_module(self, **kwargs: Any) -> Any:
        raise NotImplementedError("VLALearner trains exactly one policy; start another trial for another policy")

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        for name, optimizer in self.sharded.optimizers.items():
            params = [p for group in optimizer.param_groups for p in group["params"]]
            self.register_optimizer(module_id=module_id, optimizer_name=name, optimizer=optimizer, params=params)

    # One iteration

    def receive(self, refs: list[Any]) -> list[int | None]:
        """Fetch this rank's contributions one by one; their decisions, or None where the data was lost with its
        runner."""
        with self._phase("receive"):
            contributions = [_fetched(ref) for ref in refs]
            kept = [contribution for contribution in contributions if contribution]
            self._batch = collate(kept, self._processor.prompt_ids, self._actions) if kept else None
        return [sum(map(len, contribution)) if contribution else None for contribution in contributions]

    def update(
        self,
        training_data: Any = None,
        *,
        timesteps: dict[str, Any] | None = None,
        plan: UpdatePlan,
        iteration: int,
        **kwargs: Any,
    ) -> Any:
        """One PPO iteration on the contributions that `receive` fetched.

        Args:
            plan: the owners and decisions of all ranks' contributions, the same on every rank.
            iteration: counts from 0; decides about critic warm-up.
        """
        self._check_is_built()
        assert self._batch is not None, "receive() comes before update()"
        batch, self._batch = self._batch, None
        self.before_gradient_based_update(timesteps=timesteps or {})
        self._weights_seq_no += 1
        with self._phase("score"):
            data = DeviceBatch(batch, self._device, fixed_length=self.sharded.fixed_shapes)
            targets = self._targets(data)
        with self._phase("optimize"):
            warm_up = iteration < self.settings.training.critic_warmup_iterations
            self._optimize(data, targets, plan, warm_up=warm_up)
            self.sharded.require_finite_weights()
        self.telemetry.count("trained_samples", batch.num_decisions * self.settings.training.num_epochs)
        self._log_steps(batch)
        self.after_gradient_based_update(timesteps=timesteps or {})
        return self.metrics.reduce()

    def _targets(self, data: DeviceBatch) -> dict[str, Tensor]:
        """What the loss of each decision compares with, from before the first optimiser step, on the device; everything
        [N], log-probs [N, A]."""
        training, batch = self.settings.training, data.batch
        scores = score_rollout(self._passes, data, self.settings, fixed=self.sharded.fixed_shapes)
        old_values = scores.values[: batch.num_decisions]
        advantages, value_targets = advantages_and_targets(batch, scores.values, self.settings)
        self._log_gaps(batch, scores)
        self._log_targets(batch, old_values, value_targets, advantages)
        recomputes = training.old_log_probs == "recompute"
        targets = {
            "old_values": old_values,
            "value_targets": value_targets,
            "advantages": fsdp.normalize(advantages)
            if training.advantages == "gae" and training.normalize_advantages
            else advantages,
            "behaviour_log_probs": batch.behaviour_log_probs,
            "old_log_probs": scores.log_probs if recomputes else batch.behaviour_log_probs,
        }
        return {name: target.to(self._device) for name, target in targets.items()}

    def _optimize(self, data: DeviceBatch, targets: dict[str, Tensor], plan: UpdatePlan, *, warm_up: bool) -> None:
        """All optimiser steps; the device is waited for behind the last one."""
        training = self.settings.training
        sums: list[dict[str, Tensor]] = []
        optimizer_steps: list[OptimizerStep] = []
        num_valid: list[int] = []
        for minibatch in plan.minibatches(
            self._rank, training.num_epochs, training.minibatch_size, self.settings.learners.micro_batch_size
        ):
            parts: list[dict[str, Tensor]] = []
            for i, steps in enumerate(minibatch.forwards):
                self.sharded.reduce_gradients(in_this_pass=i == len(minibatch.forwards) - 1)
                parts.append(self._passes.learn(data, targets, steps, minibatch.num_valid, warm_up=warm_up))
            sums.append(added_up(parts))
            optimizer_steps.append(self.sharded.step((CRITIC,) if warm_up else (POLICY, CRITIC)))
            num_valid.append(minibatch.num_valid)
        norms, skipped = self.sharded.settle(optimizer_steps)
        history = [
            mean | {"grad_norm": norm[POLICY], "grad_norm_critic": norm[CRITIC]}
            for mean, norm in zip(averaged(sums, num_valid), norms, strict=True)
        ]
        self._log_optimization(history, skipped, num_valid)

    # Weights and checkpoints

    def begin_publishing(self, version: int, transport: str, *, whole: bool, keep: bool) -> WeightManifest:
        """See `Publisher.begin`; the module's state names the version."""
        self.module[DEFAULT_MODULE_ID].weights_version = version
        return self.sharded.publisher.begin(version, transport, whole=whole, keep=keep)

    def next_bucket(self, done: int) -> WeightBucket | None:
        """See `Publisher.next`."""
        with self._phase("publish"):
            return self.sharded.publisher.next(done)

    def end_publishing(self) -> None:
        """See `Publisher.end`."""
        self.sharded.publisher.end()

    def save_sharded(self, directory: str) -> dict[str, FileFacts]:
        """See `ShardedPolicy.save`."""
        with self._phase("checkpoint"):
            return self.sharded.save(place_of(directory))

    def load_sharded(self, directory: str) -> None:
        """See `ShardedPolicy.load`."""
        with self._phase("checkpoint"):
            self.sharded.load(place_of(directory))

    def _get_optimizer_state(self) -> dict[str, Any]:
        """Nothing: sharded state cannot travel as one learner's numpy; see `save_sharded`."""
        return {}

    def _set_optimizer_state(self, state: dict[str, Any]) -> None:
        """Nothing: see `load_sharded`."""

    def _phase(self, name: str) -> AbstractContextManager[None]:
        return self.telemetry.timed("learner_seconds", phase=name)

    # Metrics; every rank logs the same numbers, so RLlib's mean over learners is the number itself

    def _log_gaps(self, batch: RolloutBatch, scores: RolloutScores) -> None:
        """How far the sampler's log-probs, and values where it gives them, are from the learner's own."""
        gaps = measure_gaps(batch, scores, self.module[DEFAULT_MODULE_ID].weights_version)
        if gaps.samples:
            self._gaps = gaps
        mean, largest = self._gaps.log_prob_mean, self._gaps.log_prob_max
        self._log(logprob_gap_mean=mean, logprob_gap_max=largest, logprob_gap_samples=gaps.samples)
        if batch.behaviour_values is not None:
            self._log(value_gap_mean=self._gaps.value_mean, value_gap_max=self._gaps.value_max)

    def _log_targets(self, batch: RolloutBatch, values: Tensor, targets: Tensor, advantages: Tensor) -> None:
        error, centred = (targets - values).double(), targets.double()
        sums = fsdp.all_reduce_sums(
            {
                "n": float(batch.num_decisions),
                "advantage": advantages.abs().sum().item(),
                "reward": batch.rewards.sum().item(),
                "value": values.sum().item(),
                "error": error.sum().item(),
                "error2": error.square().sum().item(),
                "target": centred.sum().item(),
                "target2": centred.square().sum().item(),
            }
        )
        n = sums["n"]
        target_variance = sums["target2"] / n - (sums["target"] / n) ** 2
        error_variance = sums["error2"] / n - (sums["error"] / n) ** 2
        self._log(
            advantage_abs_mean=sums["advantage"] / n,
            reward_mean=sums["reward"] / n,
            value_mean=sums["value"] / n,
            explained_variance=1.0 - error_variance / target_variance if target_variance > 0 else 0.0,
        )

    def _log_optimization(
        self, history: list[dict[str, float]], skipped: Sequence[bool], num_valid: Sequence[int]
    ) -> None:
        """Of each minibatch."""
        self._log(
            **{name: float(np.mean([entry[name] for entry in history])) for name in history[0]},
            **{f"first_{name}": history[0][name] for name in FIRST_MINIBATCH},
            optimizer_steps=float(len(history)),
            **self._applied(),
            skipped_updates=float(sum(skipped)),
            trained_samples=float(sum(num_valid)),
        )

    def _applied(self) -> dict[str, float]:
        """What the update was made with, read from what made it."""
        training = self.settings.training
        (policy,), (critic,) = (self.sharded.optimizers[name].param_groups for name in (POLICY, CRITIC))
        return {
            "applied_lr": policy["lr"],
            "applied_value_lr": critic["lr"],
            "applied_weight_decay": policy["weight_decay"],
            "applied_clip_low": training.clip_low,
            "applied_clip_high": training.clip_high,
            "applied_minibatch_size": float(training.minibatch_size),
            "applied_temperature": self.settings.temperature,
        }

    def _log(self, **values: float) -> None:
        for name, value in values.items():
            self.metrics.log_value((DEFAULT_MODULE_ID, name), value, reduce="mean", window=1)

    def _log_steps(self, batch: RolloutBatch) -> None:
        """Of this rank: RLlib adds up the learners. A step of a module is a decision."""
        env_steps, decisions = int(batch.durations.sum()), batch.num_decisions
        self.metrics.log_value((ALL_MODULES, NUM_ENV_STEPS_TRAINED), env_steps, reduce="sum")
        self.metrics.log_value((ALL_MODULES, NUM_ENV_STEPS_TRAINED_LIFETIME), env_steps, reduce="lifetime_sum")
        self.metrics.log_value((ALL_MODULES, NUM_MODULE_STEPS_TRAINED_LIFETIME), decisions, reduce="lifetime_sum")


def _fetched(ref: Any) -> Any:
    """A contribution; None where it was lost."""
    try:
        return ray.get(ref) if isinstance(ref, ray.ObjectRef) else ref
    except ray.exceptions.RayError as error:
        logger.warning("a contribution of a slot was lost: %s", error)
        return None
