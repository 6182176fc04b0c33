"""One Ray, one tiny checkpoint and one real vLLM engine for all engine tests."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_helpers import Oracle

from benchmarks.parity import engine_spec
from vlarl_rllib.engines.pool import EnginePool
from vlarl_rllib.engines.protocol import EngineSpec
from vlarl_rllib.models.openvla import OpenVLAForActionPrediction, OpenVLAProcessor
from vlarl_rllib.models.presets import write_checkpoint
from vlarl_rllib.types import INITIAL_VERSION


@pytest.fixture(scope="session")
def spec(tmp_path_factory: pytest.TempPathFactory) -> EngineSpec:
    directory: Path = tmp_path_factory.mktemp("tiny")
    write_checkpoint("tiny", directory)
    return replace(engine_spec(directory), values=True)


@pytest.fixture
def make_oracle(spec: EngineSpec) -> Callable[[], Oracle]:
    def make() -> Oracle:
        model = OpenVLAForActionPrediction.from_pretrained(spec.model_path, dtype=torch.float32)
        model.add_value_head(spec.seed)
        return Oracle(model, OpenVLAProcessor.from_pretrained(spec.model_path))

    return make


@pytest.fixture(scope="session")
def starting_engine(ray_session: None, spec: EngineSpec) -> Iterator[EnginePool]:
    """A pool whose one real engine may still be starting, which takes a quarter of a minute to a minute."""
    pool = EnginePool(spec, 1, actor_options=[{"num_cpus": 1}], start_timeout_seconds=300)
    yield pool
    pool.shutdown()


@pytest.fixture
def vllm_engine(starting_engine: EnginePool) -> EnginePool:
    """A pool of one real engine, for all tests; one that a test has killed is replaced."""
    starting_engine.wait_until_ready()
    starting_engine.outdated(INITIAL_VERSION)
    return starting_engine
