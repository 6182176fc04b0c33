"""Supervised fine-tuning on demonstrations, on the same kind of sharded policy as PPO (the recipe of OpenVLA's
fine-tuning).

Each rank reads its share of the episodes and goes through them in an order of its own. The loss is the mean
cross-entropy of a decision's action tokens and, where they are sampled one after the other, of the end of sequence,
over the full vocabulary. What a step learns from follows from its number and the run's seed: so a checkpoint needs the
number alone.

b = demonstrated steps of one rank, S = image side in pixels, K = actions of a decision, A = its tokens, G = targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlarl_rllib.data.augment import augment, draw
from vlarl_rllib.data.rlds import RLDSDataset
from vlarl_rllib.envs.image import RESIZED_SIDE, resize_lanczos
from vlarl_rllib.errors import lower_the_rates
from vlarl_rllib.learner import fsdp
from vlarl_rllib.learner.rank import Rank
from vlarl_rllib.learner.sharded_policy import POLICY, ShardedPolicy
from vlarl_rllib.models.family import family_of
from vlarl_rllib.models.presets import models_here
from vlarl_rllib.process.storage import FileFacts, place_of
from vlarl_rllib.settings import Settings, SFTSettings

DECODING_THREADS = 4
"""Beside a GPU."""


@dataclass(frozen=True)
class DemonstrationBatch:
    """One optimiser step's demonstrations of one rank, in host memory."""

    inputs: dict[str, Tensor]
    """input_ids and attention_mask [b, L], pixel_values [b, 3, S, S] uint8."""
    targets: Tensor
    """[b, G] int64: action tokens, then the end of sequence where it is learned."""
    actions: Tensor
    """[b, K, 7] float32, normalised."""


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
            self._family = family_of(model.path, model.family)
            self._processor = self._family.processor(model.path)
            self._facts = self._family.read_facts(model.path)
            self._num_targets = self._facts.actions.num_tokens + (not self._facts.actions.parallel)
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
        self._data = self._reading.result()
        if not len(self._data):
            raise ValueError(
                f"sft.data: rank {self._rank} of {self._world_size} gets no episode of {sft.split}; use fewer "
                "learners or more data"
            )
        self._codec = self._family.codec(self._facts, statistics)
        self._generator = torch.Generator()
        self._num_steps = step
        epoch, position = divmod(step * self._share, len(self._data))
        self._data.load_state_dict({"epoch": epoch, "position": position})
        self._batches = self._make_batches()
        return len(self._data)

    @property
    def _share(self) -> int:
        """Demonstrated steps of an optimiser step that are this rank's."""
        return self.settings.sft.batch_size // self._world_size

    def supervise(self, num_steps: int) -> dict[str, float]:
        """Make that many optimiser steps; sums over their demonstrations, the same on every rank. See `means`.

        Returns:
            samples, steps, loss (nats per target), correct (share of the action tokens), l1 (between the most likely
            actions and the demonstrated ones, normalised to [-1, 1], per number), grad_norm, skipped (steps with a
            non-finite gradient).
        """
        sums = dict.fromkeys(("loss", "correct", "l1"), 0.0)
        norms, skipped = 0.0, 0
        for _ in range(num_steps):
            self._generator.manual_seed((self.settings.run.seed * 1_000_003 + self._num_steps) * 1024 + self._rank)
            for name, value in self._accumulate(next(self._batches)).items():
                sums[name] += value
            for group in self.sharded.optimizers[POLICY].param_groups:
                group["lr"] = self.settings.sft.lr * rate_factor(self._num_steps, self.settings.sft)
            self._num_steps += 1
            step_norms, finite = self.sharded.step((POLICY,))
            norms += step_norms[POLICY]
            skipped += not finite
        samples = num_steps * self.settings.sft.batch_size
        counts = {"samples": float(samples), "steps": float(num_steps), "grad_norm": norms, "skipped": float(skipped)}
        return fsdp.all_reduce_sums(sums) | counts

    def _accumulate(self, batch: DemonstrationBatch) -> dict[str, float]:
        """Forward and backward passes of one optimiser step; sums over this rank's demonstrations."""
        sums = dict.fromkeys(("loss", "correct", "l1"), 0.0)
        size, actions = self.settings.learners.micro_batch_size, self._facts.actions
        ids, tokens, numbers = actions.token_ids, actions.num_tokens, batch.actions[0].numel()
        starts = range(0, len(batch.targets), size)
        for start in starts:
            self.sharded.reduce_gradients(in_this_pass=start == starts[-1])
            rows = slice(start, start + size)
            inputs = {name: tensor[rows].to(self._device) for name, tensor in batch.inputs.items()}
            if self.settings.sft.augment:
                inputs["pixel_values"] = augment(
                    inputs["pixel_values"], draw(len(inputs["pixel_values"]), self._generator)
                )
            targets = batch.targets[rows].to(self._device)
            logits = self.sharded.forward(**inputs, action_tokens=targets, full_vocabulary=True).action_logits
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            self.sharded.backward(loss / (self.settings.sft.batch_size * self._num_targets))
            likely = logits[:, :tokens].argmax(-1).cpu()
            sums["loss"] += float(loss.detach()) / self._num_targets
            sums["correct"] += float((likely == batch.targets[rows, :tokens]).sum()) / tokens
            predicted = self._codec.normalized(likely.numpy().clip(ids[0], ids[-1]))
            sums["l1"] += float(np.abs(predicted - batch.actions[rows].numpy()).sum()) / numbers
        return sums

    # Data

    def _make_batches(self) -> Iterator[DemonstrationBatch]:
        """Batches without end; beside a GPU, the next one is made, by several threads, while the last one is
        learned."""
        indices = self._endless()
        if self._device.type == "cpu":  # threads would take turns with the learning one at the cores
            while True:
                yield self._make_batch(indices, map)
        with (
            ThreadPoolExecutor(1, "demonstrations") as ahead,
            ThreadPoolExecutor(DECODING_THREADS, "decoding") as decoders,
        ):
            coming: Future[DemonstrationBatch] = ahead.submit(self._make_batch, indices, decoders.map)
            while True:
                batch = coming.result()
                coming = ahead.submit(self._make_batch, indices, decoders.map)
                yield batch

    def _endless(self) -> Iterator[int]:
        while True:
            yield from self._data.indices()

    def _make_batch(self, indices: Iterator[int], each: Callable[..., Iterator[dict[str, Any]]]) -> DemonstrationBatch:
        chosen = list(each(self._example, islice(indices, self._share)))
        images = [example["image"] for example in chosen]
        inputs = self._processor.raw_inputs(images, [example["instruction"] for example in chosen])
        tokens, actions = self._codec.encode(np.stack([example["actions"] for example in chosen]))
        targets = np.full((len(chosen), self._num_targets), self._processor.end_token_id, dtype=np.int64)
        targets[:, : tokens.shape[1]] = tokens
        return DemonstrationBatch(inputs, torch.from_numpy(targets), torch.from_numpy(actions).float())

    def _example(self, index: int) -> dict[str, Any]:
        """A demonstrated step, its frame as the policy sees it before a crop, and as many actions as a decision has."""
        example = self._data[index]
        image = _resized(example["image"], self._processor.image_size)
        actions = self._data.actions_from(index, self._facts.actions.num_actions)
        return example | {"image": self._processor.resize(image), "actions": actions}


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


def _resized(image: np.ndarray, side: int) -> np.ndarray:
    """As the observation path resizes, before its crop; frames of the policy's own size stay as they are."""
    return image if len(image) == side else resize_lanczos(image, RESIZED_SIDE)
