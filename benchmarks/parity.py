"""How far this package is from the original OpenVLA code, array by array, on tiny checkpoints with random weights.

    python benchmarks/parity.py [GOLDEN_DIR] [--no-engine] [--out FILE]

GOLDEN_DIR holds checkpoints (`S/`, `B/`, `A/`) beside what the original code computed with them in float32 on a CPU
(`golden_S.npz`, ...); S is in `tests/data/golden`. The model runs in float32 on the CPU, and so does vLLM, unless left
out. Prints a table of the largest absolute differences and writes the same numbers as JSON; the tests take the same
numbers from here. Exit code 1 where one exceeds its tolerance.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vlarl_rllib.engines.protocol import EngineSpec
from vlarl_rllib.models.openvla import OpenVLAForActionPrediction, OpenVLAProcessor, build_prompt
from vlarl_rllib.models.openvla.actions import to_environment
from vlarl_rllib.types import SampleRequest

if TYPE_CHECKING:
    from vlarl_rllib.engines.pool import EnginePool

DEFAULT_DIRECTORY = Path(__file__).parents[1] / "tests" / "data" / "golden"
CHECKPOINTS = ("S", "B", "A")
INPUTS = {
    *(
        "images_u8",
        "instructions",
        "sample_image",
        "sample_instruction",
        "forced_tokens",
        "suites",
        "grid_values",
        "decode_tokens",
    ),
    *("full_logits_samples", "sft_batch_samples"),
}
"""Arrays that the others are computed from."""
ADAPTER_PREFIX = "lora_"
"""Arrays with the LoRA adapter in `adapter_<name>/` active, where there is one."""
ADAPTER_TOLERANCES = {
    "lora gradients (relative L2)": 1e-4,
    "lora merged weights": 5e-6,
    "lora merged weights' sums (relative)": 1e-6,
}

FEATURE_TOLERANCE, LOSS_TOLERANCE, ACTION_TOLERANCE = 5e-6, 1e-4, 1e-12
TOLERANCES = {
    **dict.fromkeys(("vision_features", "projector_output", "lora_projector_output"), FEATURE_TOLERANCE),
    **dict.fromkeys(("sft_loss", "sft_batch_loss", "lora_pg_loss"), LOSS_TOLERANCE),
    **dict.fromkeys(
        ("actions", "actions_normalized", "actions_all_suites", "env_actions", "grid_decoded", "decode_values"),
        ACTION_TOLERANCE,
    ),
    **dict.fromkeys(("bins", "bin_centers", "gripper_unnormalized", "gripper_scaled", "gripper_env"), ACTION_TOLERANCE),
}
"""Absolute; `Golden.tolerance` for other computed floats, and 0 for integers, texts and pixels."""

TEMPERATURES = (1.0, 1.6)
EOS = 2
ENGINE_SAMPLES_PER_FRAME = 2


@dataclass
class Golden:
    """A tiny checkpoint and what the original implementation computed with it."""

    name: str
    directory: Path
    vision_towers: dict
    arrays: dict
    tolerance: float
    """Absolute, for hidden states, logits and log-probs."""
    model: OpenVLAForActionPrediction
    processor: OpenVLAProcessor

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    def inputs(self, samples: slice = slice(None)) -> dict[str, Tensor]:
        """Stored model inputs of the golden samples (8 images x 3 instructions)."""
        images = self.tensor("sample_image")[samples]
        instructions = self.tensor("sample_instruction")[samples]
        input_ids = self.tensor("input_ids")
        mask = torch.arange(input_ids.shape[1]) < self.tensor("input_len")[:, None]
        return {
            "input_ids": input_ids[instructions],
            "attention_mask": mask.long()[instructions],
            "pixel_values": self.tensor("pixel_values")[images],
        }

    def requests(self, temperature: float, first_seed: int = 0) -> list[SampleRequest]:
        """The golden samples as an engine takes them."""
        images = [self.processor.image_processor.resize_uint8(image) for image in self.arrays["images_u8"]]
        samples = zip(self.arrays["sample_image"], self.arrays["sample_instruction"], strict=True)
        return [
            SampleRequest(images[image], str(self.arrays["instructions"][instruction]), first_seed + index, temperature)
            for index, (image, instruction) in enumerate(samples)
        ]


def load_golden(name: str, folder: Path) -> Golden:
    directory = folder / name
    towers = json.loads((directory / "vision_towers.json").read_text())
    with np.load(folder / f"golden_{name}.npz") as arrays:
        return Golden(
            name=name,
            directory=directory,
            vision_towers=towers,
            arrays=dict(arrays),
            # A's sequences are longer and its attention is sharper.
            tolerance=5e-4 if name == "A" else 2e-4,
            model=OpenVLAForActionPrediction.from_pretrained(directory, vision_towers=towers, dtype=torch.float32),
            processor=OpenVLAProcessor.from_pretrained(directory),
        )


def write_engine_checkpoint(golden: Golden, directory: Path) -> None:
    """A copy whose config.json knows the tower sizes, as that of every checkpoint that this package writes does."""
    shutil.copytree(golden.directory, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vision_towers": golden.vision_towers}))


def engine_spec(checkpoint: Path) -> EngineSpec:
    """A float32 engine on the CPU."""
    return EngineSpec(
        mix_calls=True,
        family="openvla",
        model_path=str(checkpoint),
        dtype="float32",
        gpus=0,
        max_batch=8,
        enforce_eager=True,
        seed=0,
    )


@dataclass(frozen=True)
class Difference:
    """What one array was compared with."""

    largest: float
    """Largest absolute difference; of texts, how many differ."""
    tolerance: float

    @property
    def is_small(self) -> bool:
        return self.largest <= self.tolerance  # not so for NaN


def compare(golden: Golden, name: str, actual: Any) -> Difference:
    """`actual` against the stored array `name`. Raises ValueError where the shapes differ."""
    expected = golden.arrays[name]
    actual = np.asarray(actual)
    if actual.shape != expected.shape:
        raise ValueError(f"{golden.name} {name}: shape {actual.shape} differs from the original's {expected.shape}")
    if expected.dtype.kind == "U":
        return Difference(float((actual != expected).sum()), 0.0)
    exact = expected.dtype.kind != "f" or name == "pixel_values"
    tolerance = 0.0 if exact else TOLERANCES.get(name, golden.tolerance)
    return Difference(float(np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max()), tolerance)


@torch.no_grad()
def model_differences(golden: Golden) -> dict[str, Difference]:
    """Every array but the inputs and the adapter's, recomputed by this package's model, processor and action tables."""
    parts = (_prepared, _vision, _greedy, _forced, _supervised, _tables, _actions)
    return {name: compare(golden, name, actual) for part in parts for name, actual in part(golden)}


def _prepared(golden: Golden) -> Iterator[tuple[str, Any]]:
    images, instructions = list(golden.arrays["images_u8"]), [str(text) for text in golden.arrays["instructions"]]
    yield "prompts", [build_prompt(instruction) for instruction in instructions]
    inputs = golden.processor(images=images[:3], instructions=instructions)
    yield "input_ids", inputs["input_ids"]
    yield "input_len", inputs["attention_mask"].sum(dim=1)
    yield "pixel_values", golden.processor(images=images, instructions=instructions[:1] * 8)["pixel_values"]


def _vision(golden: Golden) -> Iterator[tuple[str, Any]]:
    features = golden.model.vision_backbone(golden.tensor("pixel_values"))
    yield "vision_features", features
    yield "projector_output", golden.model.projector(features)


def _greedy(golden: Golden) -> Iterator[tuple[str, Any]]:
    """Decoding with a cache, and one pass over the golden greedy tokens."""
    model, first = golden.model, golden.model.action_token_ids[0]
    for temperature in TEMPERATURES:
        prediction = model.predict_action(**golden.inputs(), unnorm_key="libero_spatial", temperature=temperature)
        yield f"greedy_logprob_T{temperature}", prediction.log_probs
    yield "greedy_tokens", prediction.tokens
    yield "actions", prediction.actions

    tokens = golden.tensor("greedy_tokens")
    hidden, _ = model.action_hidden_states(**golden.inputs(), action_tokens=tokens)
    logits = model.language_model.lm_head(hidden)
    yield "greedy_hidden", hidden
    yield "greedy_action_logits", model.action_logits(**golden.inputs(), action_tokens=tokens)
    # A keeps the large full rows of four samples only.
    yield "full_logits", logits[golden.arrays.get("full_logits_samples", np.arange(len(tokens)))]
    yield "greedy_logsumexp_full", logits.logsumexp(dim=-1)
    yield "greedy_logprob_fullvocab_T1.0", chosen_log_probs(logits, tokens, 1.0)
    for temperature in TEMPERATURES:
        yield f"greedy_entropy_T{temperature}", entropy(logits[..., first : first + 256], temperature)


def _forced(golden: Golden) -> Iterator[tuple[str, Any]]:
    """Teacher forcing on three random action-token sequences of each sample."""
    model, first = golden.model, golden.model.action_token_ids[0]
    tokens = golden.tensor("forced_tokens")
    inputs = {name: tensor.repeat_interleave(3, dim=0) for name, tensor in golden.inputs().items()}
    hidden, _ = model.action_hidden_states(**inputs, action_tokens=tokens.flatten(0, 1))
    action_logits = model.action_logits(**inputs, action_tokens=tokens.flatten(0, 1)).unflatten(0, (-1, 3))
    yield "forced_action_logits", action_logits
    full = torch.stack(
        [
            chosen_log_probs(model.language_model.lm_head(part), row, 1.0)
            for part, row in zip(hidden, tokens.flatten(0, 1), strict=True)
        ]
    )
    yield "forced_logprob_fullvocab_T1.0", full.unflatten(0, (-1, 3))
    for temperature in TEMPERATURES:
        yield f"forced_logprob_T{temperature}", chosen_log_probs(action_logits, tokens - first, temperature)
        yield f"forced_entropy_T{temperature}", entropy(action_logits, temperature)


def _supervised(golden: Golden) -> Iterator[tuple[str, Any]]:
    """Cross-entropy over the first forced sequence and the end of sequence, by sample and as one padded batch."""
    tokens = golden.tensor("forced_tokens")[:, 0]
    targets = torch.cat([tokens, torch.full((len(tokens), 1), EOS)], dim=1)
    yield "sft_loss", _target_losses(golden, golden.inputs(), targets).mean(dim=1)

    samples = golden.arrays["sft_batch_samples"]
    pad = golden.processor.tokenizer.pad_token_id
    texts = [str(golden.arrays["instructions"][golden.arrays["sample_instruction"][sample]]) for sample in samples]
    rows = [
        [*golden.processor.prompt_ids(text), *targets[sample].tolist()]
        for text, sample in zip(texts, samples, strict=True)
    ]
    longest = max(len(row) for row in rows)
    input_ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    position = torch.arange(longest)
    is_target = (position >= lengths - targets.shape[1]) & (position < lengths)
    yield "sft_batch_input_ids", input_ids
    yield "sft_batch_attention_mask", position < lengths
    yield "sft_batch_labels", input_ids.where(is_target, -100)

    # The loss of the stored batch: its prompts are what has no label, its targets what has one.
    stored_ids, labels = golden.tensor("sft_batch_input_ids"), golden.tensor("sft_batch_labels")
    prompt_mask = golden.tensor("sft_batch_attention_mask") & (labels == -100)
    prompts = {
        "input_ids": stored_ids.where(prompt_mask, pad),
        "attention_mask": prompt_mask.long(),
        "pixel_values": golden.inputs()["pixel_values"][samples],
    }
    yield "sft_batch_loss", _target_losses(golden, prompts, labels[labels != -100].view(len(samples), -1)).mean()


def _tables(golden: Golden) -> Iterator[tuple[str, Any]]:
    tokenizer, arrays = golden.model.action_tokenizer, golden.arrays
    yield "bins", tokenizer.bins
    yield "bin_centers", tokenizer.bin_centers
    yield "action_token_begin_idx", golden.model.action_token_ids[0] - 1
    yield "grid_tokens", tokenizer.encode(arrays["grid_values"])
    yield "grid_decoded", tokenizer.decode(arrays["grid_tokens"])
    yield "decode_values", tokenizer.decode(arrays["decode_tokens"])


def _actions(golden: Golden) -> Iterator[tuple[str, Any]]:
    """From tokens to the environment's action, for the greedy samples and for every gripper token."""
    tokenizer, config = golden.model.action_tokenizer, golden.model.config
    normalized = tokenizer.decode(golden.arrays["greedy_tokens"])
    suites = [config.action_statistics(str(suite)) for suite in golden.arrays["suites"]]
    actions = tokenizer.unnormalize(normalized, config.action_statistics("libero_spatial"))
    yield "actions_normalized", normalized
    yield "actions_all_suites", np.stack([tokenizer.unnormalize(normalized, stats) for stats in suites], axis=1)
    yield "env_actions", [to_environment(action) for action in actions]

    ids = np.array(golden.model.action_token_ids)
    still = np.full((len(ids), 6), tokenizer.encode(0.0))
    closing = tokenizer.unnormalize(tokenizer.decode(np.column_stack([still, ids])), suites[0])
    yield "gripper_tokens", ids
    yield "gripper_unnormalized", closing[:, 6]
    yield "gripper_scaled", 2.0 * closing[:, 6] - 1.0
    yield "gripper_env", [to_environment(action)[6] for action in closing]


