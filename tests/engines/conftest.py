"""One Ray, one tiny checkpoint and one real vLLM engine for all engine tests."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import torch
from engine_helpers import Oracle

from vlarl_rllib.engines.pool import EnginePool
from vlarl_rllib.engines.protocol import EngineSpec
from vlarl_rllib.models.openvla import OpenVLAForActionPrediction, OpenVLAProcessor
from vlarl_rllib.models.presets import write_checkpoint
from vlarl_rllib.weights.shared_memory import SharedMemoryPublisher


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(num_cpus=8, include_dashboard=False, object_store_memory=2**28)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def spec(tmp_path_factory: pytest.TempPathFactory) -> EngineSpec:
    directory: Path = tmp_path_factory.mktemp("tiny")
    write_checkpoint("tiny", directory)
    return EngineSpec(
        model_path=str(directory),
        dtype="float32",
        gpus=0,
        max_batch=8,
        gpu_memory_gb=None,
        enforce_eager=True,
        seed=0,
    )


@pytest.fixture
def make_oracle(spec: EngineSpec) -> Iterator[Callable[[], Oracle]]:
    publishers = []

    def make() -> Oracle:
        publisher = SharedMemoryPublisher(run_id="test", bucket_bytes=2**20)
        publishers.append(publisher)
        model = OpenVLAForActionPrediction.from_pretrained(spec.model_path, dtype=torch.float32)
        return Oracle(model, OpenVLAProcessor.from_pretrained(spec.model_path), publisher)

    yield make
    for publisher in publishers:
        publisher.close()


@pytest.fixture(scope="session")
def vllm_engine(ray_session: None, spec: EngineSpec) -> Iterator[EnginePool]:
    """A pool of one real engine; starting it takes a quarter of a minute to a minute, so all tests share it."""
    pool = EnginePool(spec, 1, actor_options=[{"num_cpus": 1}], start_timeout_seconds=300)
    pool.wait_until_ready()
    yield pool
    pool.shutdown()
