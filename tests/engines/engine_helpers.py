"""Requests, and the policy in plain torch to compare engines with."""

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from vlarl_rllib.models.openvla import OpenVLAForActionPrediction, OpenVLAProcessor
from vlarl_rllib.models.openvla.presets import PRESETS, build_model
from vlarl_rllib.types import SampleReply, SampleRequest, WeightManifest
from vlarl_rllib.weights.shared_memory import SharedMemoryPublisher
from vlarl_rllib.weights.source import iterate_weights

INSTRUCTIONS = (
    "push",
    "open the drawer",
    "pick up the black bowl between the plate and the ramekin and place it on the plate",
    "put the cream cheese in the bowl",
)


def make_requests(num: int, temperatures=(1.0,), image_size: int = 28, first_seed: int = 0) -> list[SampleRequest]:
    """Different images, seeds and prompt lengths; temperatures in turn."""
    images = np.random.default_rng(first_seed).integers(0, 256, (num, image_size, image_size, 3), dtype=np.uint8)
    return [
        SampleRequest(image, instruction, first_seed + index, temperature)
        for index, (image, instruction, temperature) in enumerate(
            zip(images, itertools.cycle(INSTRUCTIONS), itertools.cycle(temperatures), strict=False)
        )
    ]


@dataclass
class Oracle:
    """The policy in plain torch, with weights that tests replace and push."""

    model: OpenVLAForActionPrediction
    processor: OpenVLAProcessor
    publisher: SharedMemoryPublisher
    version: int = 0

    @torch.no_grad()
    def log_prob_error(self, requests: list[SampleRequest], replies: list[SampleReply]) -> float:
        """Largest difference between the replies' log-probs and the model's for the same tokens."""
        tokens = torch.from_numpy(np.stack([reply.tokens for reply in replies]))
        logits = self._logits(requests, tokens)
        # Temperature 0 is greedy, with the log-probabilities of temperature 1.
        temperatures = torch.tensor([request.temperature or 1.0 for request in requests])
        log_probs = torch.log_softmax(logits / temperatures[:, None, None], dim=-1)
        chosen = (tokens - self.model.action_token_ids[0])[..., None]
        reported = torch.from_numpy(np.stack([reply.log_probs for reply in replies]))
        return (log_probs.gather(2, chosen)[..., 0] - reported).abs().max().item()

    @torch.no_grad()
    def is_greedy(self, request: SampleRequest, reply: SampleReply) -> bool:
        """Whether every token is the most likely one."""
        best = self._logits([request], torch.tensor(reply.tokens.tolist())[None]).argmax(-1)[0]
        return (best + self.model.action_token_ids[0]).tolist() == reply.tokens.tolist()

    def push(self, seed: int) -> WeightManifest:
        """Publish freshly initialised weights as the next version; the model keeps them."""
        self.model.load_state_dict(build_model(PRESETS["tiny"], seed).state_dict())
        return self.publish(iterate_weights(self.model, torch.float32))

    def publish(self, tensors) -> WeightManifest:
        self.version += 1
        manifest = self.publisher.publish(self.version, iter(tensors))
        self.publisher.retire(before=self.version - 1)
        return manifest

    def _logits(self, requests: list[SampleRequest], tokens: torch.Tensor) -> torch.Tensor:
        images, instructions = [r.image for r in requests], [r.instruction for r in requests]
        return self.model.action_logits(**self.processor(images, instructions), action_tokens=tokens)