def adapter_differences(golden: Golden) -> dict[str, Difference]:
    """The adapter's arrays, gradients and merged weights; nothing where the checkpoint has no adapter."""
    from vlarl_rllib.models.lora import add_lora
    from vlarl_rllib.settings import LoraSettings

    directory = golden.directory.parent / f"adapter_{golden.name}"
    if not directory.is_dir():
        return {}
    model = copy.deepcopy(golden.model)
    add_lora(model, LoraSettings(adapter=str(directory)))
    differences = {name: compare(golden, name, actual) for name, actual in _adapted(golden, model)}
    for name, largest in _adapter_files(golden, model, directory):
        differences[name] = Difference(largest, ADAPTER_TOLERANCES[name])
    return differences


@torch.no_grad()
def _adapted(golden: Golden, model: OpenVLAForActionPrediction) -> Iterator[tuple[str, Any]]:
    first, tokens = model.action_token_ids[0], golden.tensor("lora_greedy_tokens")
    yield "lora_projector_output", model.projector(model.vision_backbone(golden.tensor("pixel_values")))
    hidden, _ = model.action_hidden_states(**golden.inputs(), action_tokens=tokens)
    yield "lora_full_logits", model.language_model.lm_head(hidden)
    for temperature in TEMPERATURES:
        prediction = model.predict_action(**golden.inputs(), unnorm_key="libero_spatial", temperature=temperature)
        yield f"lora_greedy_logprob_T{temperature}", prediction.log_probs
    yield "lora_greedy_tokens", prediction.tokens
    forced = golden.tensor("forced_tokens")
    logits = torch.stack(
        [model.action_logits(**golden.inputs(), action_tokens=forced[:, i]) for i in range(forced.shape[1])], dim=1
    )
    yield "lora_forced_action_logits", logits
    for temperature in TEMPERATURES:
        yield f"lora_forced_logprob_T{temperature}", chosen_log_probs(logits, forced - first, temperature)
    yield "lora_pg_loss", -chosen_log_probs(logits[:, 0], forced[:, 0] - first, 1.6).mean()


