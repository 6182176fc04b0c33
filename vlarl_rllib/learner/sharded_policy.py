"""A policy that is sharded over ranks and trained: forward, step, publish, save. Plain torch, for every way to learn.

N = rows of a forward pass, A = tokens of a row's decision, V = action ids.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import get_total_norm

from vlarl_rllib.errors import DivergedError
from vlarl_rllib.learner import fsdp
from vlarl_rllib.learner.casts import in_type
from vlarl_rllib.learner.checkpoint import load_sharded, save_sharded
from vlarl_rllib.models.family import ActionFormat, PolicyFamily
from vlarl_rllib.models.replay import Capture, GraphCapture, Pass, Replayed
from vlarl_rllib.process.storage import FileFacts, Place
from vlarl_rllib.settings import Settings, calculate_runtime_args
from vlarl_rllib.weights.publisher import Publisher
from vlarl_rllib.weights.source import iterate_weights, local_shard

logger = logging.getLogger(__name__)

POLICY, CRITIC = "policy", "critic"
"""Names of the two optimisers; during critic warm-up only the second one steps."""
MOST_REPLAYED = 10**9
"""Parameters up to which passes are CUDA graphs by default, and not compiled. Kernels of larger models take longer than
their launch; graphs would keep memory for their activations to themselves."""
FEW_PATCHES = 64
"""Up to so many image tokens the CPU goes without PyTorch's fused attention: slower with 16, faster with 256 (see
below), even in between."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What the policy says of actions that were taken, and the critic of the frames."""

    log_probs: Tensor
    """[N, A] of the tokens taken, in the tempered distribution over the action ids."""
    entropy: Tensor
    """[N] of the distributions of the executed tokens together, in nats."""
    values: Tensor
    """[N]"""
    reusable: Mapping[str, Tensor]
    """What later passes over the same frames may take instead of `pixel_values`; empty where the frames' way into the
    policy is trained."""


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    """What a step found, scalars that the device may still be computing."""

    norms: dict[str, Tensor]
    """Of the gradients, by optimiser, before they were clipped."""
    skipped: Tensor
    """1.0 where one of them was not finite and nothing stepped, else 0.0."""


