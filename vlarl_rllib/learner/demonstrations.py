"""The demonstrated steps of one rank, encoded once and kept on the learner's device, and the batches that are picked
out of them.

N = demonstrated steps of the rank, b = those of an optimiser step, I = distinct instructions, L = length of a prompt,
S = image side in pixels, K = actions of a decision, A = its tokens, G = targets.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor

from vlarl_rllib.data.rlds import RLDSDataset
from vlarl_rllib.envs.image import RESIZED_SIDE, resize_lanczos
from vlarl_rllib.learner.device_batch import prompt_tables
from vlarl_rllib.models.family import ActionFormat
from vlarl_rllib.models.interfaces import ActionCodec, PolicyProcessor

MAX_DECODING_THREADS = 8
"""Beside a GPU. More would wait for each other, and keep the learning thread from Python."""
FRAMES_AT_ONCE = 16
"""That such a thread decodes before it takes others."""


@dataclass(frozen=True)
class DemonstrationBatch:
    """One optimiser step's demonstrations of one rank, on its device."""

    inputs: dict[str, Tensor]
    """input_ids and attention_mask [b, L], pixel_values [b, 3, S, S] uint8."""
    targets: Tensor
    """[b, G] int64: action tokens, then the end of sequence where it is learned."""
    actions: Tensor
    """[b, K, 7] float32, normalised."""


@dataclass(frozen=True)
class HostPart:
    """What is made of a batch in host memory, beside the learning thread."""

    steps: Tensor
    """[b] int64: which demonstrated steps, in stored order's numbers."""
    decoded: Tensor
    """[m] int64: those of them whose frames were decoded for it, each once where frames are kept."""
    frames: Tensor
    """[m, 3, S, S] uint8: of `decoded`."""


