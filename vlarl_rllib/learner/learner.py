"""PPO on an FSDP2-sharded OpenVLA, as an RLlib Learner.

RLlib's own update loop forwards a whole batch at once, shards episodes unevenly and steps per minibatch without accumulation. Here
`update` keeps RLlib's place and hooks but runs: one chunked pass for values and log-probs, GAE, then for each minibatch as many
forward and backward passes as memory asks for and one optimiser step. Every rank makes the same number of forwards, always: FSDP
gathers parameters in each, so an unequal number would hang until the process group's time-out.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray
import torch
import torch.distributed as dist
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.utils.metrics import (
    ALL_MODULES,
    NUM_ENV_STEPS_TRAINED,
    NUM_ENV_STEPS_TRAINED_LIFETIME,
    NUM_MODULE_STEPS_TRAINED_LIFETIME,
)
from torch import Tensor, nn

from vlarl_rllib.errors import DivergedError, lower_the_rates
from vlarl_rllib.learner import fsdp
from vlarl_rllib.learner.advantages import advantages_and_targets
from vlarl_rllib.learner.checkpoint import load_sharded, save_sharded
from vlarl_rllib.learner.collate import RolloutBatch, UpdatePlan, collate
from vlarl_rllib.learner.loss import LossInputs, LossSettings, ppo_loss
from vlarl_rllib.policy.rl_module import ACTION_LOGITS, VALUES
from vlarl_rllib.settings import Settings, calculate_runtime_args
from vlarl_rllib.types import WeightManifest

logger = logging.getLogger(__name__)

POLICY, CRITIC = "policy", "critic"
"""Names of the two optimisers; during critic warm-up only the second one steps."""

FIRST_MINIBATCH = ("policy_loss", "value_loss", "ratio_deviation", "clip_fraction")
"""What is also logged of an iteration's first minibatch alone, before the weights have moved."""

FEW_PATCHES = 64
"""Up to so many image tokens the CPU goes without PyTorch's fused attention: slower with 16, faster with 256 (see below), even in between."""


LOOPBACK = "127.0.0.1"


