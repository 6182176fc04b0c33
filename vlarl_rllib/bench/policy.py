"""The policy of a benchmark: where it lies, what it is asked, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from peft import LoraConfig

from vlarl_rllib.envs.registry import task_instructions
from vlarl_rllib.models.family import PolicyFacts, PolicyFamily, family_of
from vlarl_rllib.models.flops import PolicyFlops, Training, training_of
from vlarl_rllib.models.interfaces import PolicyProcessor
from vlarl_rllib.models.lora import MAX_ALPHA, read_adapter_config
from vlarl_rllib.models.presets import resolve_model
from vlarl_rllib.settings import Settings
from vlarl_rllib.weights.source import expected_tensors

VALUE_HEAD = ("value_head.",)
"""Trained whole beside adapters."""


@dataclass(frozen=True)
class BenchPolicy:
    """Of these settings."""

    settings: Settings

    @cached_property
    def path(self) -> str:
        """A directory or hub id."""
        return resolve_model(self.settings.model.path)

    @cached_property
    def family(self) -> PolicyFamily:
        return family_of(self.path, self.settings.model.family_reference)

    @cached_property
    def facts(self) -> PolicyFacts:
        return self.family.read_facts(self.path)

    @cached_property
    def processor(self) -> PolicyProcessor:
        return self.family.processor(self.path)

    @cached_property
    def instructions(self) -> list[str]:
        """Of the tasks that are played."""
        env = self.settings.env
        every = task_instructions(env.suite, name=env.name)
        return [every[task] for task in self.settings.task_ids]

    def instruction(self, index: int) -> str:
        """The tasks' in turn."""
        return self.instructions[index % len(self.instructions)]

    def frames(self, count: int, seed: int = 0) -> np.ndarray:
        """[count, S, S, 3] uint8 of coarse noise: neighbouring pixels alike, as in pictures."""
        side, cells = self.facts.image_size, 8
        coarse = np.random.default_rng(seed).integers(0, 256, (count, cells, cells, 3), dtype=np.uint8)
        times = math.ceil(side / cells)
        return np.ascontiguousarray(coarse.repeat(times, 1).repeat(times, 2)[:, :side, :side])

    def tokens(self, count: int, seed: int = 0) -> np.ndarray:
        """[count, A] int64 random decisions."""
        ids = self.facts.actions.token_ids
        return np.random.default_rng(seed).integers(ids.start, ids.stop, (count, self.facts.actions.num_tokens))

    @cached_property
    def flops(self) -> PolicyFlops | None:
        """For prompts of the instructions' mean length; None where the family does not count."""
        lengths = [len(self.processor.prompt_ids(instruction)) for instruction in self.instructions]
        return self.family.count_flops(self.path, round(sum(lengths) / len(lengths)))

    def training_flops(self, *, supervised: bool = False) -> float | None:
        """Of the forward and backward pass for one sample."""
        if self.flops is None:
            return None
        chosen = self.flops.supervise if supervised else self.flops.score
        return chosen.training_flops(self._training_of, self.lora_config.r if self.lora_config else 0)

    def update_flops(self) -> float | None:
        """Of one trained sample with its share of the score pass, where there is one, which is one for all epochs; what
        is frozen is computed in that pass alone."""
        if self.flops is None or (training := self.training_flops()) is None:
            return None
        if not self.settings.training.scores_all:
            return training
        score, epochs = self.flops.score, self.settings.training.num_epochs
        return score.forward_flops / epochs + training - score.frozen_flops(self._training_of)

    @property
    def _training_of(self) -> Callable[[str], Training]:
        config = self.lora_config
        return training_of(config.target_modules if config else None, VALUE_HEAD)

    @cached_property
    def lora_config(self) -> LoraConfig | None:
        """PEFT's, of the run's adapters; None where all is trained."""
        if (lora := self.settings.model.lora) is None:
            return None
        if lora.adapter:
            return read_adapter_config(lora.adapter)
        targets = self.family.lora_targets[lora.targets] if isinstance(lora.targets, str) else lora.targets
        return LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha or min(lora.rank, MAX_ALPHA),
            target_modules=targets if isinstance(targets, str) else list(targets),
            init_lora_weights="gaussian",
        )

    @property
    def plain_loop(self) -> str:
        """What trains in `plain.PlainTrainer`."""
        return "loop with PEFT" if self.lora_config else "loop in torch"

    @cached_property
    def num_parameters(self) -> int:
        """Of all tensors as they are published."""
        shapes = expected_tensors(self.family.without_memory(self.path)).values()
        return sum(math.prod(shape) for shape in shapes)

    def weight_bytes(self, dtype: str) -> int:
        """Of the whole policy as it travels, and as a pass reads it."""
        return self.num_parameters * torch.empty(0, dtype=getattr(torch, dtype)).element_size()