class Demonstrations:
    """A data set as tensors on a device. Nothing is done for each example by itself but the decoding of its frame.

    Args:
        data: this rank's share.
        processor, codec, actions: of the policy; `codec` of the data's statistics.
        device: the learner's.
        batch_size: b
        frames_bytes: memory for decoded frames on the device. Where all fit, each is decoded when it is met first and
            kept; else each is decoded whenever it is met.
        fixed_length: pad prompts alike in every batch, to a multiple of `LENGTH_STEP`; else on a CPU to the longest of
            the batch, on a GPU, which would have to be waited for, to the longest of all.
    """

    def __init__(
        self,
        data: RLDSDataset,
        processor: PolicyProcessor,
        codec: ActionCodec,
        actions: ActionFormat,
        device: torch.device,
        *,
        batch_size: int,
        frames_bytes: float,
        fixed_length: bool,
    ) -> None:
        self._data, self._processor, self._device, self._batch_size = data, processor, device, batch_size
        self._frame_shape = (3, processor.image_size, processor.image_size)
        tokens, normalized = codec.encode(data.action_chunks(actions.num_actions))
        end = np.full((len(data), actions.num_targets - actions.num_tokens), processor.end_token_id)
        self._targets = torch.from_numpy(np.concatenate([tokens, end], axis=1)).to(device)
        self._actions = torch.from_numpy(normalized).float().to(device)
        self._encode_prompts(fixed_length)
        self._cuts_pads = device.type == "cpu" and not fixed_length
        self._frames: Tensor | None = None
        """[N, 3, S, S] uint8"""
        if len(data) * int(np.prod(self._frame_shape)) <= frames_bytes:
            self._frames = torch.empty((len(data), *self._frame_shape), dtype=torch.uint8, device=device)
        self._is_kept = np.zeros(len(data), dtype=bool)
        """[N] whose frames are in `_frames`, or on their way there."""
        self._epoch, self._order = 0, data.order(0)

    def _encode_prompts(self, fixed_length: bool) -> None:
        numbers = {instruction: number for number, instruction in enumerate(dict.fromkeys(self._data.instructions))}
        tables = prompt_tables([self._processor.prompt_ids(instruction) for instruction in numbers], fixed_length)
        self._prompts = {name: table.to(self._device) for name, table in tables.items()}
        """[I, L] each"""
        of_episode = np.array([numbers[instruction] for instruction in self._data.instructions])
        self._prompt_of = torch.from_numpy(of_episode[self._data.episode_of]).to(self._device)
        """[N] which of them"""

    def batches(self, step: int) -> Iterator[DemonstrationBatch]:
        """Those of optimiser step `step`, counted from 0, and of all behind it, without end.

        What is to be decoded for a batch is decoded, beside a GPU, by several threads while the one before is learned.

        Raises:
            ValueError: a frame is damaged.
        """
        if self._device.type == "cpu":  # threads would take turns with the learning one at the cores
            for number in count(step):
                yield self._on_device(self._in_host_memory(number, map))
        with (
            ThreadPoolExecutor(1, "demonstrations") as ahead,
            ThreadPoolExecutor(min(MAX_DECODING_THREADS, len(os.sched_getaffinity(0))), "decoding") as decoders,
        ):
            coming: Future[HostPart] = ahead.submit(self._in_host_memory, step, decoders.map)
            for number in count(step + 1):
                ready = coming.result()
                coming = ahead.submit(self._in_host_memory, number, decoders.map)
                yield self._on_device(ready)

    def _steps_of(self, step: int) -> np.ndarray:
        """[b] int64: what optimiser step `step` learns from: epochs, each in its own order, one behind the other."""
        parts: list[np.ndarray] = []
        epoch, position = divmod(step * self._batch_size, len(self._data))
        missing = self._batch_size
        while missing:
            if epoch != self._epoch:
                self._epoch, self._order = epoch, self._data.order(epoch)
            parts.append(self._order[position : position + missing])
            missing -= len(parts[-1])
            epoch, position = epoch + 1, 0
        return np.concatenate(parts)

    def _in_host_memory(self, step: int, each: Callable[..., Iterable[None]]) -> HostPart:
        steps = decoded = self._steps_of(step)
        if self._frames is not None:
            decoded = np.unique(steps[~self._is_kept[steps]])
            self._is_kept[decoded] = True
        return HostPart(self._pinned(steps), self._pinned(decoded), self._decode(decoded, each))

    def _pinned(self, numbers: np.ndarray) -> Tensor:
        """Where a GPU can copy it from while the learning thread goes on."""
        tensor = torch.from_numpy(numbers)
        return tensor if self._device.type == "cpu" else tensor.pin_memory()

    def _decode(self, steps: np.ndarray, each: Callable[..., Iterable[None]]) -> Tensor:
        """[m, 3, S, S] uint8"""
        frames = torch.empty((len(steps), *self._frame_shape), dtype=torch.uint8, pin_memory=self._device.type != "cpu")
        rows = frames.numpy()

        def fill(first: int) -> None:
            for row in range(first, min(first + FRAMES_AT_ONCE, len(steps))):
                rows[row] = self._image(int(steps[row])).transpose(2, 0, 1)

        for _ in each(fill, range(0, len(steps), FRAMES_AT_ONCE)):
            pass
        return frames

    def _image(self, step: int) -> np.ndarray:
        """[S, S, 3] uint8: as the policy sees it before a crop."""
        image = self._data.frame(step)
        if len(image) != self._processor.image_size:  # as the observation path resizes
            image = resize_lanczos(image, RESIZED_SIDE)
        return self._processor.resize(image)

    def _on_device(self, part: HostPart) -> DemonstrationBatch:
        """Without waiting for the device."""
        steps, frames = (tensor.to(self._device, non_blocking=True) for tensor in (part.steps, part.frames))
        if self._frames is not None:
            if len(part.decoded):
                self._frames.index_copy_(0, part.decoded.to(self._device, non_blocking=True), frames)
            frames = self._frames.index_select(0, steps)
        prompt_of = self._prompt_of.index_select(0, steps)
        prompts = {name: table.index_select(0, prompt_of) for name, table in self._prompts.items()}
        if self._cuts_pads:
            longest = int(prompts["attention_mask"].sum(1).max())
            prompts = {name: rows[:, :longest].contiguous() for name, rows in prompts.items()}
        targets, actions = (table.index_select(0, steps) for table in (self._targets, self._actions))
        return DemonstrationBatch(prompts | {"pixel_values": frames}, targets, actions)
