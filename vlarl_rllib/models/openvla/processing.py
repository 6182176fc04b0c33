"""From camera frames and instructions to model inputs: prompt, tokenizer, image processor.

B = batch, L = longest prompt, S = image side in pixels, H, W = any frame size.
"""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, LlamaTokenizer, PreTrainedTokenizerFast

from vlarl_rllib.models.openvla.configuration import find_checkpoint_file, hub_options_of, require_checkpoint_file
from vlarl_rllib.models.openvla.prompt import build_prompt
from vlarl_rllib.models.openvla.vision import PIXEL_MEAN, PIXEL_STD, normalize_pixels

PREPROCESSOR_FILE = "preprocessor_config.json"
SPACE_PIECE = "▁"
"""SentencePiece's mark for a space."""


def load_tokenizer(checkpoint: str | Path, **hub_options: Any) -> PreTrainedTokenizerFast:
    """Tokenizer of a checkpoint, read exactly as it is stored: from `tokenizer.json`, else from `tokenizer.model`.

    transformers' automatic choice is avoided: it does not know the model type and drops the leading space mark.

    Raises:
        FileNotFoundError: neither file exists.
        ImportError: `tokenizer.model` must be read and sentencepiece or protobuf is absent.
    """
    if find_checkpoint_file(checkpoint, "tokenizer.json", **hub_options) is not None:
        return PreTrainedTokenizerFast.from_pretrained(checkpoint, **hub_options)
    if find_checkpoint_file(checkpoint, "tokenizer.model", **hub_options) is None:
        raise FileNotFoundError(f"checkpoint '{checkpoint}' has neither tokenizer.json nor tokenizer.model")
    missing = [name for name in ("sentencepiece", "google.protobuf") if not _is_installed(name)]
    if missing:
        raise ImportError(
            f"reading tokenizer.model of '{checkpoint}' needs {' and '.join(missing)}; run: pip install "
            "sentencepiece protobuf"
        )
    return LlamaTokenizer.from_pretrained(checkpoint, **hub_options)


class PrismaticImageProcessor:
    """Frames to model input: bicubic resize to a square (aspect ignored), then two normalisations side by side.

    Attributes:
        image_size: side of the model input, in pixels.
        mean, std: six numbers each: DINOv2's, then SigLIP's.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Take the contents of a published `preprocessor_config.json`, kept as they are for `save_pretrained`.

        The normalisation is `tvf_normalize_params` where present: the fields `means` and `stds` of published files
        hold constants that the model was not trained with. Raises ValueError for a resize strategy or interpolation
        other than OpenVLA's.
        """
        strategy, interpolations = settings["image_resize_strategy"], settings["interpolations"]
        if strategy != "resize-naive" or set(interpolations) != {"bicubic"}:
            raise ValueError(
                f"image_resize_strategy='{strategy}' with interpolations {interpolations} is not supported; "
                "the choice is 'resize-naive' with 'bicubic'"
            )
        self.settings = deepcopy(dict(settings))
        self.image_size: int = settings["input_sizes"][0][-1]
        self.mean, self.std = PIXEL_MEAN, PIXEL_STD
        if "tvf_normalize_params" in settings:
            towers = settings["tvf_normalize_params"]
            self.mean = tuple(number for tower in towers for number in tower["mean"])
            self.std = tuple(number for tower in towers for number in tower["std"])

    @classmethod
    def for_image_size(cls, image_size: int) -> "PrismaticImageProcessor":
        """The published processor for another input size."""
        size = [image_size, image_size]
        crop = {"output_size": size}
        # interpolation 3 is PIL's bicubic
        resize = {"antialias": True, "interpolation": 3, "max_size": None, "size": size}
        constants = [
            {"inplace": False, "mean": list(PIXEL_MEAN[:3]), "std": list(PIXEL_STD[:3])},
            {"inplace": False, "mean": list(PIXEL_MEAN[3:]), "std": list(PIXEL_STD[3:])},
        ]
        return cls(
            {
                "image_processor_type": "PrismaticImageProcessor",
                "image_resize_strategy": "resize-naive",
                "input_sizes": [[3, *size], [3, *size]],
                "interpolations": ["bicubic", "bicubic"],
                "means": [tower["mean"] for tower in constants],
                "processor_class": "PrismaticProcessor",
                "stds": [tower["std"] for tower in constants],
                "tvf_crop_params": [crop, crop],
                "tvf_do_letterbox": False,
                "tvf_letterbox_fill": None,
                "tvf_normalize_params": constants,
                "tvf_resize_params": [resize, resize],
                "use_fused_vision_backbone": True,
            }
        )

    @classmethod
    def from_pretrained(cls, checkpoint: str | Path, **kwargs: Any) -> "PrismaticImageProcessor":
        """Read `preprocessor_config.json` of a directory or Hub id; FileNotFoundError where there is none."""
        path = require_checkpoint_file(checkpoint, PREPROCESSOR_FILE, **hub_options_of(kwargs))
        return cls(json.loads(path.read_text(encoding="utf-8")))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `preprocessor_config.json`."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.settings, indent=2, sort_keys=True) + "\n"
        (Path(directory) / PREPROCESSOR_FILE).write_text(text, encoding="utf-8")

    def resize_uint8(self, image: NDArray[np.uint8] | Image.Image) -> NDArray[np.uint8]:
        """One frame [H, W, 3] uint8 RGB at the model's size, still raw: [S, S, 3] uint8.

        This is what samplers send: the model normalises raw frames itself. Raises ValueError where this checkpoint's
        constants are not those of the model's own normalisation, or the frame is not RGB uint8.
        """
        if (self.mean, self.std) != (PIXEL_MEAN, PIXEL_STD):
            raise ValueError(
                f"raw frames need the published normalisation constants, this checkpoint has mean={self.mean}, "
                f"std={self.std}; pass normalised pixel_values instead"
            )
        return self._resize(image)

    def __call__(self, images: Sequence[NDArray[np.uint8] | Image.Image]) -> Tensor:
        """Frames [H, W, 3] uint8 RGB, sizes may differ -> [B, 6, S, S] float32."""
        raw = np.stack([self._resize(image) for image in images])
        return normalize_pixels(torch.from_numpy(raw), self.mean, self.std).contiguous()

    def _resize(self, image: NDArray[np.uint8] | Image.Image) -> NDArray[np.uint8]:
        if isinstance(image, Image.Image):
            picture = image.convert("RGB")
        else:
            frame = np.asarray(image)
            if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
                raise ValueError(f"a frame must be uint8 [H, W, 3], got {frame.dtype} {list(frame.shape)}")
            picture = Image.fromarray(frame)
        size = (self.image_size, self.image_size)
        return np.array(picture.resize(size, Image.Resampling.BICUBIC))