def _adapter_files(golden: Golden, model: OpenVLAForActionPrediction, directory: Path) -> Iterator[tuple[str, float]]:
    """Gradients of `lora_pg_loss`, and the weights that an engine is sent."""
    from safetensors.torch import load_file

    from vlarl_rllib.models.lora import adapter_parameters
    from vlarl_rllib.weights.source import iterate_weights

    tokens = golden.tensor("forced_tokens")[:, 0]
    logits = model.action_logits(**golden.inputs(), action_tokens=tokens)
    parameters = adapter_parameters(model)
    gradients = torch.autograd.grad(
        -chosen_log_probs(logits, tokens - model.action_token_ids[0], 1.6).mean(), list(parameters.values())
    )
    expected = load_file(directory / "gradients.safetensors")
    errors = {name: gradient - expected[name] for name, gradient in zip(parameters, gradients, strict=True)}
    yield (
        "lora gradients (relative L2)",
        max(float(error.norm() / expected[name].norm()) for name, error in errors.items()),
    )

    merged = dict(iterate_weights(model, torch.float32))
    changed = load_file(directory / "merged_weights.safetensors")
    yield "lora merged weights", max(float((merged[name] - weight).abs().max()) for name, weight in changed.items())
    sums = json.loads((directory / "merged_checksums.json").read_text())["tensors"]
    off = [abs(float(merged[name].double().abs().sum()) / values["abs_sum"] - 1.0) for name, values in sums.items()]
    off += [abs(float(merged[name].double().norm()) / values["l2"] - 1.0) for name, values in sums.items()]
    yield "lora merged weights' sums (relative)", max(off) if merged.keys() == sums.keys() else math.inf


