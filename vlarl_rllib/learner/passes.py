"""What PPO does with one micro-batch: a pass that scores, and a pass that learns.

N = rows of a pass, A = tokens of a decision.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from vlarl_rllib.learner.device_batch import DeviceBatch, padded
from vlarl_rllib.learner.loss import LossInputs, LossSettings, ppo_loss
from vlarl_rllib.learner.sharded_policy import Scores, ShardedPolicy
from vlarl_rllib.settings import Settings


class PPOPasses:
    """Of a policy under these settings.

    Args:
        num_actions: of a decision.
    """

    def __init__(self, sharded: ShardedPolicy, settings: Settings, num_actions: int) -> None:
        self._sharded, self._temperature = sharded, settings.temperature
        training = settings.training
        self._most_rows = min(settings.learners.micro_batch_size, training.minibatch_size)
        self._score = sharded.repeated(self._scored)
        self._learn = {
            warm_up: sharded.repeated(
                partial(self._learned, LossSettings.of(training, num_actions, train_policy=not warm_up))
            )
            for warm_up in (False, True)
        }

    def score(self, data: DeviceBatch, frames: np.ndarray, rows: int) -> Scores:
        """Without gradients, of the frames with these indices.

        Args:
            rows: fill up to so many where passes have fixed shapes.
        """
        taken = padded(frames, rows if self._sharded.fixed_shapes else 0)
        out = self._score(data.inputs(taken), {"executed": data.executed(taken)})
        found = {name: tensor[: len(frames)] for name, tensor in out.items()}
        log_probs, entropy, values = (found.pop(name) for name in ("log_probs", "entropy", "values"))
        return Scores(log_probs, entropy, values, found)

    def learn(
        self, data: DeviceBatch, targets: Mapping[str, Tensor], steps: np.ndarray, num_valid: int, *, warm_up: bool
    ) -> dict[str, Tensor]:
        """Forward and backward; `LossOutputs.sums`.

        Args:
            targets: of all decisions, named as in `LossInputs`.
            steps: the decisions of this pass.
            num_valid: see `LossInputs`.
            warm_up: train the critic alone.
        """
        count = len(steps)
        frames = padded(steps, max(count, self._most_rows) if self._sharded.fixed_shapes else count)
        rows = data.on_device(frames)
        given = {
            "executed": data.executed(frames),
            "mask": data.on_device(np.arange(len(frames)) < count),
            "num_valid": data.on_device(np.array(num_valid, np.float32)),
            **{name: target[rows] for name, target in targets.items()},
        }
        return dict(self._learn[warm_up](data.inputs(frames), given))

    @torch.no_grad()
    def _scored(self, inputs: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
        out = self._sharded.score(inputs, given["executed"], self._temperature)
        return {"log_probs": out.log_probs, "entropy": out.entropy, "values": out.values, **out.reusable}

    def _learned(
        self, loss_settings: LossSettings, inputs: dict[str, Tensor], given: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        out = self._sharded.score(inputs, given["executed"], self._temperature)
        found = LossInputs(log_probs=out.log_probs, entropy=out.entropy, values=out.values.float(), **given)
        outputs = ppo_loss(found, loss_settings)
        self._sharded.backward(outputs.loss)
        return outputs.sums
