"""A rank's decisions where its passes read them.

N = decisions, E = frames behind fragments that go on, A = tokens of a decision, S = image side, R = rows of a pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from vlarl_rllib.learner.collate import RolloutBatch

MAX_BYTES = 2 * 2**30
"""Of the frames, and of what may be reused of them: more than that goes to the device, or is computed, in each pass."""
SCORED_AT_ONCE = 4
"""Micro-batches in one pass without a backward pass, where shapes are fixed."""
LENGTH_STEP = 8
"""Where shapes are to be the same, prompts are padded to a multiple of this."""


class DeviceBatch:
    """A `RolloutBatch` on a device.

    Args:
        fixed_length: pad prompts alike in every pass, instead of to the longest of the pass.
    """

    def __init__(self, batch: RolloutBatch, device: torch.device, *, fixed_length: bool) -> None:
        self.batch, self._device = batch, device
        frames = torch.from_numpy(batch.frames)
        self._frames = frames.to(device) if frames.nbytes <= MAX_BYTES else frames
        self._lengths = np.array([len(prompt) for prompt in batch.prompts])
        self._prompts = {name: table.to(device) for name, table in prompt_tables(batch.prompts, fixed_length).items()}
        self._length = self._prompts["input_ids"].shape[1] if fixed_length else None
        self._tokens = torch.from_numpy(batch.tokens).to(device)
        self._executed = batch.executed.to(device)
        self._reusable: list[Mapping[str, Tensor]] = []
        self._reuse: dict[str, Tensor] = {}

    def inputs(self, frames: np.ndarray) -> dict[str, Tensor]:
        """What the model needs for the frames with these indices: input_ids, attention_mask [R, L], action_tokens
        [R, A], and pixel_values [R, 3, S, S] uint8 or what is reused of them.

        A frame behind a fragment has no tokens; it gets those of another one, whose logits nobody reads.
        """
        prompts = self.batch.frame_prompt[frames]
        length = self._length or int(self._lengths[prompts].max())
        prompt, decision, frame = (
            self.on_device(index) for index in (prompts, self.batch.decisions_at(frames), frames)
        )
        pixels = self._reuse or {"pixel_values": self._frames}
        seen = {
            name: tensor[frame if tensor.device == frame.device else torch.from_numpy(frames)]
            for name, tensor in pixels.items()
        }
        if not self._reuse:
            seen["pixel_values"] = seen["pixel_values"].to(self._device).permute(0, 3, 1, 2).contiguous()
        texts = {name: table[prompt, :length] for name, table in self._prompts.items()}
        return texts | {"action_tokens": self._tokens[decision]} | seen

    def executed(self, frames: np.ndarray) -> Tensor:
        """[R, A] bool: tokens of actions that were played, of the decisions at these frames."""
        return self._executed[self.on_device(self.batch.decisions_at(frames))]

    def on_device(self, values: np.ndarray) -> Tensor:
        """Copied without waiting for the device."""
        return torch.from_numpy(values).to(self._device, non_blocking=True)

    def keep(self, reusable: Mapping[str, Tensor]) -> None:
        """Later passes may take this instead of frames: of the next ones in order, until `all_kept`."""
        self._reusable.append(reusable)

    def all_kept(self) -> None:
        """From now on passes get what was kept, if that is little enough to be."""
        parts, self._reusable = self._reusable, []
        if parts and sum(tensor.nbytes for part in parts for tensor in part.values()) <= MAX_BYTES:
            self._reuse = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def prompt_tables(prompts: Sequence[Sequence[int]], fixed_length: bool) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [prompts, L] int64 of token ids, padded on the right to the longest.

    Args:
        fixed_length: to the next multiple of `LENGTH_STEP`.
    """
    longest = max(map(len, prompts))
    length = math.ceil(longest / LENGTH_STEP) * LENGTH_STEP if fixed_length else longest
    ids, mask = torch.zeros(2, len(prompts), length, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        mask[row, : len(prompt)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def padded(frames: np.ndarray, rows: int) -> np.ndarray:
    """Indices of frames, filled up with the first frame of all to `rows`, and to one where there are none: a rank
    without decisions takes part in the collectives of a pass."""
    missing = max(rows - len(frames), 0 if len(frames) else 1)
    return np.concatenate([frames, np.zeros(missing, dtype=np.int64)])


def score_passes(num_frames: int, micro_batch_size: int, *, fixed: bool) -> list[int]:
    """Rows of each pass over frames without a backward pass, for which a GPU has room for more at once.

    Args:
        fixed: passes are to have few shapes, because each is compiled.
    """
    large = micro_batch_size * SCORED_AT_ONCE if fixed else micro_batch_size
    return [large] * (num_frames // large) + [micro_batch_size] * math.ceil(num_frames % large / micro_batch_size)


def some_of(count: int, most: int) -> np.ndarray:
    """Up to `most` of `count` indices, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most), dtype=np.int64))
