"""OpenVLA-7B on one GPU, with random weights in published shards: load, sample through vLLM, train adapters, sync,
export, reload.

    python benchmarks/openvla_7b.py SCRATCH --json 7b.json         # bfloat16 base
    python benchmarks/openvla_7b.py SCRATCH --quantization 4bit --json 7b-4bit.json
    python benchmarks/openvla_7b.py SCRATCH --in-tree              # the export through vLLM's own OpenVLA class
    python benchmarks/openvla_7b.py SCRATCH --preset tiny          # the same steps in a minute on a CPU

SCRATCH takes 15 GB for the weights and 15 GB for each export; two versions of the weights (30 GB) must fit into
/dev/shm.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

INSTRUCTIONS = ("pick up the black bowl on the stove and place it on the plate", "open the top drawer of the cabinet")
NUM_FRAMES = 16
SECONDS: dict[str, float] = {}


@contextmanager
def timed(name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    SECONDS[name] = time.perf_counter() - began
    print(f"{name:44} {SECONDS[name]:8.1f} s", flush=True)


def settings_for(arguments: argparse.Namespace, model: str) -> Any:
    from vlarl_rllib.settings import Settings

    dtype = "float32" if arguments.cpu else "bfloat16"
    gpu = {} if arguments.cpu else {"gpus": 0.45}
    return Settings.from_dict(
        {
            "model": {
                "path": model,
                "unnorm_key": "libero_spatial",
                "dtype": dtype,
                "lora": {"rank": 32},
                "quantization": arguments.quantization,
            },
            "env": {"name": "synthetic", "tasks": [0, 1], "num_envs": 16, "num_processes": 2, "models_per_process": 2},
            "rollout": {"steps_per_iteration": arguments.steps},
            "engines": {"dtype": dtype, "max_batch": 16, **gpu},
            "learners": {"num": 1, "micro_batch_size": arguments.micro_batch_size, **gpu},
            "training": {"minibatch_size": 64, "lr": 1e-4, "old_log_probs": "recompute"},
            "evaluation": {"episodes": 0},
            "run": {"iterations": 100, "dashboard": False},
        }
    )


def frames(image_size: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (NUM_FRAMES, 8, 8, 3), dtype=np.uint8)
    side = -(-image_size // 8)
    return list(coarse.repeat(side, 1).repeat(side, 2)[:, :image_size, :image_size])


def train(arguments: argparse.Namespace, model: str, run: Path) -> dict[str, Any]:
    """Three iterations, a checkpoint, and what the engine does with the last weights."""
    import ray

    from vlarl_rllib.config import VLAPPOConfig
    from vlarl_rllib.models.family import read_facts
    from vlarl_rllib.models.presets import resolve_model
    from vlarl_rllib.types import SampleRequest

    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    with timed("start engine, learner and runner"):
        algorithm = VLAPPOConfig.from_settings(settings_for(arguments, model), run).build_algo()
    rows = []
    for iteration in range(3):
        row = algorithm.train()["vlarl"]
        rows.append(row)
        seconds = ", ".join(f"{name} {row['seconds'][name]:.1f} s" for name in ("sample", "update", "sync"))
        print(
            f"iteration {iteration + 1}: {row['env_steps']} steps, {seconds}, log-prob gap mean "
            f"{row['logprob_gap_mean']:.1e}",
            flush=True,
        )
    with timed("checkpoint"):
        pointer = run / "pointer"
        pointer.mkdir()
        algorithm.save_checkpoint(str(pointer))
    memory = {
        "learner_peak_gb": algorithm.learner_group.call("apply", peak_memory_gb)[0],
        "device_used_gb": device_used_gb(),
    }
    image_size = read_facts(resolve_model(algorithm.config.settings().model.path)).image_size
    requests = [SampleRequest(frame, INSTRUCTIONS[i % 2], 0, 0.0) for i, frame in enumerate(frames(image_size))]
    replies = ray.get(algorithm.engine_pool.handles[0].sample.remote(requests))
    algorithm.stop()
    ray.shutdown()
    tokens, log_probs = np.stack([reply.tokens for reply in replies]), np.stack([reply.log_probs for reply in replies])
    np.savez(run / "engine.npz", tokens=tokens, log_probs=log_probs)
    picked = (
        "logprob_gap_mean",
        "logprob_gap_max",
        "approx_kl",
        "grad_norm",
        "skipped_updates",
        "sync_bytes",
        "seconds",
    )
    return {"iterations": [{name: row[name] for name in picked} for row in rows], "memory": memory}


def peak_memory_gb(learner: Any) -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0


def device_used_gb() -> float:
    """Of the whole card, all processes together."""
    if not torch.cuda.is_available():
        return 0.0
    out = subprocess.run(
        ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(out.stdout.split()[0]) * 2**20 / 1e9


@torch.no_grad()
def reload(out: Path, run: Path, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """The export through transformers' Auto classes, against what the engine said."""
    from transformers import AutoModelForImageTextToText

    import vlarl_rllib.models.openvla as openvla

    with timed("reload the export"):
        model = AutoModelForImageTextToText.from_pretrained(out, dtype=dtype).to(device)
    inputs = inputs_on(openvla.OpenVLAProcessor.from_pretrained(out), model)
    prediction = model.predict_action(**inputs, unnorm_key="libero_spatial")
    engine = np.load(run / "engine.npz")
    same = prediction.tokens.cpu().numpy() == engine["tokens"]
    # Behind the first token that differs the two go different ways.
    agreeing = np.cumprod(same, axis=1).astype(bool)
    gap = np.abs(prediction.log_probs.cpu().numpy() - engine["log_probs"])[agreeing]
    return {
        "first_tokens_equal": float(same[:, 0].mean()),
        "tokens_equal": float(same.mean()),
        "log_prob_gap_max": float(gap.max()),
    }


