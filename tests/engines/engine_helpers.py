"""Requests, and the policy in plain torch to compare engines with."""

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from vlarl_rllib.engines.pool import EnginePool
from vlarl_rllib.models.openvla import OpenVLAForActionPrediction, OpenVLAProcessor
from vlarl_rllib.models.openvla.presets import PRESETS, build_model
from vlarl_rllib.settings import WeightSettings
from vlarl_rllib.types import SampleReply, SampleRequest, Site, WeightBucket, WeightManifest
from vlarl_rllib.weights.publisher import Publisher
from vlarl_rllib.weights.sync import WeightSync

LOCAL = "tests.weights.probe_transport:LocalTransport"

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
    """The policy in plain torch, with its value head, and weights that tests replace and push."""

    model: OpenVLAForActionPrediction
    processor: OpenVLAProcessor
    version: int = 0

    def __post_init__(self) -> None:
        self._publisher = Publisher(self.model, torch.float32, WeightSettings(bucket_mb=1), rank=0, value_head=True)
        self.begin_publishing, self.end_publishing = self._publisher.begin, self._publisher.end

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
    def value_error(self, requests: list[SampleRequest], replies: list[SampleReply]) -> float:
        """Largest difference between the replies' values and the model's."""
        images, instructions = [r.image for r in requests], [r.instruction for r in requests]
        values = self.model(**self.processor(images, instructions)).values
        return (values - torch.tensor([reply.value for reply in replies])).abs().max().item()

    @torch.no_grad()
    def is_greedy(self, request: SampleRequest, reply: SampleReply) -> bool:
        """Whether every token is the most likely one."""
        best = self._logits([request], torch.tensor(reply.tokens.tolist())[None]).argmax(-1)[0]
        return (best + self.model.action_token_ids[0]).tolist() == reply.tokens.tolist()

    def renew(self, seed: int) -> None:
        """Initialise the weights freshly, the value head's so that values differ from 0 and from each other."""
        fresh = build_model(PRESETS["tiny"], seed)
        torch.nn.init.normal_(fresh.add_value_head(seed).fc3.weight, generator=torch.Generator().manual_seed(seed))
        self.model.load_state_dict(fresh.state_dict())
        self._publisher.forget()

    def sync(self, pool: EnginePool | None, transport: str = "object_store", *, keep: bool = False) -> WeightSync:
        return WeightSync(self, pool, self.version, transport=transport, keep=keep)

    def push(self, pool: EnginePool, seed: int) -> WeightManifest:
        """Freshly initialised weights as the next version in all engines; the model keeps them."""
        self.renew(seed)
        manifest = self.sync(pool).push()
        self.version = manifest.version
        return manifest

    def keep(self, seed: int) -> WeightManifest:
        """The same for engines in this process, without Ray."""
        self.renew(seed)
        manifest = self.sync(None, LOCAL, keep=True).push()
        self.version = manifest.version
        return manifest

    # The learners, as `WeightSync` sees them

    def call(self, method: str, *args, **kwargs) -> list:
        return [getattr(self, method)(*args, **kwargs)]

    def place(self) -> Site:
        return Site()

    def next_bucket(self, done: int) -> WeightBucket | None:
        return self._publisher.next(done)

    def _logits(self, requests: list[SampleRequest], tokens: torch.Tensor) -> torch.Tensor:
        images, instructions = [r.image for r in requests], [r.instruction for r in requests]
        return self.model.action_logits(**self.processor(images, instructions), action_tokens=tokens)