@torch.no_grad()
def engine_differences(golden: Golden, pool: EnginePool, timeout_seconds: float = 300.0) -> dict[str, Difference]:
    """vLLM's greedy tokens and log-probs against the original's, and its samples' log-probs against this package's
    model."""
    import ray

    def sample(requests: list[SampleRequest]) -> tuple[Tensor, Tensor]:
        replies = ray.get(pool.handles[0].sample.remote(requests), timeout=timeout_seconds)
        return torch.from_numpy(np.stack([reply.tokens for reply in replies])), torch.from_numpy(
            np.stack([reply.log_probs for reply in replies])
        )

    tokens, log_probs = sample(golden.requests(temperature=0.0))
    differences = {
        "engine greedy_tokens": compare(golden, "greedy_tokens", tokens),
        "engine greedy_logprob_T1.0": compare(golden, "greedy_logprob_T1.0", log_probs),
    }
    first = golden.model.action_token_ids[0]
    for temperature in TEMPERATURES:
        largest = 0.0
        for repeat in range(ENGINE_SAMPLES_PER_FRAME):
            tokens, log_probs = sample(golden.requests(temperature, first_seed=1000 * repeat))
            logits = golden.model.action_logits(**golden.inputs(), action_tokens=tokens)
            gap = chosen_log_probs(logits, tokens - first, temperature) - log_probs
            largest = max(largest, float(gap.abs().max()))
        differences[f"engine sampled log-probs T{temperature}"] = Difference(largest, golden.tolerance)
    return differences