class OpenVLAProcessor:
    """Image processor and tokenizer of one checkpoint.

    Attributes:
        image_processor: `PrismaticImageProcessor`.
        tokenizer: read by `load_tokenizer`.
    """

    def __init__(self, image_processor: PrismaticImageProcessor, tokenizer: PreTrainedTokenizerFast) -> None:
        """Raises ValueError for a tokenizer without BOS or pad token, or one that loses Llama's leading space mark."""
        for name in ("bos_token_id", "pad_token_id"):
            if getattr(tokenizer, name) is None:
                raise ValueError(f"the tokenizer has no {name}; OpenVLA needs one")
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        # In training a stand-alone space piece sat between "Out:" and the first action token (Llama tokenizers only).
        self._suffix = [vocabulary[SPACE_PIECE]] if SPACE_PIECE in vocabulary else []
        self._prompt_ids: dict[str, tuple[int, ...]] = {}
        expected = vocabulary.get(f"{SPACE_PIECE}In")
        if expected is not None and self.prompt_ids("")[1] != expected:
            raise ValueError(
                f"the tokenizer starts a prompt with id {self.prompt_ids('')[1]} instead of {expected} ('▁In'); "
                "load it with vlarl_rllib.models.openvla.processing.load_tokenizer"
            )

    @classmethod
    def from_pretrained(cls, checkpoint: str | Path, **kwargs: Any) -> "OpenVLAProcessor":
        """Read both parts from a directory or Hub id; FileNotFoundError where a file is absent."""
        hub_options = hub_options_of(kwargs)
        image_processor = PrismaticImageProcessor.from_pretrained(checkpoint, **hub_options)
        return cls(image_processor, load_tokenizer(checkpoint, **hub_options))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `preprocessor_config.json` and the tokenizer's files."""
        self.image_processor.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

    @property
    def image_size(self) -> int:
        """Side of the model's input, in pixels."""
        return self.image_processor.image_size

    @property
    def end_token_id(self) -> int:
        """Of the end of sequence."""
        return int(self.tokenizer.eos_token_id)

    def resize(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """See `PrismaticImageProcessor.resize_uint8`."""
        return self.image_processor.resize_uint8(image)

    def raw_inputs(self, images: Sequence[NDArray[np.uint8]], instructions: Sequence[str]) -> dict[str, Tensor]:
        """Inputs with raw frames, which the model normalises itself."""
        return dict(self(images=images, instructions=instructions, raw_images=True))

    def prompt_ids(self, instruction: str) -> list[int]:
        """Prompt of an instruction as ids: BOS, the prompt's text, and Llama's stand-alone space (29871). Cached."""
        ids = self._prompt_ids.get(instruction)
        if ids is None:
            text_ids = self.tokenizer(build_prompt(instruction), add_special_tokens=False)["input_ids"]
            ids = (self.tokenizer.bos_token_id, *text_ids, *self._suffix)
            self._prompt_ids[instruction] = ids
        return list(ids)

    def __call__(
        self,
        images: Sequence[NDArray[np.uint8] | Image.Image],
        instructions: Sequence[str],
        raw_images: bool = False,
    ) -> BatchFeature:
        """Model inputs of B frames and their instructions.

        Args:
            images: B frames, uint8 [H, W, 3] RGB or PIL.
            instructions: B instructions.
            raw_images: leave pixels raw, for the model to normalise on its own device.

        Returns:
            input_ids [B, L] int64, right-padded; attention_mask [B, L] int64; pixel_values [B, 6, S, S] float32, or
            [B, 3, S, S] uint8 with `raw_images`.

        Raises:
            ValueError: the counts differ or are zero, or a frame is not RGB uint8.
        """
        if isinstance(instructions, str) or len(images) != len(instructions) or len(images) == 0:
            raise ValueError(
                f"images and instructions must be lists of the same length, at least 1; got {len(images)} images and "
                f"{instructions if isinstance(instructions, str) else len(instructions)!r} instructions"
            )
        if raw_images:
            frames = np.stack([self.image_processor.resize_uint8(image) for image in images])
            pixel_values = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
        else:
            pixel_values = self.image_processor(images)
        input_ids, attention_mask = self._pad([self.prompt_ids(instruction) for instruction in instructions])
        return BatchFeature({"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values})

    def _pad(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        longest = max(len(prompt) for prompt in prompts)
        input_ids = torch.full((len(prompts), longest), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            input_ids[row, : len(prompt)] = torch.tensor(prompt)
            attention_mask[row, : len(prompt)] = 1
        return input_ids, attention_mask


class PrismaticProcessor(OpenVLAProcessor):
    """`OpenVLAProcessor` under the name that published checkpoints give as `processor_class`.

    transformers' AutoProcessor looks the class up by that name.
    """


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