class ShardedPolicy:
    """The models of one rank with their optimisers. What says "collective" must be called on all ranks, as often on
    each. A single rank holds them whole, without FSDP.

    Args:
        policy: with its value head, where it has one.
        family: of both.
        actions: how the policy writes a decision.
        critic: a separate one, or None.
        settings: of the run.
        lr, weight_decay: of the policy; the critic's are `training.value_lr` and none.
        if_diverged: what to do where numbers are not finite.
    """

    def __init__(
        self,
        policy: nn.Module,
        critic: nn.Module | None,
        family: PolicyFamily,
        actions: ActionFormat,
        settings: Settings,
        *,
        device: torch.device,
        rank: int,
        world_size: int,
        lr: float,
        weight_decay: float,
        if_diverged: str,
    ) -> None:
        self.policy, self.critic, self._family = policy, critic, family
        self._action_ids = actions.token_ids
        self._settings, self._device, self._rank, self._world_size = settings, device, rank, world_size
        self._if_diverged = if_diverged
        self._skipped_in_a_row = 0
        self._few_patches = device.type == "cpu" and bool(policy.num_image_tokens <= FEW_PATCHES)  # type: ignore[operator]
        kept = settings.model.lora is not None or settings.model.dtype == "float32"
        self._rounds_to: torch.dtype | None = None if kept else getattr(torch, settings.model.dtype)
        self._whole = world_size == 1 and not self._needs_fsdp()
        self._capture = self._make_capture()
        self._replayed = WeakSet[Replayed]()
        self._compiles = settings.compiles and not (settings.learners.compile is None and self._capture)
        self.fixed_shapes = self._compiles or self._capture is not None
        """Whether passes should have the same shapes each time: another shape is compiled, or recorded, anew."""
        self._calls = {name: self._make_ready(model) for name, model in self.trained_modules().items()}
        self._merges_ahead = self._whole and settings.merge_ahead
        self._reusable = family.frozen_inputs(policy) if critic is None else ()
        self._weights_changed()
        self.optimizers = self._make_optimizers(lr, weight_decay)
        """AdamW for the policy and, where something of it is trained, with its own learning rate for value head or
        critic."""
        engine_values, dtype = settings.training.values == "engine", getattr(torch, settings.engines.dtype)
        self.publisher = Publisher(policy, dtype, settings.weights, rank, value_head=engine_values)
        """This rank's part in bringing the policy to the engines."""

    def _make_ready(self, model: nn.Module) -> Callable[..., Any]:
        """Put a model where it computes, sharded or whole; how to call it."""
        learners, ranks = self._settings.learners, self._world_size
        if learners.fsdp.checkpoint_activations:
            self._family.checkpoint_activations(model)
        if self._whole:
            fsdp.place_whole(model, self._device)
        else:
            planned = calculate_runtime_args(self._settings).mesh if ranks == max(1, learners.num) else (1, ranks)
            fsdp.shard_model(
                model,
                self._family,
                device=self._device,
                mesh_shape=planned,
                compute_dtype=self._rounds_to,
                settings=learners.fsdp,
            )
        if self._compiles:
            torch._functorch.config.activation_memory_budget = learners.activation_memory_budget
            for unit in self._family.compile_units(model):
                unit.compile(dynamic=False)
        return in_type(model, self._rounds_to) if self._whole and self._rounds_to else model

    def _make_capture(self) -> Capture | None:
        """How passes are recorded, if they are."""
        wanted = self._settings.learners.cuda_graphs
        if wanted is None:
            size = sum(parameter.numel() for parameter in self.trained_modules().parameters())
            again = self._settings.learners.fsdp.checkpoint_activations
            wanted = self._whole and self._device.type == "cuda" and size <= MOST_REPLAYED and not again
        return GraphCapture() if wanted else None

    def repeated(self, run: Pass) -> Pass:
        """A pass that will be made many times with tensors of few shapes, as a CUDA graph where this policy uses them;
        see `Replayed` for what it must keep to."""
        if self._capture is None:
            return run
        replayed = Replayed(run, self._capture)
        self._replayed.add(replayed)
        return replayed

    def _needs_fsdp(self) -> bool:
        """Whether a single rank needs what only FSDP does: memory of the host, or rounded weights while activations
        are computed again."""
        chosen = self._settings.learners.fsdp
        return chosen.cpu_offload or (chosen.checkpoint_activations and self._rounds_to is not None)

    def _forget_gradients(self) -> None:
        """Before others than the optimisers change weights: torch takes optimisers that have gradients for such as keep
        no state, and loads none. What was recorded wrote where those gradients were."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        if (capture := self._make_capture()) is not None:
            self._capture = capture
            for replayed in self._replayed:
                replayed.forget(capture)

    @torch.no_grad()
    def _weights_changed(self) -> None:
        """Merge the adapters for all passes to come, where they are merged ahead."""
        if self._merges_ahead:
            from vlarl_rllib.models.lora import merge_ahead  # PEFT takes 2 s to import, which others do without

            merge_ahead(self.trained_modules())

    def _make_optimizers(self, lr: float, weight_decay: float) -> dict[str, torch.optim.Optimizer]:
        """Frozen parameters belong to none."""
        named = [(name, p) for name, p in self.trained_modules().named_parameters() if p.requires_grad]
        assert all(p.dtype == torch.float32 for _, p in named), "AdamW's steps vanish in bfloat16"
        groups = {
            POLICY: ([p for name, p in named if not _is_critics(name)], lr, weight_decay),
            CRITIC: ([p for name, p in named if _is_critics(name)], self._settings.training.value_lr, 0.0),
        }
        return {
            name: torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, fused=True)
            for name, (params, lr, weight_decay) in groups.items()
            if params
        }

    def reconfigure(self, settings: Settings, *, lr: float, weight_decay: float, if_diverged: str) -> None:
        """Learn with other settings from now on; arguments as the constructor's. Weights and moments stay."""
        self._settings, self._if_diverged, self._skipped_in_a_row = settings, if_diverged, 0
        for name, rates in ((POLICY, (lr, weight_decay)), (CRITIC, (settings.training.value_lr, 0.0))):
            if name in self.optimizers:
                for group in self.optimizers[name].param_groups:
                    group["lr"], group["weight_decay"] = rates

    @torch.no_grad()
    def begin_anew(self, policy: nn.Module, critic: nn.Module | None) -> None:
        """Take the trained weights of whole, unsharded models, the same on every rank, and forget all moments."""
        fresh = dict(_in_one(policy, critic).named_parameters())
        for name, parameter in self.trained_modules().named_parameters():
            if parameter.requires_grad:
                fsdp.fill(parameter, fresh[name])
        for optimizer in self.optimizers.values():
            optimizer.state.clear()
        self._forget_gradients()
        self._weights_changed()

    def trained_modules(self) -> nn.ModuleDict:
        """All that is trained: `policy` and, where it is separate, `critic`."""
        return _in_one(self.policy, self.critic)

    # Forward and backward

    def score(self, inputs: dict[str, Tensor], executed: Tensor, temperature: float) -> Scores:
        """One teacher-forced pass. Collective.

        Args:
            inputs: input_ids, attention_mask, action_tokens [N, A], and pixel_values or what `Scores.reusable` has
                for them, on this rank's device.
            executed: [N, A] bool, there too: tokens of actions that were played.
        """
        output = self.forward(**inputs)
        values = output.values
        if self.critic is not None:
            frames = {name: tensor for name, tensor in inputs.items() if name != "action_tokens"}
            with self._attention():
                values = self._calls[CRITIC](**frames).values
        distribution = torch.log_softmax(output.action_logits / temperature, dim=-1)
        chosen = inputs["action_tokens"] - self._action_ids[0]
        return Scores(
            log_probs=distribution.gather(-1, chosen[..., None])[..., 0],
            entropy=-torch.where(executed[..., None], distribution.exp() * distribution, 0.0).sum((-2, -1)),
            values=values,
            reusable={name: getattr(output, name) for name in self._reusable},
        )

    def forward(self, **inputs: Any) -> Any:
        """The policy's own output. Collective."""
        with self._attention():
            return self._calls[POLICY](**inputs)

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients. Collective.

        Args:
            loss: already divided by the steps, or samples, of all ranks.
        """
        with self._attention():  # of what activation checkpointing computes again
            (loss * self._world_size).backward()  # FSDP averages gradients over ranks

    def _attention(self) -> AbstractContextManager[None]:
        """Without PyTorch's fused attention where that is slower.

        `small` (41 tokens) takes 369 instead of 422 ms for 128 samples without it, on 2 cores; a Llama of its width
        165 instead of 122 ms for 8 sequences of 300 tokens.
        """
        return sdpa_kernel(SDPBackend.MATH) if self._few_patches else nullcontext()

    def reduce_gradients(self, *, in_this_pass: bool) -> None:
        """Say before a forward pass whether its gradients are reduced over the ranks: once for an optimiser step, in
        its last pass."""
        for model in self.trained_modules().values() if not self._whole else ():
            model.set_requires_gradient_sync(in_this_pass)  # type: ignore[operator]

    def step(self, names: Sequence[str]) -> OptimizerStep:
        """Clip all gradients and step the optimisers of these names; where a gradient norm is not finite, none steps.
        Collective. Waits for nothing, so that the device goes on while the next passes are launched; see `settle`.
        """
        clip = self._settings.training.grad_clip
        norms = {name: fsdp.clip_grad_norm(_parameters(optimizer), clip) for name, optimizer in self.optimizers.items()}
        skipped = 1.0 - torch.stack([*norms.values()]).isfinite().all().float()
        for name in names:
            optimizer: Any = self.optimizers[name]
            optimizer.found_inf = skipped  # what AMP's scaler tells fused optimisers, which then leave all as it is
            optimizer.step()
        self._weights_changed()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=self._capture is None)
        return OptimizerStep(norms, skipped)

    def settle(self, steps: Sequence[OptimizerStep]) -> tuple[list[dict[str, float]], list[bool]]:
        """Wait for these steps, the newest ones in order.

        Returns:
            The gradient norms by optimiser, and whether it was skipped, of each.

        Raises:
            DivergedError: more than `training.max_skipped_updates` in a row were skipped.
        """
        table = torch.stack([torch.stack([*step.norms.values(), step.skipped]) for step in steps]).tolist()
        norms = [dict(zip(self.optimizers, row[:-1], strict=True)) for row in table]
        skipped = [bool(row[-1]) for row in table]
        for found, one in zip(norms, skipped, strict=True):
            self._count(found, skipped=one)
        return norms, skipped

    def _count(self, norms: dict[str, float], *, skipped: bool) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if not skipped:
            return
        steps, limit = self._skipped_in_a_row, self._settings.training.max_skipped_updates
        logger.warning("non-finite gradient norm %s: optimiser step skipped (%d in a row)", norms, steps)
        if steps > limit:
            what = (
                f"{steps} optimiser steps in a row had a non-finite gradient, more than training.max_skipped_updates "
                f"= {limit}"
            )
            raise DivergedError(f"{what}; {self._if_diverged}")

    def require_finite_weights(self) -> None:
        """Before engines or a checkpoint get them. Collective. Raises DivergedError."""
        shards = [
            local_shard(parameter) for optimizer in self.optimizers.values() for parameter in _parameters(optimizer)
        ]
        largest = get_total_norm([shard for shard in shards if shard.numel()], float("inf"))
        finite = bool(largest.isfinite())
        if fsdp.all_reduce_max(float(not finite)):
            raise DivergedError(f"the update left weights that are not finite; {self._if_diverged}")

    # Weights and checkpoints

    def gather(self) -> Any:
        """(published name, whole tensor) of the policy, in the engines' type; on rank 0 on the CPU and copied, on the
        others uncopied.

        Collective: run it to its end.
        """
        return iterate_weights(self.policy, getattr(torch, self._settings.engines.dtype), to_host=self._rank == 0)

    def save(self, directory: Place) -> dict[str, FileFacts]:
        """Write parameters and optimiser state. Collective. Returns what this rank has written; see `save_sharded`."""
        return save_sharded(directory, self.trained_modules(), self.optimizers)

    def load(self, directory: Place) -> None:
        """Read what `save` wrote, also with another number of ranks. Collective."""
        self._forget_gradients()
        load_sharded(directory, self.trained_modules(), self.optimizers)
        self._weights_changed()
        self.publisher.forget()

    def close(self) -> None:
        """Free what was published."""
        self.publisher.close()


def _in_one(policy: nn.Module, critic: nn.Module | None) -> nn.ModuleDict:
    return nn.ModuleDict({POLICY: policy} | ({CRITIC: critic} if critic is not None else {}))


def _is_critics(name: str) -> bool:
    """Whether a parameter of `trained_modules` is the critic's."""
    return name.startswith((f"{CRITIC}.", f"{POLICY}.value_head."))


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]
