"""A push of the weights by finer parts than `vlarl bench sync` has, for each transport that this machine allows, and
what follows where learner or engine dies in the middle of one.

    python benchmarks/weights.py SCRATCH --model 7b --json weights.json                # random 7B with LoRA, GPUs of 1
    python benchmarks/weights.py SCRATCH --model 7b --kill engine --kill learner       # one of them dies in a push
    python benchmarks/weights.py SCRATCH --model small                                 # the same in a minute on a CPU

For each transport: two warm pushes, then the median of several, and one in which every bucket's SHA-256 is compared on
arrival. Between pushes the adapters change, so that what arrives can be told from what was there: the engine's replies
must change with every push, and be the same for the same weights whatever they came by. SCRATCH takes 15 GB for a 7B.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch

from vlarl_rllib.config import VLAPPOConfig
from vlarl_rllib.engines.actor import EngineActor
from vlarl_rllib.engines.pool import EnginePool
from vlarl_rllib.errors import one_line
from vlarl_rllib.learner.rank import Rank
from vlarl_rllib.learner.rank_group import RankGroup
from vlarl_rllib.learner.sharded_policy import ShardedPolicy
from vlarl_rllib.models.build import build_policy
from vlarl_rllib.models.family import family_of, read_facts
from vlarl_rllib.models.presets import resolve_model
from vlarl_rllib.settings import Settings
from vlarl_rllib.types import SampleRequest, WeightBucket, WeightManifest
from vlarl_rllib.weights.placement import choose_transport
from vlarl_rllib.weights.source import Published
from vlarl_rllib.weights.sync import WeightSync

GB = 1e9
NUM_REQUESTS = 8
WARM_UP = 2
SECONDS = 900


class PushingLearner(Rank):
    """An actor: one rank with the policy and its adapters, that only publishes; it knows how long each part took."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = Settings.from_dict(settings)
        self.seconds: Counter[str] = Counter()
        self._dies_at, self._timed = -1, set[str]()

    def build(self) -> None:
        model = self.settings.model
        self.join_alone()
        device = self.choose_device()
        torch.manual_seed(0)
        family = family_of(model.path, model.family)
        self.sharded = ShardedPolicy(
            build_policy(model, device),
            None,
            family,
            family.read_facts(model.path).actions,
            self.settings,
            device=device,
            rank=self._rank,
            world_size=self._world_size,
            lr=1e-4,
            weight_decay=0.0,
            if_diverged="",
        )
        self._device = device
        Published.gather = self._timing(  # type: ignore[method-assign]
            Published.gather, lambda item, *_: "gather" if item.adapted is None else "merge"
        )

    @torch.no_grad()
    def learn(self, seed: int) -> None:
        """Other adapters; the same ones for the same seed."""
        generator = torch.Generator(self._device).manual_seed(seed)
        for name, parameter in self.sharded.policy.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                shard = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                shard.normal_(std=0.02, generator=generator)
        self._wait()

    def begin_publishing(self, version: int, transport: str, *, whole: bool, keep: bool) -> WeightManifest:
        publisher = self.sharded.publisher
        manifest = publisher.begin(version, transport, whole=whole, keep=keep)
        if transport not in self._timed:
            self._timed.add(transport)
            publisher._transport.put = self._timing(publisher._transport.put, lambda *_: "put")  # type: ignore
        return manifest

    def next_bucket(self, done: int) -> WeightBucket | None:
        if self.sharded.publisher._next == self._dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.sharded.publisher.next(done)

    def end_publishing(self) -> None:
        self.sharded.publisher.end()

    def check(self, checksum: bool) -> None:
        """Whether what is published has a checksum."""
        self.sharded.publisher._with_checksums = checksum

    def num_buckets(self) -> int:
        """Of the push that has begun."""
        return len(self.sharded.publisher._plan)

    def die_at(self, bucket: int) -> None:
        """At the beginning of that bucket of the next push."""
        self._dies_at = bucket

    def take_seconds(self) -> dict[str, float]:
        seconds, self.seconds = dict(self.seconds), Counter()
        return seconds

    def memory_gb(self) -> float:
        """Of this process on the card, as PyTorch holds it."""
        return torch.cuda.memory_reserved() / GB if self._device.type == "cuda" else 0.0

    def shutdown(self) -> None:
        self.sharded.close()
        self.leave()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _timing(self, inner: Callable[..., Any], part_of: Callable[..., str]) -> Callable[..., Any]:
        """`inner`, which adds up what it takes, the card's work included."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = inner(*args, **kwargs)
            self._wait()
            self.seconds[part_of(*args)] += time.perf_counter() - began
            return result

        return timed


class TimedEngine(EngineActor):
    """The product's engine, which also says how long it took to fetch buckets and to load them."""

    async def update_seconds(self) -> dict[str, float]:
        return dict(self._update.seconds)