def inputs_on(processor: Any, model: Any) -> dict[str, torch.Tensor]:
    pictures = frames(model.config.image_size)
    inputs = processor(
        images=pictures, instructions=[INSTRUCTIONS[i % 2] for i in range(len(pictures))], raw_images=True
    )
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


@torch.no_grad()
def quantization_error(arguments: argparse.Namespace, model: str, device: str) -> dict[str, float]:
    """Action logits of the quantised base against the bfloat16 one, same frames and tokens."""
    from vlarl_rllib.models.build import build_policy
    from vlarl_rllib.models.openvla import OpenVLAProcessor

    settings = settings_for(arguments, model).model
    logits = {}
    for name in ("base", "quantised"):
        chosen = settings if name == "quantised" else settings.model_copy(update={"quantization": None})
        policy = build_policy(chosen, device).to(device)
        ids = policy.action_token_ids
        tokens = torch.randint(ids.start, ids.stop, (NUM_FRAMES, 7), generator=torch.Generator().manual_seed(0)).to(
            device
        )
        logits[name] = policy.action_logits(
            **inputs_on(OpenVLAProcessor.from_pretrained(model), policy), action_tokens=tokens
        ).cpu()
        del policy
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    base, quantised = (torch.log_softmax(logits[name], -1) for name in ("base", "quantised"))
    kl = (base.exp() * (base - quantised)).sum(-1).mean()
    return {
        "relative_logit_error": float((logits["quantised"] - logits["base"]).norm() / logits["base"].norm()),
        "mean_kl": float(kl),
        "greedy_equal": float((base.argmax(-1) == quantised.argmax(-1)).float().mean()),
    }


def in_tree(out: Path, run: Path) -> dict[str, Any]:
    """The export through vLLM's own class, untouched by ours: prompts and PIL images in, tokens out."""
    import os

    os.environ["VLLM_PLUGINS"] = ""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from PIL import Image
    from vllm import LLM, SamplingParams

    from vlarl_rllib.models.openvla import OpenVLAProcessor

    processor = OpenVLAProcessor.from_pretrained(out)
    with timed("start vLLM's own OpenVLA"):
        llm = LLM(
            str(out),
            dtype="bfloat16",
            max_model_len=512,
            max_num_seqs=16,
            enforce_eager=True,
            limit_mm_per_prompt={"image": 1},
        )
    prompts = [
        {
            "prompt_token_ids": processor.prompt_ids(INSTRUCTIONS[i % 2]),
            "multi_modal_data": {"image": Image.fromarray(frame)},
        }
        for i, frame in enumerate(frames(224))
    ]
    greedy = SamplingParams(
        temperature=0.0, max_tokens=7, ignore_eos=True, allowed_token_ids=list(range(31744, 32000)), detokenize=False
    )
    tokens = np.array([list(output.outputs[0].token_ids) for output in llm.generate(prompts, greedy)])
    same = tokens == np.load(run / "engine.npz")["tokens"]
    return {
        "architecture": "OpenVLAForActionPrediction (vLLM)",
        "first_tokens_equal": float(same[:, 0].mean()),
        "tokens_equal": float(same.mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--quantization", choices=("8bit", "4bit"))
    parser.add_argument("--preset", help="a small preset instead of 7B sizes")
    parser.add_argument("--steps", type=int, default=8, help="of each of 16 slots and iteration")
    parser.add_argument("--micro-batch-size", type=int, default=16)
    parser.add_argument("--in-tree", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.cpu = not torch.cuda.is_available()
    device, dtype = ("cpu", torch.float32) if arguments.cpu else ("cuda", torch.bfloat16)
    run, out = (
        arguments.scratch.resolve() / f"{name}-{arguments.quantization or 'bf16'}" for name in ("run", "export")
    )
    if arguments.in_tree:
        result = in_tree(out, run)
    else:
        model = arguments.preset or str(arguments.scratch.resolve() / "openvla-7b-random")
        if not arguments.preset and not Path(model).is_dir():
            from vlarl_rllib.models.openvla.random_7b import write_random_7b

            with timed("write random weights in published shards"):
                write_random_7b(Path(model))
        for directory in (run, out):
            shutil.rmtree(directory, ignore_errors=True)
        result = {"quantization": arguments.quantization}
        if arguments.quantization:
            from vlarl_rllib.models.presets import resolve_model

            with timed("quantised and bfloat16 forward"):
                result["forward"] = quantization_error(arguments, resolve_model(model), device)
            print(json.dumps(result), flush=True)
        result |= train(arguments, model, run)
        print(json.dumps(result), flush=True)
        from vlarl_rllib.runs.export import export_merged, find_training_checkpoint

        checkpoint = find_training_checkpoint(run)
        assert checkpoint is not None
        with timed("export"):
            export_merged(checkpoint, out)
        result["reload"] = reload(out, run, device, dtype)
    result["seconds"] = SECONDS
    result["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