def chosen_log_probs(logits: Tensor, choice: Tensor, temperature: float) -> Tensor:
    """[..., V] logits and [...] indices -> [...] log-probabilities of the tempered distribution."""
    return torch.log_softmax(logits / temperature, dim=-1).gather(-1, choice[..., None])[..., 0]


def entropy(logits: Tensor, temperature: float) -> Tensor:
    return torch.distributions.Categorical(logits=logits / temperature).entropy()


def _target_losses(golden: Golden, prompts: dict[str, Tensor], targets: Tensor) -> Tensor:
    """Cross-entropy [B, A] over the full vocabulary."""
    hidden, _ = golden.model.action_hidden_states(**prompts, action_tokens=targets)
    return F.cross_entropy(golden.model.language_model.lm_head(hidden).transpose(1, 2), targets, reduction="none")


def measure(folder: Path, name: str, *, with_engine: bool) -> dict[str, Difference]:
    golden = load_golden(name, folder)
    differences = model_differences(golden) | adapter_differences(golden)
    if not with_engine:
        return differences
    from vlarl_rllib.engines.pool import EnginePool

    with tempfile.TemporaryDirectory() as scratch:
        write_engine_checkpoint(golden, Path(scratch) / name)
        pool = EnginePool(
            engine_spec(Path(scratch) / name), 1, actor_options=[{"num_cpus": 1}], start_timeout_seconds=300
        )
        try:
            pool.wait_until_ready()
            differences |= engine_differences(golden, pool)
        finally:
            pool.shutdown()
    return differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "golden_dir", type=Path, nargs="?", default=DEFAULT_DIRECTORY, help="folder of the checkpoints and their arrays"
    )
    parser.add_argument("--no-engine", action="store_true", help="the model only, without vLLM")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/parity.json"), help="JSON file to write")
    arguments = parser.parse_args()
    names = [name for name in CHECKPOINTS if (arguments.golden_dir / f"golden_{name}.npz").is_file()]
    if not names:
        sys.exit(f"{arguments.golden_dir}: has no golden_S.npz, golden_B.npz or golden_A.npz")
    if not arguments.no_engine:
        import ray

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    results = {name: measure(arguments.golden_dir, name, with_engine=not arguments.no_engine) for name in names}

    show(results, arguments.out)
    sys.exit(not all(difference.is_small for differences in results.values() for difference in differences.values()))


def show(results: Mapping[str, Mapping[str, Difference]], out: Path) -> None:
    """Print differences by checkpoint and array, and write them."""
    table = Table(
        "array", *results, "tolerance", title="largest absolute difference from the original OpenVLA code, float32, CPU"
    )
    for array in dict.fromkeys(array for differences in results.values() for array in differences):
        cells = [results[name].get(array) for name in results]
        tolerances = sorted({cell.tolerance for cell in cells if cell})
        shown = [
            "-" if cell is None else f"{cell.largest:.1e}" if cell.is_small else f"[red]{cell.largest:.1e}[/red]"
            for cell in cells
        ]
        table.add_row(
            array, *shown, " / ".join(f"{tolerance:.0e}" if tolerance else "exact" for tolerance in tolerances)
        )
    Console().print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    values = {
        name: {array: asdict(difference) for array, difference in differences.items()}
        for name, differences in results.items()
    }
    out.write_text(json.dumps(values, indent=1))
    Console().print(f"written to {out}")


if __name__ == "__main__":
    main()
