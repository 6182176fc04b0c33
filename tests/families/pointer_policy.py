"""A policy of its own kind: three actions a decision, all tokens sampled at once, a small torch model and its
processor.

B = batch, L = prompt length, K = 3 actions, D = 7 tokens of each, V = 16 bins.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlarl_rllib.models.critic import ValueHead
from vlarl_rllib.models.family import ActionFormat, PolicyFacts, PolicyFamily, SampledTokens
from vlarl_rllib.models.files import check_weights, read_config

ACTIONS = ActionFormat(num_actions=3, tokens_per_action=7, token_ids=range(100, 116), parallel=True)
STATISTICS = {"pointing": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}}
IMAGE_SIZE, WIDTH, NUM_WORDS, PAD = 28, 32, 64, 0


def write_checkpoint(directory: Path, seed: int = 0) -> None:
    """Random weights."""
    directory.mkdir(parents=True)
    torch.manual_seed(seed)
    save_file(PointerPolicy().state_dict(), directory / "model.safetensors")
    config = {"model_type": "pointer", "norm_stats": STATISTICS}
    (directory / "config.json").write_text(json.dumps(config))


class Output(NamedTuple):
    action_logits: Tensor
    values: Tensor | None


class PointerPolicy(nn.Module):
    """Looks at the frame in 4 x 4 fields and at the prompt's words."""

    num_image_tokens = 16

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(NUM_WORDS, WIDTH)
        self.frame = nn.Linear(3 * self.num_image_tokens, WIDTH)
        self.heads = nn.Linear(WIDTH, ACTIONS.num_tokens * len(ACTIONS.token_ids))
        self.value_head: ValueHead | None = None

    def add_value_head(self, seed: int) -> ValueHead:
        self.value_head = ValueHead(WIDTH, seed)
        return self.value_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        action_tokens: Tensor | None = None,
        full_vocabulary: bool = False,
    ) -> Output:
        """Logits [B, K D, V]; the tokens that were taken do not matter."""
        mask = attention_mask[..., None].to(self.words.weight.dtype)
        said = (self.words(input_ids) * mask).sum(1) / mask.sum(1)
        seen = F.adaptive_avg_pool2d(pixel_values.to(said.dtype) / 255.0, 4).flatten(1)
        hidden = torch.tanh(self.frame(seen) + said)
        logits = self.heads(hidden).float().unflatten(1, (ACTIONS.num_tokens, -1))
        if full_vocabulary:
            logits = F.pad(logits, (ACTIONS.token_ids.start, 0), value=-1e9)
        return Output(logits, None if self.value_head is None else self.value_head(hidden))

    @torch.no_grad()
    def sample_action_tokens(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        temperatures: Tensor,
        seeds: Sequence[int],
    ) -> SampledTokens:
        logits, values = self(input_ids, attention_mask, pixel_values)
        scale = torch.where(temperatures > 0, temperatures, 1.0)[:, None, None]
        log_probs = torch.log_softmax(logits / scale, dim=-1)
        noise = torch.stack(
            [torch.empty(logits.shape[1:]).exponential_(generator=torch.Generator().manual_seed(s)) for s in seeds]
        ).to(logits.device)
        drawn = torch.where(temperatures[:, None, None] > 0, log_probs - noise.log(), logits)
        choice = drawn.argmax(-1)
        chosen = log_probs.gather(-1, choice[..., None])[..., 0]
        return SampledTokens(choice + ACTIONS.token_ids.start, chosen, values)


class PointerProcessor:
    image_size = IMAGE_SIZE
    end_token_id = 1

    def prompt_ids(self, instruction: str) -> list[int]:
        return [2 + zlib.crc32(word.encode()) % (NUM_WORDS - 2) for word in instruction.split()]

    def resize(self, image: np.ndarray) -> np.ndarray:
        assert image.shape[0] == IMAGE_SIZE, "demonstrations have the policy's own size here"
        return image

    def raw_inputs(self, images: Sequence[np.ndarray], instructions: Sequence[str]) -> dict[str, Tensor]:
        prompts = [self.prompt_ids(instruction) for instruction in instructions]
        longest = max(map(len, prompts))
        padded = torch.tensor([[*prompt, *[PAD] * (longest - len(prompt))] for prompt in prompts])
        frames = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        return {"input_ids": padded, "attention_mask": (padded != PAD).long(), "pixel_values": frames}


class PointerCodec:
    """Bin b of 16 stands for -1 + 2 (b + 0.5) / 16."""

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        if np.shape(tokens) != (ACTIONS.num_tokens,) or not all(int(token) in ACTIONS.token_ids for token in tokens):
            raise ValueError(f"a reply must be {ACTIONS.num_tokens} action ids, got {np.asarray(tokens).tolist()}")
        return self.normalized(tokens)

    def normalized(self, tokens: np.ndarray) -> np.ndarray:
        bins = np.asarray(tokens) - ACTIONS.token_ids.start
        return (2.0 * (bins + 0.5) / len(ACTIONS.token_ids) - 1.0).reshape(*np.shape(tokens)[:-1], 3, 7)

    def encode(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count = len(ACTIONS.token_ids)
        bins = np.clip((np.asarray(actions) + 1.0) / 2.0 * count, 0, count - 1).astype(np.int64)
        tokens = (bins + ACTIONS.token_ids.start).reshape(len(bins), -1)
        return tokens, np.asarray(actions, dtype=np.float64)


class PointerFamily(PolicyFamily):
    name = "pointer"

    def read_facts(self, checkpoint: str) -> PolicyFacts:
        config, file = read_config(checkpoint)
        check_weights(Path(checkpoint))
        statistics = config["norm_stats"]
        return PolicyFacts(IMAGE_SIZE, ACTIONS, statistics, dict.fromkeys(statistics, str(file)))

    def codec(self, facts: PolicyFacts, statistics: Mapping[str, Any]) -> PointerCodec:
        return PointerCodec()

    def dataset_statistics(self, actions: np.ndarray, num_episodes: int) -> dict[str, Any]:
        return STATISTICS["pointing"] | {"num_transitions": len(actions), "num_trajectories": num_episodes}

    def load_config(self, checkpoint: str) -> Any:
        raise NotImplementedError("for vLLM")

    def load(self, checkpoint: str, **options: Any) -> PointerPolicy:
        policy = PointerPolicy()
        policy.load_state_dict(load_file(Path(checkpoint) / "model.safetensors"))
        return policy.to(options["dtype"]).eval()

    def without_memory(self, checkpoint: str) -> nn.Module:
        with torch.device("meta"):
            return PointerPolicy()

    def processor(self, checkpoint: str) -> PointerProcessor:
        return PointerProcessor()

    def shard_units(self, policy: Any) -> Iterable[nn.Module]:
        return [policy.frame]

    def checkpoint_activations(self, policy: nn.Module) -> None:
        """Nothing: there are hardly any."""

    def write_files(self, base: str, out: Path, dtype: str, norm_stats: dict[str, Any] | None) -> None:
        config, _ = read_config(base)
        (out / "config.json").write_text(json.dumps(config | {"norm_stats": norm_stats or config["norm_stats"]}))

    def freeze_unused(self, policy: nn.Module) -> None:
        """Nothing: all of it is read."""

    def freeze_token_head(self, critic: Any) -> None:
        critic.heads.requires_grad_(False)
