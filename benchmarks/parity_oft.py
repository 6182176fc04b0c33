"""The same as parity.py for OpenVLA-OFT: how far this package is from the original code, array by array.

    python -m benchmarks.parity_oft [GOLDEN_DIR] [--out FILE]

GOLDEN_DIR holds the tiny checkpoint `T/` and `golden_T.npz`, what the original implementations computed with it in
float32 on a CPU; in `tests/data/golden`, large arrays are cut to their first rows or left out. Three models are made of
the same weights: `one` (one image), `two` (two images and the robot's state, with the head that regresses actions)
and `nostop` (one image, no stop token). Exit code 1 where a difference exceeds its tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.parity import DEFAULT_DIRECTORY, TEMPERATURES, Difference, chosen_log_probs, entropy, show
from vlarl_rllib.models.openvla import build_prompt
from vlarl_rllib.models.openvla.actions import to_environment
from vlarl_rllib.models.openvla_oft import OpenVLAOFTForActionPrediction, OpenVLAOFTProcessor, normalize_proprio

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "two": {"num_images": 2, "proprio": True, "l1_head": True},
    "nostop": {"stop_token": False},
}
"""By mode, what is not the default of the layout."""
INPUTS = {"images_u8", "wrist_images_u8", "instructions", "unnorm_key", "proprio_states", "decode_tokens", "l1.target"}
INPUT_ENDINGS = ("sample_image", "sample_instruction", "forced_tokens", "labels")
"""Arrays that the others are computed from."""
POLICY_GRADIENT_TEMPERATURE = 1.6
TOLERANCES = {
    **dict.fromkeys(("pixel_values", "wrist_pixel_values"), 0.0),
    **dict.fromkeys(("projector_output", "wrist_projector_output"), 5e-6),
    **dict.fromkeys(("proprio_normalized", "decode_values", "actions_normalized"), 1e-12),
    "proprio_token": 2e-6,
    **dict.fromkeys(("hidden", "prompt_hidden"), 3e-4),
    **dict.fromkeys(("sft.loss", "l1.loss", "pg.loss"), 1e-4),
    **dict.fromkeys(("actions", "env_actions"), 2e-8),
}
"""Absolute, by name or by what follows the mode; `TOLERANCE` for other computed floats, 0 for integers and texts. The
original un-normalises actions with a range that is 1e-8 larger."""
TOLERANCE = GRADIENT_TOLERANCE = 1e-3
"""The latter is relative."""


@dataclass(frozen=True)
class GoldenOFT:
    """A tiny checkpoint and what the original implementations computed with it."""

    directory: Path
    vision_towers: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    @property
    def unnorm_key(self) -> str:
        return str(self.arrays["unnorm_key"])

    def model(self, mode: str, **layout: Any) -> OpenVLAOFTForActionPrediction:
        """A new model of a mode, whose layout may be changed."""
        model: OpenVLAOFTForActionPrediction = OpenVLAOFTForActionPrediction.from_pretrained(
            self.directory, vision_towers=self.vision_towers, dtype=torch.float32, **LAYOUTS[mode] | layout
        )
        return model

    def processor(self, mode: str) -> OpenVLAOFTProcessor:
        return OpenVLAOFTProcessor.from_pretrained(self.directory, **LAYOUTS[mode])

    def inputs(self, mode: str, samples: slice = slice(None), *, raw_images: bool = False) -> dict[str, Tensor]:
        """Of a mode's golden samples, from frames, states and instructions."""
        images = self.arrays[f"{mode}.sample_image"][samples]
        texts = self.arrays["instructions"][self.arrays[f"{mode}.sample_instruction"][samples]]
        both = mode == "two"
        return dict(
            self.processor(mode)(
                images=list(self.arrays["images_u8"][images]),
                instructions=[str(text) for text in texts],
                wrist_images=list(self.arrays["wrist_images_u8"][images]) if both else None,
                proprio=self.arrays["proprio_states"][images] if both else None,
                unnorm_key=self.unnorm_key,
                raw_images=raw_images,
            )
        )


