"""Supervised fine-tuning on demonstrations, on the same kind of sharded policy as PPO (the recipe of OpenVLA's
fine-tuning).

Each rank reads its share of the episodes and goes through them in an order of its own. The loss is the mean
cross-entropy of a decision's action tokens and, where they are sampled one after the other, of the end of sequence,
over the full vocabulary. What a step learns from follows from its number and the run's seed: so a checkpoint needs the
number alone. Nothing in a step waits for the device; what is reported is read once a call.

m = demonstrated steps of a forward pass, K = actions of a decision, A = its tokens, G = targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlarl_rllib.data.augment import augment, draw
from vlarl_rllib.data.rlds import RLDSDataset
from vlarl_rllib.errors import lower_the_rates
from vlarl_rllib.learner import fsdp
from vlarl_rllib.learner.demonstrations import DemonstrationBatch, Demonstrations
from vlarl_rllib.learner.rank import Rank
from vlarl_rllib.learner.sharded_policy import POLICY, OptimizerStep, ShardedPolicy
from vlarl_rllib.models.family import family_of
from vlarl_rllib.models.presets import models_here
from vlarl_rllib.process.storage import FileFacts, place_of
from vlarl_rllib.settings import Settings, SFTSettings

CPU_FRAMES_BYTES, GPU_FRAMES_SHARE = 1e9, 0.1
"""What decoded frames may take where `sft.frames_gb` does not say: of host memory, and of a learner's part of a GPU."""


class Pass(NamedTuple):
    """What a forward pass is reported by, still on the device."""

    loss: Tensor
    """[] float32: sum over its targets, in nats."""
    likely: Tensor
    """[m, A] int64: the most likely tokens."""
    targets: Tensor
    """[m, G] int64"""
    actions: Tensor
    """[m, K, 7] float32: demonstrated, normalised."""


