"""A real vLLM engine against the original OpenVLA implementation, on golden checkpoints S, B and A."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.parity import Golden, engine_differences, engine_spec, write_engine_checkpoint
from vlarl_rllib.engines.pool import EnginePool


@pytest.fixture(scope="module")
def golden_engine(ray_session: None, golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EnginePool]:
    """An engine of its own for each checkpoint, one after the other."""
    directory: Path = tmp_path_factory.mktemp("golden") / golden.name
    write_engine_checkpoint(golden, directory)
    pool = EnginePool(engine_spec(directory), 1, actor_options=[{"num_cpus": 1}], start_timeout_seconds=300)
    try:
        pool.wait_until_ready()
        yield pool
    finally:
        pool.shutdown()


def test_vllm_answers_as_the_original_did(golden: Golden, golden_engine: EnginePool) -> None:
    """Greedy tokens and log-probs are the original's; sampled tokens have the log-probs that our model gives them."""
    differences = engine_differences(golden, golden_engine)
    assert {name: difference for name, difference in differences.items() if not difference.is_small} == {}