@cache
def load_golden_oft(folder: Path) -> GoldenOFT:
    """From a folder with `T/` and `golden_T.npz`; nobody may change it."""
    with np.load(folder / "golden_T.npz") as arrays:
        towers = json.loads((folder / "T" / "vision_towers.json").read_text())
        return GoldenOFT(folder / "T", towers, dict(arrays))


def compare(golden: GoldenOFT, name: str, actual: Any) -> Difference:
    """`actual` against the first rows of it that are stored. Raises ValueError where the shapes differ."""
    expected, actual = golden.arrays[name], np.asarray(actual)
    actual = actual[: len(expected)] if expected.ndim else actual
    if actual.shape != expected.shape:
        raise ValueError(f"T {name}: shape {actual.shape} differs from the original's {expected.shape}")
    if expected.dtype.kind != "f":
        return Difference(float((actual != expected).sum()), 0.0)
    tolerance = TOLERANCES.get(name, TOLERANCES.get(name.partition(".")[2], TOLERANCE))
    return Difference(float(np.abs(actual.astype(np.float64) - expected).max()), tolerance)


def oft_differences(golden: GoldenOFT) -> dict[str, Difference]:
    """Every stored array but the inputs, recomputed by this package's models, processor and action tables."""
    found: dict[str, Difference] = {}
    with torch.no_grad():
        computed = [*_prepared(golden), *_vision(golden)]
        for mode in LAYOUTS:
            computed += _decided(golden, mode)
    for name, actual in computed:
        if name in golden.arrays:
            found[name] = compare(golden, name, actual)
    return found | _trained(golden)


def _prepared(golden: GoldenOFT) -> Iterator[tuple[str, Any]]:
    arrays, texts = golden.arrays, [str(text) for text in golden.arrays["instructions"]]
    processor = golden.processor("two")
    yield "prompts", [build_prompt(text) for text in texts]
    inputs = processor(
        images=list(arrays["images_u8"]),
        instructions=(texts * 3)[:8],
        wrist_images=list(arrays["wrist_images_u8"]),
        proprio=arrays["proprio_states"],
        unnorm_key=golden.unnorm_key,
    )
    yield "input_ids", inputs["input_ids"][:3]
    yield "input_len", inputs["attention_mask"][:3].sum(dim=1)
    yield "pixel_values", inputs["pixel_values"][:, :6]
    yield "wrist_pixel_values", inputs["pixel_values"][:, 6:]
    statistics = processor.proprio_statistics(golden.unnorm_key)
    yield "proprio_normalized", normalize_proprio(arrays["proprio_states"], statistics)


def _vision(golden: GoldenOFT) -> Iterator[tuple[str, Any]]:
    model, processor = golden.model("two"), golden.processor("one")
    for prefix in ("", "wrist_"):
        pixels = processor.image_processor(list(golden.arrays[f"{prefix}images_u8"]))
        yield f"{prefix}projector_output", model.projector(model.vision_backbone(pixels))
    assert model.proprio_projector is not None
    yield "proprio_token", model.proprio_projector(golden.tensor("proprio_normalized"))
    tokenizer = model.action_tokenizer
    yield "decode_values", tokenizer.decode(golden.arrays["decode_tokens"])