class VLALearner(PPOTorchLearner):
    """One FSDP rank. `config.vla` holds the settings; see `config.VLAPPOConfig`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.settings = Settings.from_dict(self.config.vla)
        self._rank, self._world_size = 0, 1
        self._batch: RolloutBatch | None = None
        self._skipped_in_a_row = 0
        self._publisher: Any = None
        self._store_socket: socket.socket | None = None

    # Start and end

    def node(self) -> str:
        """Which node this actor is on."""
        return ray.get_runtime_context().get_node_id()

    def rendezvous(self, one_node: bool) -> tuple[str, int]:
        """Open the socket of the process group's store on rank 0; its address and port.

        The store takes commands from whoever connects, so it listens to this machine alone where all learners are on it.
        """
        self._store_socket = socket.create_server((LOOPBACK if one_node else ray.util.get_node_ip_address(), 0))
        return self._store_socket.getsockname()

    def ping(self) -> None:
        """Answers as long as the actor lives and is not busy."""

    def join(self, rank: int, world_size: int, address: str, port: int) -> int:
        """Join the process group of all learners; call it on all of them at once, before `build`. Returns the process id."""
        self._rank, self._world_size = rank, world_size
        timeout = self.settings.learners.timeout_seconds
        if address == LOOPBACK:  # the backends' own sockets too
            for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(variable, "lo")
        listening = {"master_listen_fd": self._store_socket.detach()} if self._store_socket else {}
        store = dist.TCPStore(address, port, world_size, is_master=rank == 0, timeout=timedelta(seconds=timeout), use_libuv=False, **listening)
        fsdp.init_process_group(self._choose_device(), rank, world_size, store, timeout)
        return os.getpid()

    def build(self) -> None:
        if not dist.is_initialized():  # a local learner: FSDP needs a group even for one rank
            fsdp.init_process_group(self._choose_device(), 0, 1, dist.HashStore(), self.settings.learners.timeout_seconds)
        super().build()

    def shutdown(self) -> None:
        if self._publisher is not None:
            self._publisher.close()
            self._publisher = None
        if dist.is_initialized():
            dist.destroy_process_group()

    def _choose_device(self) -> torch.device:
        return torch.device("cuda", 0) if self.settings.learners.gpus else torch.device("cpu")

    # What RLlib's build() asks for

    def _make_module(self) -> Any:
        """Sharding comes before the optimisers, which RLlib keys by parameter identity."""
        from vlarl_rllib.models.openvla import OpenVLAProcessor

        model = self.settings.model
        module = super()._make_module()
        self._processor = OpenVLAProcessor.from_pretrained(model.path)
        if self._device.type == "cpu":
            # The switch is the CPU's too. `small` (41 tokens) takes 369 instead of 422 ms for 128 samples without fused attention, on 2 cores;
            # a Llama of its width 165 instead of 122 ms for 8 sequences of 300 tokens.
            torch.backends.cuda.enable_flash_sdp(module[DEFAULT_MODULE_ID].policy.config.num_patches > FEW_PATCHES)
        ranks = self._world_size
        for sharded in module[DEFAULT_MODULE_ID].sharded_models:
            fsdp.shard_model(
                sharded,
                device=self._device,
                mesh_shape=calculate_runtime_args(self.settings).mesh if ranks == max(1, self.settings.learners.num) else (1, ranks),
                compute_dtype=None if model.lora else getattr(torch, model.dtype),
                settings=self.settings.learners.fsdp,
            )
        return module

    def _map_module_to_device(self, module: Any) -> None:
        """Nothing: FSDP places the shards."""

    def _make_modules_ddp_if_necessary(self) -> None:
        """Nothing: FSDP reduces the gradients."""

    def add_module(self, **kwargs: Any) -> Any:
        raise NotImplementedError("VLALearner trains exactly one policy; start another trial for another policy")

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """AdamW for the policy and, with its own learning rate, for value head or critic. Frozen parameters belong to neither."""
        training = self.settings.training
        policy_lr, policy_weight_decay = self._policy_rates()
        named = [(name, p) for name, p in self.trained_modules().named_parameters() if p.requires_grad]
        groups = {
            POLICY: ([p for name, p in named if not _is_critics(name)], policy_lr, policy_weight_decay),
            CRITIC: ([p for name, p in named if _is_critics(name)], training.value_lr, 0.0),
        }
        for name, (params, lr, weight_decay) in groups.items():
            assert all(p.dtype == torch.float32 for p in params), "AdamW's steps vanish in bfloat16"
            optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, fused=True)
            self.register_optimizer(module_id=module_id, optimizer_name=name, optimizer=optimizer, params=params)

    def _policy_rates(self) -> tuple[float, float]:
        """(learning rate, weight decay) of the policy."""
        return self.settings.training.lr, self.settings.training.weight_decay

    @property
    def policy(self) -> nn.Module:
        """The sharded OpenVLA, with its value head where the critic is not separate."""
        return self.module[DEFAULT_MODULE_ID].policy

    def trained_modules(self) -> nn.ModuleDict:
        """All that is trained: `policy` and, where it is separate, `critic`."""
        module = self.module[DEFAULT_MODULE_ID]
        return nn.ModuleDict({POLICY: module.policy} | ({CRITIC: module.critic} if module.critic is not None else {}))

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {name: self.get_optimizer(DEFAULT_MODULE_ID, name) for name in (POLICY, CRITIC)}

    # One iteration

    def receive(self, refs: list[Any]) -> list[int | None]:
        """Fetch this rank's contributions one by one; their steps, or None where the data was lost with its runner."""
        contributions: list[Any] = []
        for ref in refs:
            try:
                contributions.append(ray.get(ref) if isinstance(ref, ray.ObjectRef) else ref)
            except ray.exceptions.RayError as error:
                logger.warning("a contribution of a slot was lost: %s", error)
                contributions.append(None)
        kept = [contribution for contribution in contributions if contribution]
        self._batch = collate(kept, self._processor.prompt_ids) if kept else None
        return [sum(map(len, contribution)) if contribution else None for contribution in contributions]

    def update(self, training_data: Any = None, *, timesteps: dict[str, Any] | None = None, plan: UpdatePlan, iteration: int, **kwargs: Any) -> Any:
        """One PPO iteration on the contributions that `receive` fetched.

        Args:
            plan: the owners and steps of all ranks' contributions, the same on every rank.
            iteration: counts from 0; decides about critic warm-up.
        """
        self._check_is_built()
        assert self._batch is not None, "receive() comes before update()"
        batch, self._batch = self._batch, None
        self.before_gradient_based_update(timesteps=timesteps or {})
        self._weights_seq_no += 1
        targets = self._targets(batch)
        self._optimize(batch, targets, plan, warm_up=iteration < self.settings.training.critic_warmup_iterations)
        self._require_finite_weights()
        self._log_steps(sum(plan.steps))
        self.after_gradient_based_update(timesteps=timesteps or {})
        return self.metrics.reduce()

    def _targets(self, batch: RolloutBatch) -> dict[str, Tensor]:
        """Values, advantages and old log-probs before the first optimiser step; everything [N], log-probs [N, A]."""
        training = self.settings.training
        values, log_probs = self._score(batch)
        old_values = values[: batch.num_steps]
        advantages, value_targets = advantages_and_targets(batch, values, self.settings)
        self._log_targets(batch, old_values, value_targets, advantages, log_probs)
        return {
            "old_values": old_values,
            "value_targets": value_targets,
            "advantages": fsdp.normalize(advantages) if training.advantages == "gae" and training.normalize_advantages else advantages,
            "old_log_probs": log_probs if training.old_log_probs == "recompute" else batch.behaviour_log_probs,
        }

    @torch.no_grad()
    def _score(self, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
        """Values [N+K] of all frames and log-probs [N, A] of the tokens taken, in passes of `micro_batch_size`."""
        size = self.settings.learners.micro_batch_size
        num_passes = int(fsdp.all_reduce_max(-(-len(batch.frames) // size)))
        values, log_probs = [], []
        for i in range(num_passes):
            frames = np.arange(i * size, min((i + 1) * size, len(batch.frames)))
            out = self._forward(batch, frames)
            values.append(out[VALUES].cpu()[: len(frames)])
            log_probs.append(out["log_probs"].cpu()[: len(frames)])
        return torch.cat(values).float(), torch.cat(log_probs)[: batch.num_steps]

    def _forward(self, batch: RolloutBatch, frames: np.ndarray) -> dict[str, Tensor]:
        """One pass through the sharded policy. Without frames a dummy row runs, so that no rank misses a collective."""
        inputs = batch.model_inputs(frames if len(frames) else np.zeros(1, dtype=np.int64), self._device)
        out = self.module[DEFAULT_MODULE_ID].forward_train(inputs)
        distribution = torch.log_softmax(out[ACTION_LOGITS] / self.settings.temperature, dim=-1)
        chosen = inputs["action_tokens"] - cast(range, self.policy.action_token_ids)[0]
        return {
            VALUES: out[VALUES],
            "log_probs": distribution.gather(-1, chosen[..., None])[..., 0],
            "entropy": -(distribution.exp() * distribution).sum((-2, -1)),
        }

    def _optimize(self, batch: RolloutBatch, targets: dict[str, Tensor], plan: UpdatePlan, *, warm_up: bool) -> None:
        training = self.settings.training
        keys = {name: getattr(training, name) for name in LossSettings.__dataclass_fields__ if name != "train_policy"}
        loss_settings = LossSettings(**keys, train_policy=not warm_up)
        if training.advantages != "gae":  # nothing reads a critic
            loss_settings = replace(loss_settings, vf_coeff=0.0)
        history: list[dict[str, float]] = []
        for minibatch in plan.minibatches(self._rank, training.num_epochs, training.minibatch_size, self.settings.learners.micro_batch_size):
            sums: dict[str, float] = {}
            for i, steps in enumerate(minibatch.forwards):
                for model in self.trained_modules().values():
                    model.set_requires_gradient_sync(i == len(minibatch.forwards) - 1)  # type: ignore[operator]
                outputs = ppo_loss(self._loss_inputs(batch, targets, steps, minibatch.num_valid), loss_settings)
                # FSDP averages gradients over ranks; the loss is already divided by the steps of all of them.
                (outputs.loss * self._world_size).backward()
                for name, value in outputs.sums.items():
                    sums[name] = max(sums.get(name, 0.0), float(value)) if name == "ratio_deviation" else sums.get(name, 0.0) + float(value)
            history.append(self._finish_minibatch(sums, minibatch.num_valid, warm_up=warm_up))
        self._log_optimization(history)

    def _loss_inputs(self, batch: RolloutBatch, targets: dict[str, Tensor], steps: np.ndarray, num_valid: int) -> LossInputs:
        out = self._forward(batch, steps)
        rows = steps if len(steps) else np.zeros(1, dtype=np.int64)
        on_device = {name: target[rows].to(self._device) for name, target in targets.items()}
        return LossInputs(
            log_probs=out["log_probs"],
            entropy=out["entropy"],
            values=out[VALUES].float(),
            behaviour_log_probs=(targets["old_log_probs"] if self.settings.training.old_log_probs == "behaviour" else batch.behaviour_log_probs)[
                rows
            ].to(self._device),
            mask=torch.full((len(rows),), len(steps) > 0, device=self._device),
            num_valid=float(num_valid),
            **on_device,
        )

    def _finish_minibatch(self, sums: dict[str, float], num_valid: int, *, warm_up: bool) -> dict[str, float]:
        """Clip, check, step; the minibatch's metrics averaged over the steps of all ranks."""
        norms, finite = self._step_optimizers((CRITIC,) if warm_up else (POLICY, CRITIC))
        deviation = fsdp.all_reduce_max(sums.pop("ratio_deviation"))
        means = {name: total / num_valid for name, total in fsdp.all_reduce_sums(sums).items()}
        return means | {"ratio_deviation": deviation, "grad_norm": norms[POLICY], "grad_norm_critic": norms[CRITIC], "skipped": float(not finite)}

    def _step_optimizers(self, names: Sequence[str]) -> tuple[dict[str, float], bool]:
        """Clip all gradients and step the optimisers of these names; (gradient norms, whether they were finite: else nothing steps)."""
        optimizers = self.optimizers()
        norms = {name: fsdp.clip_grad_norm(_parameters(optimizer), self.settings.training.grad_clip) for name, optimizer in optimizers.items()}
        finite = all(np.isfinite(norm) for norm in norms.values())
        if finite:
            self._skipped_in_a_row = 0
            for name in names:
                optimizers[name].step()
        else:
            self._skip(norms)
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        return norms, finite

    def _skip(self, norms: dict[str, float]) -> None:
        self._skipped_in_a_row += 1
        logger.warning("non-finite gradient norm %s: optimiser step skipped (%d in a row)", norms, self._skipped_in_a_row)
        limit = self.settings.training.max_skipped_updates
        if self._skipped_in_a_row > limit:
            steps = self._skipped_in_a_row
            raise self._diverged(f"{steps} optimiser steps in a row had a non-finite gradient, more than training.max_skipped_updates = {limit}")

    def _require_finite_weights(self) -> None:
        """Before engines or a checkpoint get them; all ranks take part. Raises DivergedError."""
        shards = [fsdp.local_shard(parameter) for optimizer in self.optimizers().values() for parameter in _parameters(optimizer)]
        finite = all(bool(norm.isfinite()) for norm in torch._foreach_norm([shard for shard in shards if shard.numel()], float("inf")))
        if fsdp.all_reduce_max(float(not finite)):
            raise self._diverged("the update left weights that are not finite")

    def _diverged(self, what: str) -> DivergedError:
        return DivergedError(f"{what}; {lower_the_rates(self._rates())}")

    def _rates(self) -> dict[str, float]:
        """The learning rates by their settings' keys."""
        return {"training.lr": self.settings.training.lr, "training.value_lr": self.settings.training.value_lr}

    # Weights and checkpoints

    def publish_weights(self, version: int) -> WeightManifest | None:
        """Gather the policy and write it where engines read it; all ranks take part, rank 0 returns the manifest."""
        from vlarl_rllib.weights.source import iterate_weights

        tensors = iterate_weights(self.policy, getattr(torch, self.settings.engines.dtype), to_host=self._rank == 0)
        self.module[DEFAULT_MODULE_ID].weights_version = version
        if self._rank != 0:
            for _ in tensors:
                pass
            return None
        if self._publisher is None:
            from vlarl_rllib.weights import make_publisher

            self._publisher = make_publisher(self.settings.weights)
        return self._publisher.publish(version, tensors)

    def retire_weights(self, before: int) -> None:
        """Free the versions below `before`, once all engines hold a newer one."""
        if self._publisher is not None:
            self._publisher.retire(before)

    def save_sharded(self, directory: str) -> None:
        """Write parameters and optimiser state; all ranks take part."""
        save_sharded(Path(directory), self.trained_modules(), self.optimizers())

    def load_sharded(self, directory: str) -> None:
        """Read what `save_sharded` wrote, also with another number of ranks; all ranks take part."""
        load_sharded(Path(directory), self.trained_modules(), self.optimizers())

    def _get_optimizer_state(self) -> dict[str, Any]:
        """Nothing: sharded state cannot travel as one learner's numpy; see `save_sharded`."""
        return {}

    def _set_optimizer_state(self, state: dict[str, Any]) -> None:
        """Nothing: see `load_sharded`."""

    # Metrics; every rank logs the same numbers, so RLlib's mean over learners is the number itself

    def _log_targets(self, batch: RolloutBatch, values: Tensor, targets: Tensor, advantages: Tensor, log_probs: Tensor) -> None:
        gap = (log_probs - batch.behaviour_log_probs).abs()
        error, centred = (targets - values).double(), targets.double()
        sums = fsdp.all_reduce_sums(
            {
                "n": float(batch.num_steps),
                "gap": gap.mean(1).sum().item(),
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
            logprob_gap_mean=sums["gap"] / n,
            logprob_gap_max=fsdp.all_reduce_max(gap.max().item()),
            advantage_abs_mean=sums["advantage"] / n,
            reward_mean=sums["reward"] / n,
            value_mean=sums["value"] / n,
            explained_variance=1.0 - error_variance / target_variance if target_variance > 0 else 0.0,
        )

    def _log_optimization(self, history: list[dict[str, float]]) -> None:
        means = {name: float(np.mean([entry[name] for entry in history])) for name in history[0] if name != "skipped"}
        self._log(
            **means,
            **{f"first_{name}": history[0][name] for name in FIRST_MINIBATCH},
            optimizer_steps=float(len(history)),
            **self._applied(),
            skipped_updates=sum(entry["skipped"] for entry in history),
        )

    def _applied(self) -> dict[str, float]:
        """What the update was made with, read from what made it."""
        training = self.settings.training
        (policy,), (critic,) = (optimizer.param_groups for optimizer in self.optimizers().values())
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

    def _log_steps(self, num_steps: int) -> None:
        share = num_steps / self._world_size  # RLlib adds up the learners
        self.metrics.log_value((ALL_MODULES, NUM_ENV_STEPS_TRAINED), share, reduce="sum")
        self.metrics.log_value((ALL_MODULES, NUM_ENV_STEPS_TRAINED_LIFETIME), share, reduce="lifetime_sum")
        self.metrics.log_value((ALL_MODULES, NUM_MODULE_STEPS_TRAINED_LIFETIME), share, reduce="lifetime_sum")


def _is_critics(name: str) -> bool:
    """Whether a parameter of `trained_modules` is the critic's."""
    return name.startswith((f"{CRITIC}.", f"{POLICY}.value_head."))


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]