class SupervisedLearner(Rank):
    """One FSDP rank that imitates.

    Args:
        settings: of the run, as a dictionary.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = Settings.from_dict(settings)

    def build(self) -> None:
        """Load the policy and the list of episodes. Collective."""
        from vlarl_rllib.models.build import build_policy

        model, sft = models_here(self.settings.model), self.settings.sft
        with ThreadPoolExecutor(
            1, "reader"
        ) as pool:  # TensorFlow takes as long to import, in its process, as the policy to build
            self._reading = pool.submit(self._read)
            self.join_alone()
            self._device = self.choose_device()
            torch.manual_seed(
                self.settings.run.seed
            )  # fresh adapters; the same on every rank, which keeps its own shard of them
            self._family = family_of(model.path, model.family_reference)
            self._processor = self._family.processor(model.path)
            self._facts = self._family.read_facts(model.path)
            self._num_targets = self._facts.actions.num_targets
            self.sharded = ShardedPolicy(
                build_policy(model, self._device),
                None,
                self._family,
                self._facts.actions,
                self.settings,
                device=self._device,
                rank=self._rank,
                world_size=self._world_size,
                lr=sft.lr,
                weight_decay=sft.weight_decay,
                if_diverged=lower_the_rates({"sft.lr": sft.lr}),
            )
            self._imitate = self.sharded.repeated(self._imitated)

    def shutdown(self) -> None:
        if hasattr(self, "sharded"):
            self.sharded.close()
        self.leave()

    def save_sharded(self, directory: str) -> dict[str, FileFacts]:
        """See `ShardedPolicy.save`."""
        return self.sharded.save(place_of(directory))

    def load_sharded(self, directory: str) -> None:
        """See `ShardedPolicy.load`."""
        self.sharded.load(place_of(directory))

    def with_weights(self, use: Callable[[dict[str, Tensor]], None]) -> None:
        """Have rank 0 call `use` with the whole policy by published name, on the CPU. Collective."""
        tensors = self.sharded.gather()
        if self._rank == 0:
            use(dict(tensors))
        for _ in tensors:
            pass

    def _read(self) -> RLDSDataset:
        sft = self.settings.sft
        assert sft.data is not None, "the command checks it"
        return RLDSDataset(sft.data, sft.split, self._rank, self._world_size, shuffle_seed=self.settings.run.seed)

    def open_data(self, statistics: dict[str, list[float]], step: int = 0) -> int:
        """Take this rank's share of the demonstrations; how many steps it has.

        Args:
            statistics: of the actions, as `norm_stats` has them.
            step: optimiser steps that were made before; learning goes on behind them.

        Raises:
            FileNotFoundError, ValueError, ImportError: see `RLDSDataset`.
        """
        sft = self.settings.sft
        data = self._reading.result()
        if not len(data):
            raise ValueError(
                f"sft.data: rank {self._rank} of {self._world_size} gets no episode of {sft.split}; use fewer "
                "learners or more data"
            )
        self._codec = self._family.codec(self._facts, statistics)
        demonstrations = Demonstrations(
            data,
            self._processor,
            self._codec,
            self._facts.actions,
            self._device,
            batch_size=sft.batch_size // self._world_size,
            frames_bytes=self._frames_bytes(),
            fixed_length=self.sharded.fixed_shapes,
        )
        self._generator = torch.Generator()
        self._num_steps = step
        self._batches = demonstrations.batches(step)
        return len(data)

    def _frames_bytes(self) -> float:
        """Memory for decoded frames on the device."""
        sft, learners = self.settings.sft, self.settings.learners
        if sft.frames_gb is not None:
            return sft.frames_gb * 1e9
        if self._device.type == "cpu":
            return CPU_FRAMES_BYTES
        return GPU_FRAMES_SHARE * learners.gpus * torch.cuda.get_device_properties(self._device).total_memory

    def supervise(self, num_steps: int) -> dict[str, float]:
        """Make that many optimiser steps; sums over their demonstrations, the same on every rank. See `means`.

        Returns:
            samples, steps, loss (nats per target), correct (share of the action tokens), l1 (between the most likely
            actions and the demonstrated ones, normalised to [-1, 1], per number), grad_norm, skipped (steps with a
            non-finite gradient).
        """
        passes: list[Pass] = []
        steps: list[OptimizerStep] = []
        for _ in range(num_steps):
            self._generator.manual_seed((self.settings.run.seed * 1_000_003 + self._num_steps) * 1024 + self._rank)
            passes += self._accumulate(next(self._batches))
            for group in self.sharded.optimizers[POLICY].param_groups:
                group["lr"] = self.settings.sft.lr * rate_factor(self._num_steps, self.settings.sft)
            self._num_steps += 1
            steps.append(self.sharded.step((POLICY,)))
        norms, skipped = self.sharded.settle(steps)
        samples = num_steps * self.settings.sft.batch_size
        counts = {
            "samples": float(samples),
            "steps": float(num_steps),
            "grad_norm": sum(norm[POLICY] for norm in norms),
            "skipped": float(sum(skipped)),
        }
        return fsdp.all_reduce_sums(self._sums(passes)) | counts

    def _accumulate(self, batch: DemonstrationBatch) -> list[Pass]:
        """Forward and backward passes of one optimiser step, without waiting for the device."""
        size, passes = self.settings.learners.micro_batch_size, []
        starts = range(0, len(batch.targets), size)
        for start in starts:
            self.sharded.reduce_gradients(in_this_pass=start == starts[-1])
            rows = slice(start, start + size)
            inputs, targets = {name: tensor[rows] for name, tensor in batch.inputs.items()}, batch.targets[rows]
            if self.settings.sft.augment:
                inputs["pixel_values"] = augment(inputs["pixel_values"], draw(len(targets), self._generator))
            passes.append(Pass(**self._imitate(inputs | {"action_tokens": targets}), actions=batch.actions[rows]))
        return passes

    def _imitated(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Forward and backward; of `Pass`, what the model has to do with."""
        targets = inputs["action_tokens"]
        logits = self.sharded.forward(**inputs, full_vocabulary=True).action_logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        self.sharded.backward(loss / (self.settings.sft.batch_size * self._num_targets))
        likely = logits.detach()[:, : self._facts.actions.num_tokens].argmax(-1)
        return {"loss": loss.detach(), "likely": likely, "targets": targets}

    def _sums(self, passes: Sequence[Pass]) -> dict[str, float]:
        """Over this rank's demonstrations; the device is waited for."""
        losses = torch.stack([each.loss for each in passes]).tolist()
        likely, targets, actions = (torch.cat(tensors).cpu().numpy() for tensors in list(zip(*passes, strict=True))[1:])
        ids, tokens = self._facts.actions.token_ids, self._facts.actions.num_tokens
        predicted = self._codec.normalized(likely.clip(ids[0], ids[-1]))
        return {
            "loss": sum(losses) / self._num_targets,
            "correct": float((likely == targets[:, :tokens]).sum()) / tokens,
            "l1": float(np.abs(predicted - actions).sum()) / actions[0].size,
        }


def means(sums: dict[str, float]) -> dict[str, float]:
    """Of what `SupervisedLearner.supervise` returned, also of several calls added up.

    Returns:
        loss (nats per target), token_accuracy (of the action tokens), l1 (per number of the action), grad_norm, skipped
        (a count).
    """
    samples = sums["samples"]
    return {
        "loss": sums["loss"] / samples,
        "token_accuracy": sums["correct"] / samples,
        "l1": sums["l1"] / samples,
        "grad_norm": sums["grad_norm"] / sums["steps"],
        "skipped": sums["skipped"],
    }


def rate_factor(step: int, sft: SFTSettings) -> float:
    """What the learning rate of optimiser step `step`, counted from 0, is multiplied with: warm-up times schedule."""
    warmup = min(1.0, (step + 1) / sft.warmup_steps) if sft.warmup_steps else 1.0
    return warmup * (0.5 * (1.0 + math.cos(math.pi * step / sft.steps)) if sft.schedule == "cosine" else 1.0)