class Peak:
    """How much more memory is used while a block runs, of the card and of the host, all processes together."""

    def __init__(self) -> None:
        self.gpu_gb = self.host_gb = self.store_gb = 0.0

    def __enter__(self) -> Peak:
        self._ended, self._card = threading.Event(), None
        self._before = _host_used()
        self._thread = threading.Thread(target=self._watch_host, daemon=True)
        self._thread.start()
        if torch.cuda.is_available() and shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms", "20"]
            self._card = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
            assert self._card.stdout is not None
            self._card_before = float(self._card.stdout.readline())
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._card is not None:
            time.sleep(0.1)
            self._card.terminate()
            values = [float(line) for line in self._card.communicate()[0].split()]
            self.gpu_gb = (max([self._card_before, *values]) - self._card_before) * 2**20 / GB

    def _watch_host(self) -> None:
        while not self._ended.wait(0.01):
            now = _host_used()
            self.host_gb = max(self.host_gb, now[0] - self._before[0])
            self.store_gb = max(self.store_gb, now[1] - self._before[1])


def _host_used() -> tuple[float, float]:
    """In GB: of all memory, and of /dev/shm."""
    return psutil.virtual_memory().used / GB, shutil.disk_usage("/dev/shm").used / GB


class Bench:
    """Learner and engine, and the pushes between them."""

    def __init__(self, settings: Settings, pushes: int) -> None:
        self.pushes, self._settings, self._version, self._seed = pushes, settings, 0, 0
        config = VLAPPOConfig.from_settings(settings)
        options = [{"num_cpus": 1, "num_gpus": settings.engines.gpus}]
        began = time.perf_counter()
        self.pool = EnginePool(
            config.engine_spec(), 1, actor_options=options, start_timeout_seconds=SECONDS, engine_class=TimedEngine
        )
        self.learners = RankGroup(PushingLearner, {"settings": settings.to_dict()}, settings)
        self.pool.wait_until_ready()
        print(f"learner and engine ready after {time.perf_counter() - began:.0f} s", flush=True)
        side = read_facts(settings.model.path).image_size
        frames = np.random.default_rng(0).integers(0, 256, (NUM_REQUESTS, side, side, 3), dtype=np.uint8)
        self._requests = [SampleRequest(frame, "pick up the black bowl", 0, 0.0) for frame in frames]

    def transports(self) -> dict[str, str]:
        """Each that can serve here; of the others, why not, is printed."""
        places = self.learners.call("place")[0], self.pool.places()
        choice = choose_transport("auto", *places)
        print(f"auto chooses {choice.name}: {choice.why}", flush=True)
        usable = {}
        for name in ("cuda_ipc", "nixl", "object_store"):
            try:
                usable[name] = choose_transport(name, *places).name
            except ValueError as error:
                print(f"not measured: {error}", flush=True)
        return usable

    def sync(self, transport: str, *, keep: bool = False) -> WeightSync:
        return WeightSync(self.learners, self.pool, self._version, transport=transport, keep=keep)

    def push(self, sync: WeightSync, seed: int) -> dict[str, float]:
        """Weights of this seed; the seconds of each part."""
        self.learners.call("learn", seed)
        self.learners.call("take_seconds")
        began = time.perf_counter()
        manifest = sync.push()
        whole = time.perf_counter() - began
        self._version = sync.version
        engine = ray.get(self.pool.handles[0].update_seconds.remote(), timeout=SECONDS)
        return {"whole": whole, "gb": manifest.num_bytes / GB} | self.learners.call("take_seconds")[0] | engine

    def replies(self) -> tuple[np.ndarray, np.ndarray]:
        """Greedy tokens and log-probs of the engine."""
        replies = ray.get(self.pool.handles[0].sample.remote(self._requests), timeout=SECONDS)
        assert {reply.policy_version for reply in replies} == {self._version}, "replies of another version"
        return np.stack([r.tokens for r in replies]), np.stack([r.log_probs for r in replies])

    def measure(self, transport: str) -> dict[str, Any]:
        """Whole pushes (as after a restart of the engine) and pushes of what training changes alone."""
        sync, result = self.sync(transport), dict[str, Any]()
        for kind in ("whole", "trained"):
            rows = []
            with Peak() as peak:
                for number in range(WARM_UP + self.pushes):
                    if kind == "whole":
                        self.pool.members[0].base = ""
                    self._seed += 1
                    row = self.push(sync, self._seed)
                    if number >= WARM_UP:
                        rows.append(row)
                    elif number == 0:
                        first = row["whole"]
            medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
            extra = {"gpu_gb": peak.gpu_gb, "host_gb": peak.host_gb, "store_gb": peak.store_gb}
            result[kind] = {"first": first, "median": medians, "extra": extra, "rows": rows}
            line = "  ".join(f"{name} {value:.3f}" for name, value in medians.items())
            extras = "  ".join(f"{name} {value:.2f}" for name, value in extra.items())
            print(f"{transport:13} {kind:8} first {first:.2f}  {line}  | extra: {extras}", flush=True)
        result["learner_reserved_gb"] = self.learners.call("memory_gb")[0]
        return result

    def verify(self, transports: list[str]) -> dict[str, Any]:
        """Checksums on arrival, and replies: other weights answer otherwise, the same ones alike by every transport."""
        self.learners.call("check", True)
        answers, found = {}, {}
        for transport in transports:
            sync = self.sync(transport)
            for seed in (-1, -2):
                self.pool.members[0].base = ""
                self.push(sync, seed)
                answers[transport, seed] = self.replies()
        self.learners.call("check", False)
        reference = answers[transports[0], -1]
        for transport in transports:
            same, other = answers[transport, -1], answers[transport, -2]
            found[transport] = {
                "checksums": "equal",
                "tokens_equal_to_first_transport": float((same[0] == reference[0]).mean()),
                "log_prob_gap_to_first_transport": float(np.abs(same[1] - reference[1]).max()),
                "tokens_equal_to_other_weights": float((same[0] == other[0]).mean()),
                "log_prob_gap_to_other_weights": float(np.abs(same[1] - other[1]).max()),
            }
            assert found[transport]["log_prob_gap_to_other_weights"] > 1e-3, "other weights, the same answers"
            assert np.abs(same[1] - reference[1])[:, 0].max() < 0.1, "the same weights, other answers"
        print(json.dumps(found, indent=2), flush=True)
        return found

    def kill(self, whom: str, transport: str) -> dict[str, Any]:
        """Have the engine or the learner die in the middle of a push, and say what followed."""
        sync = self.sync(transport)
        self.learners.call("begin_publishing", self._version, transport, whole=False, keep=False)
        num_buckets = self.learners.call("num_buckets")[0]
        middle, result = num_buckets // 2, {"whom": whom, "transport": transport, "buckets": num_buckets}
        self._seed += 1
        learner_before = self.learners.call("memory_gb")[0]
        engine = self.pool.pids[0]
        began = time.perf_counter()
        if whom == "engine":
            self.learners.call("learn", self._seed)
            with self._at_bucket(middle, lambda: os.kill(engine, signal.SIGKILL)):
                sync.push()
            self._version = sync.version
            result |= {"push_with_restart_seconds": time.perf_counter() - began}
        else:
            self.learners.call("die_at", middle)
            try:
                sync.push()
                raise AssertionError("the push ended though its learner died")
            except Exception as error:  # whatever a lost learner raises
                result |= {"raised": one_line(error), "noticed_seconds": time.perf_counter() - began}
            self._version = sync.version
            status = ray.get(self.pool.handles[0].ping.remote(), timeout=SECONDS)
            assert status.pid == engine, "the engine died with the learner"
            result |= {"engine_version_meanwhile": status.policy_version}
            self.learners.rebuild()
            result |= {"learner_rebuilt_seconds": time.perf_counter() - began}
            self.push(self.sync(transport), self._seed)
        result |= {
            "engine_restarts": self.pool.num_restarts,
            "version_in_engine": self.pool.statuses()[0].policy_version,  # type: ignore[union-attr]
            "version_pushed": self._version,
            "learner_reserved_gb": [learner_before, self.learners.call("memory_gb")[0]],
            "seconds": time.perf_counter() - began,
        }
        assert result["version_in_engine"] == self._version
        self.replies()
        print(json.dumps(result), flush=True)
        return result

    @contextmanager
    def _at_bucket(self, index: int, act: Any) -> Iterator[None]:
        """Do something when the learners are asked for that bucket."""
        inner, count = self.learners.call, Counter[str]()

        def call(method: str, *args: Any, **kwargs: Any) -> list[Any]:
            count[method] += 1
            if method == "next_bucket" and count[method] == index + 1:
                act()
            return inner(method, *args, **kwargs)

        self.learners.call = call  # type: ignore[method-assign]
        try:
            yield
        finally:
            self.learners.call = inner  # type: ignore[method-assign]


