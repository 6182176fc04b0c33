"""The judge that is a vision-language model of transformers: it is asked whether a frame shows the instruction done.

The score is P(yes) / (P(yes) + P(no)) of the next token. No code of a checkpoint is run, and its weights are
safetensors.

B = frames of a batch, V = vocabulary, S = image side in pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

QUESTION = "The picture shows a robot that was told: {instruction}. Is this done? Answer yes or no."
YES, NO = ("yes", "Yes", " yes", " Yes"), ("no", "No", " no", " No")
"""Spellings whose probabilities add up, as far as they are one token each."""
BATCH_SIZE = 8
"""Frames of one forward pass."""


class VisionLanguageJudge:
    """See the module, and `Judge` for `score`.

    Args:
        directory: model and processor, with a chat template.
        device: "cpu" computes in float32, "cuda" in bfloat16.

    Raises:
        ValueError: in one line, why the directory cannot be loaded or its model not be asked.
    """

    def __init__(self, directory: str | Path, device: str = "cpu") -> None:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        try:
            self._processor: Any = AutoProcessor.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
            model = AutoModelForImageTextToText.from_pretrained(
                directory, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ValueError(
                f"{directory} cannot be loaded as a vision-language model ({reason}); download it again"
            ) from error
        if not getattr(self._processor, "chat_template", None):
            raise ValueError(
                f"{directory}: its processor has no chat template to ask with; choose a model that was tuned to answer"
            )
        self._model = model.to(device).eval()
        self._yes, self._no = self._single_tokens(YES), self._single_tokens(NO)
        if not self._yes or not self._no:
            raise ValueError(f"{directory}: yes and no are not single tokens of its tokenizer; choose another model")

    def score(self, images: np.ndarray, instruction: str) -> np.ndarray:
        """[N, S, S, 3] uint8 -> [N] float32 in [0, 1]."""
        fragments = [images[first : first + BATCH_SIZE] for first in range(0, len(images), BATCH_SIZE)]
        logits = torch.cat([self.next_token_logits(fragment, instruction) for fragment in fragments])
        yes, no = logits[:, self._yes].logsumexp(-1), logits[:, self._no].logsumexp(-1)
        return torch.sigmoid(yes - no).cpu().numpy()

    @torch.no_grad()
    def next_token_logits(self, images: np.ndarray, instruction: str) -> Tensor:
        """[B, S, S, 3] uint8 -> [B, V] float32, behind the question.

        Frames of one size and one instruction make prompts of one length.
        """
        question = {"type": "text", "text": QUESTION.format(instruction=instruction.rstrip(". "))}
        conversations = [
            [{"role": "user", "content": [{"type": "image", "image": Image.fromarray(image)}, question]}]
            for image in images
        ]
        inputs = self._processor.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self._model.device, dtype=self._model.dtype)
        return self._model(**inputs).logits[:, -1].float()

    def _single_tokens(self, spellings: tuple[str, ...]) -> list[int]:
        tokenizer = self._processor.tokenizer
        encoded = [tokenizer.encode(spelling, add_special_tokens=False) for spelling in spellings]
        return sorted({ids[0] for ids in encoded if len(ids) == 1 and ids[0] != tokenizer.unk_token_id})
