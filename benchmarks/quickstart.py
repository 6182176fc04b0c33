"""Does it learn? The quickstart on several seeds, beside more fine-tuning, and controls that must not learn.

    python benchmarks/quickstart.py SCRATCH [--seeds 5 6 7] [--parts quickstart more_sft frozen shuffled local]
        [--out FILE]

For each seed, all from the model that the quickstart's fine-tuning left:
    quickstart  `vlarl quickstart configs/quickstart.yaml`
    more_sft    fine-tuning anew on the same demonstrations, for longer by PPO's wall time
    frozen      PPO with learning rates of 0: the greedy episodes must stay as they are
    shuffled    PPO with the rewards of each iteration dealt out to its fragments at random
    local       the quickstart's PPO with `engines.num: 0`
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import vlarl_rllib
from vlarl_rllib.evaluation.report import wilson_interval
from vlarl_rllib.learner.collate import RolloutBatch
from vlarl_rllib.learner.learner import VLALearner
from vlarl_rllib.runs.directory import RunDirectory
from vlarl_rllib.runs.files import STAGES_FILE

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
PARTS = ("quickstart", "more_sft", "frozen", "shuffled", "local")
FROZEN = {"training.lr": 0.0, "training.value_lr": 0.0}


class ShuffledLearner(VLALearner):
    """Every fragment of an iteration gets the rewards of another one, at its end."""

    def _targets(self, batch: RolloutBatch) -> dict[str, Tensor]:
        ends = torch.from_numpy(batch.column).diff(append=torch.zeros(1, dtype=torch.long)) <= 0
        sums = batch.rows(batch.rewards).sum(1)
        dealt = torch.zeros_like(batch.rewards)
        dealt[ends] = sums[torch.randperm(len(sums), generator=torch.Generator().manual_seed(self._weights_seq_no))]
        return super()._targets(replace(batch, rewards=dealt))


def command(log: Path, *arguments: str, **overrides: Any) -> float:
    """Run `vlarl ...` with its output in a file; its seconds. Raises CalledProcessError where it fails."""
    sets = [part for key, value in overrides.items() for part in ("--set", f"{key}={value}")]
    began = time.perf_counter()
    with log.open("w") as file:
        subprocess.run(
            [sys.executable, "-m", "vlarl_rllib", *arguments, *sets], check=True, stdout=file, stderr=subprocess.STDOUT
        )
    return time.perf_counter() - began


def evaluations(run: Path) -> list[dict[str, Any]]:
    """The greedy evaluations of a run of `vlarl train`, in order."""
    rows = RunDirectory(run).read_rows()
    return [row[key] for row in rows for key in ("initial_evaluation", "evaluation") if row[key]]


def quickstart(scratch: Path, seed: int) -> dict[str, Any]:
    run = scratch / f"quickstart_{seed}"
    wall = command(
        scratch / f"quickstart_{seed}.log", "quickstart", str(CONFIG), "--run-dir", str(run), **{"run.seed": seed}
    )
    stages = {stage["stage"]: stage for stage in json.loads((run / STAGES_FILE).read_text())}
    before, after = evaluations(run)[0], evaluations(run)[-1]
    return {
        "before": before,
        "after": after,
        "wall_seconds": wall,
        "ppo_seconds": stages["PPO"]["seconds"],
        "sft_seconds": stages["supervised fine-tuning"]["seconds"],
        "env_steps": RunDirectory(run).read_rows()[-1]["env_steps"],
    }


def more_sft(scratch: Path, seed: int) -> dict[str, Any]:
    first, tuned = scratch / f"quickstart_{seed}", scratch / f"more_sft_{seed}"
    stages = {stage["stage"]: stage["seconds"] for stage in json.loads((first / STAGES_FILE).read_text())}
    settings = RunDirectory(first / "sft").settings()
    factor = 1.0 + stages["PPO"] / stages["supervised fine-tuning"]
    overrides = {"sft.steps": round(settings.sft.steps * factor)}
    wall = command(
        scratch / f"more_sft_{seed}.log",
        "sft",
        str(first / "sft" / "config.yaml"),
        "--run-dir",
        str(tuned),
        **overrides,
    )
    return {
        "after": frozen(scratch, seed, tuned / "model", f"more_sft_eval_{seed}", iterations=1)["before"],
        "wall_seconds": wall,
    }


def frozen(
    scratch: Path, seed: int, model: Path | None = None, name: str | None = None, *, iterations: int = 3
) -> dict[str, Any]:
    """Greedy success before and after PPO without learning, from `model` or what the quickstart fine-tuned."""
    name = name or f"frozen_{seed}"
    overrides = FROZEN | {"run.iterations": iterations, "training.critic_warmup_iterations": 0}
    return train(scratch, seed, name, overrides | ({"model.path": str(model)} if model else {}))


def train(scratch: Path, seed: int, name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """The quickstart's PPO again with some settings changed."""
    run = scratch / name
    command(
        scratch / f"{name}.log",
        "train",
        str(scratch / f"quickstart_{seed}" / "config.yaml"),
        "--run-dir",
        str(run),
        **overrides,
    )
    return {"before": evaluations(run)[0], "after": evaluations(run)[-1]}