def settings_for(arguments: argparse.Namespace, model: str) -> Settings:
    on_gpu = torch.cuda.is_available()
    dtype = "bfloat16" if on_gpu else "float32"
    gpu = {"gpus": 0.45} if on_gpu else {}
    return Settings.from_dict(
        {
            "model": {
                "path": model,
                "unnorm_key": "libero_spatial",
                "dtype": dtype,
                "lora": {"rank": 32, "targets": arguments.targets},
            },
            "env": {"name": "synthetic", "tasks": [0]},
            "engines": {"dtype": dtype, "max_batch": 16, "enforce_eager": arguments.eager, **gpu},
            "learners": {"num": 1, **gpu},
            "weights": {"bucket_mb": arguments.bucket_mb},
            "training": {"old_log_probs": "recompute", "minibatch_size": 16},
            "evaluation": {"episodes": 0},
            "run": {"dashboard": False},
        }
    )


def model_path(arguments: argparse.Namespace) -> str:
    """A directory; random weights of the published sizes for `7b`."""
    if arguments.model != "7b":
        return resolve_model(arguments.model)
    directory = arguments.scratch.resolve() / "openvla-7b-random"
    if not directory.is_dir():
        from vlarl_rllib.models.openvla.random_7b import write_random_7b

        began = time.perf_counter()
        write_random_7b(directory)
        print(f"random 7B written in {time.perf_counter() - began:.0f} s", flush=True)
    return str(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument(
        "--model", default="7b", help="7b = random weights of the published sizes; a preset; a directory"
    )
    parser.add_argument("--targets", default="language_model", help="model.lora.targets")
    parser.add_argument("--bucket-mb", type=int, default=256)
    parser.add_argument("--pushes", type=int, default=5)
    parser.add_argument("--transport", action="append", help="only this one; may be given several times")
    parser.add_argument("--kill", action="append", choices=("engine", "learner"), default=[])
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs in the engine")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "model": arguments.model,
        "bucket_mb": arguments.bucket_mb,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "transports": {},
        "kills": [],
    }

    def save() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=2) + "\n")

    arguments.scratch.mkdir(parents=True, exist_ok=True)
    settings = settings_for(arguments, model_path(arguments))
    ray.init(num_cpus=max(4, os.cpu_count() or 1), include_dashboard=False, log_to_driver=False)
    try:
        bench = Bench(settings, arguments.pushes)
        usable = [name for name in bench.transports() if name in (arguments.transport or (name,))]
        for transport in usable:
            result["transports"][transport] = bench.measure(transport)
            save()
        if not arguments.no_verify:
            result["verified"] = bench.verify(usable)
            save()
        for whom in arguments.kill:
            for transport in usable:
                result["kills"].append(bench.kill(whom, transport))
                save()
        bench.learners.shutdown()
        bench.pool.shutdown()
    finally:
        ray.shutdown()
    save()


if __name__ == "__main__":
    main()