def _decided(golden: GoldenOFT, mode: str) -> Iterator[tuple[str, Any]]:
    """Log-probs of the best tokens and of given ones, and the actions."""
    model, inputs = golden.model(mode), golden.inputs(mode)
    output, (hidden, prompt_hidden) = model(**inputs), model.action_hidden_states(**inputs)
    logits, everything = output.action_logits, model(**inputs, full_vocabulary=True).action_logits
    everything = everything[:, : model.layout.num_tokens]
    prediction = model.predict_action(**inputs, unnorm_key=golden.unnorm_key)
    forced = golden.tensor(f"{mode}.forced_tokens")
    yield f"{mode}.action_logits", logits
    yield f"{mode}.logsumexp_full", everything.logsumexp(-1)
    yield f"{mode}.greedy_tokens", prediction.tokens
    yield f"{mode}.hidden", hidden
    yield f"{mode}.prompt_hidden", prompt_hidden
    twice = [part[:, None].expand(-1, forced.shape[1], -1, -1) for part in (logits, everything)]
    yield f"{mode}.forced_logprob_fullvocab_T1.0", chosen_log_probs(twice[1], forced, 1.0)
    for temperature in TEMPERATURES:
        best = model.predict_action(**inputs, unnorm_key=golden.unnorm_key, temperature=temperature)
        yield f"{mode}.greedy_logprob_T{temperature}", best.log_probs
        yield f"{mode}.entropy_T{temperature}", entropy(logits, temperature)
        chosen = forced - model.action_token_ids.start
        yield f"{mode}.forced_logprob_T{temperature}", chosen_log_probs(twice[0], chosen, temperature)
    normalized = model.action_tokenizer.decode(prediction.tokens.numpy()).reshape(len(forced), -1, 7)
    yield f"{mode}.actions", prediction.actions
    yield f"{mode}.actions_normalized", normalized
    yield f"{mode}.env_actions", to_environment(prediction.actions)
    if mode != "nostop":  # of `one`, the head is as in `two`
        regressing = golden.model(mode, l1_head=True)
        yield f"{mode}.l1_normalized", regressing(**inputs).normalized_actions
        yield f"{mode}.l1_actions", regressing.regress_action(**inputs, unnorm_key=golden.unnorm_key)


def _trained(golden: GoldenOFT) -> dict[str, Difference]:
    """Losses, which parameters have a gradient, and how long each is."""
    labels = golden.tensor("sft.labels")
    rows = slice(0, len(labels))
    targets = labels[labels != -100].view(len(labels), -1)
    model, inputs = golden.model("one"), golden.inputs("one")
    supervised = {name: tensor[rows] for name, tensor in inputs.items()}
    logits = model(**supervised, full_vocabulary=True).action_logits
    found = {"sft.input_ids": compare(golden, "sft.input_ids", _with_targets(golden, supervised, targets))}
    found |= _gradients(golden, "sft", model, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))

    model = golden.model("two")
    regressed = model(**golden.inputs("two", rows)).normalized_actions
    found |= _gradients(golden, "l1", model, F.l1_loss(regressed, golden.tensor("l1.target")))

    model = golden.model("one")
    tokens = golden.tensor("one.forced_tokens")[:, 0] - model.action_token_ids.start
    log_probs = chosen_log_probs(model.action_logits(**inputs), tokens, POLICY_GRADIENT_TEMPERATURE)
    return found | _gradients(golden, "pg", model, -log_probs.mean())


def _with_targets(golden: GoldenOFT, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    """Prompts with their targets behind them, padded: [B, longest]."""
    prompts = [ids[mask == 1] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    rows = [torch.cat(pair) for pair in zip(prompts, targets, strict=True)]
    pad = golden.processor("one").tokenizer.pad_token_id
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)


def _gradients(golden: GoldenOFT, loss_name: str, model: Any, loss: Tensor) -> dict[str, Difference]:
    """Of a loss, the parameters with a gradient, and the norm of each, relative to the original's."""
    loss.backward()
    norms = {
        name: float(parameter.grad.double().norm())
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    }
    stored = (golden.arrays[f"{loss_name}.{part}"].tolist() for part in ("grad_names", "grad_norms"))
    expected = dict(zip(*stored, strict=True))
    relative = max(abs(norms.get(name, 0.0) / norm - 1.0) for name, norm in expected.items())
    return {
        f"{loss_name}.loss": compare(golden, f"{loss_name}.loss", loss.detach()),
        f"{loss_name}.grad_names": Difference(float(len(norms.keys() ^ expected.keys())), 0.0),
        f"{loss_name}.grad_norms": Difference(relative, GRADIENT_TOLERANCE),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("golden_dir", type=Path, nargs="?", default=DEFAULT_DIRECTORY, help="folder of T")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/parity_oft.json"), help="JSON to write")
    arguments = parser.parse_args()
    differences = oft_differences(load_golden_oft(arguments.golden_dir))
    show({"T": differences}, arguments.out)
    sys.exit(not all(difference.is_small for difference in differences.values()))


if __name__ == "__main__":
    main()