def shuffled(scratch: Path, seed: int) -> dict[str, Any]:
    """The quickstart's PPO with a learner that shuffles; in this process, since the command line has no such
    learner."""
    import ray

    from vlarl_rllib.config import VLAPPOConfig
    from vlarl_rllib.observability.metrics import iteration_row

    settings = RunDirectory(scratch / f"quickstart_{seed}").settings()
    config = VLAPPOConfig.from_settings(settings, scratch / f"shuffled_{seed}")
    config.learners(learner_class=ShuffledLearner)
    ray.init(
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1])}},
    )
    algorithm = config.build_algo()
    try:
        rows = [iteration_row(algorithm.train()) for _ in range(settings.run.iterations)]
    finally:
        algorithm.stop()
        ray.shutdown()
    return {
        "before": rows[0]["initial_evaluation"],
        "after": rows[-1]["evaluation"],
        "training_success": [row["success_rate"] for row in rows],
    }


def local(scratch: Path, seed: int) -> dict[str, Any]:
    began = time.perf_counter()
    return train(scratch, seed, f"local_{seed}", {"engines.num": 0}) | {"wall_seconds": time.perf_counter() - began}


MEASUREMENTS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "quickstart": quickstart,
    "more_sft": more_sft,
    "frozen": frozen,
    "shuffled": shuffled,
    "local": local,
}


def code_digest() -> str:
    """Changes with the package's sources, the quickstart's settings and this file."""
    sources = [CONFIG, Path(__file__), *sorted(Path(vlarl_rllib.__file__).parent.rglob("*.py"))]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


def measure(scratch: Path, seeds: list[int], parts: list[str]) -> dict[str, dict[int, dict[str, Any]]]:
    """What came of each part and seed; also in SCRATCH/results.json after each, where a later call finds it again.

    Raises:
        RuntimeError: what is there was measured with other code or settings.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    file, digest = scratch / "results.json", code_digest()
    stored = json.loads(file.read_text()) if file.is_file() else {"code": digest, "results": {}}
    if stored["code"] != digest:
        raise RuntimeError(
            f"{file} was measured with other code or settings; remove {scratch}, or give another directory"
        )
    results = {
        part: {int(seed): result for seed, result in by_seed.items()} for part, by_seed in stored["results"].items()
    }
    for seed in seeds:
        for part in (part for part in PARTS if part in parts):  # the quickstart first, which the others go on from
            if seed not in results.setdefault(part, {}):
                for unfinished in scratch.glob(f"{part}*_{seed}"):
                    shutil.rmtree(unfinished)
                results[part][seed] = MEASUREMENTS[part](scratch, seed)
                file.write_text(json.dumps({"code": digest, "results": results}, indent=2))
    return results


def table(results: dict[str, dict[int, dict[str, Any]]]) -> Table:
    shown = Table("seed", "part", "before", "after", "points", "env steps", "PPO seconds", "wall seconds")
    for seed in sorted({seed for by_seed in results.values() for seed in by_seed}):
        for part, by_seed in results.items():
            if result := by_seed.get(seed):
                before = result.get("before") or results["quickstart"][seed]["before"]
                points = 100 * (result["after"]["success_rate"] - before["success_rate"])
                amounts = (
                    f"{result[key]:,.0f}" if key in result else "-"
                    for key in ("env_steps", "ppo_seconds", "wall_seconds")
                )
                shown.add_row(str(seed), part, _rate(before), _rate(result["after"]), f"{points:+.1f}", *amounts)
    return shown


def _rate(evaluation: dict[str, Any]) -> str:
    rate, episodes = evaluation["success_rate"], evaluation["episodes"]
    low, high = wilson_interval(round(rate * episodes), episodes)
    return f"{100 * rate:.1f} % of {episodes} ({100 * low:.0f}-{100 * high:.0f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 6, 7])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments.scratch.resolve(), arguments.seeds, arguments.parts)
    Console().print(table(found))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2))
