"""The in-process engine: log-probs, seeds, batches, weights."""

import numpy as np
import pytest
import torch
from engine_helpers import make_requests

from vlarl_rllib.engines import torch_engine
from vlarl_rllib.engines.protocol import EngineError
from vlarl_rllib.engines.torch_engine import TorchEngine
from vlarl_rllib.types import INITIAL_VERSION
from vlarl_rllib.weights.protocol import VersionGoneError
from vlarl_rllib.weights.source import iterate_weights


@pytest.fixture(scope="module")
def engine(spec):
    return TorchEngine(spec)


def test_log_probs_are_the_models_for_uneven_prompts_and_mixed_temperatures(engine, make_oracle):
    requests = make_requests(19, temperatures=(1.0, 0.0, 0.6, 1.7))
    replies = engine.sample(requests)
    assert make_oracle().log_prob_error(requests, replies) <= 1e-4
    assert engine.status().num_decisions >= 19


def test_tokens_depend_on_a_requests_own_seed_alone(engine):
    requests = make_requests(10)
    together = engine.sample(requests)
    alone = [engine.sample([request])[0] for request in requests]
    for one, other in zip(together, alone, strict=True):
        assert np.array_equal(one.tokens, other.tokens)
    assert not np.array_equal(together[0].tokens, engine.sample(make_requests(1, first_seed=50))[0].tokens)


def test_weights_of_the_wrong_names_or_shapes_change_nothing(spec, make_oracle):
    engine, oracle = TorchEngine(spec), make_oracle()
    requests = make_requests(3)
    before = engine.sample(requests)
    tensors = dict(iterate_weights(oracle.model, torch.float32))
    renamed = {f"module.{name}": tensor for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match="weights do not fit the policy"):
        engine.load_weights(oracle.publish(renamed.items()))
    after = engine.sample(requests)
    assert all(np.array_equal(a.log_probs, b.log_probs) for a, b in zip(before, after, strict=True))
    assert after[0].policy_version == INITIAL_VERSION
    manifest = oracle.push(seed=1)
    assert engine.load_weights(manifest) == manifest.version
    assert oracle.log_prob_error(requests, engine.sample(requests)) <= 1e-4


def test_a_version_that_goes_while_it_is_loaded_ends_the_engine(spec, make_oracle, monkeypatch):
    engine, oracle = TorchEngine(spec), make_oracle()
    manifest = oracle.push(seed=1)
    retired = manifest.version + 1
    monkeypatch.setattr(torch_engine, "check_names_and_shapes", lambda *_: oracle.publisher.retire(before=retired))
    with pytest.raises(EngineError, match=f"weights of two versions: weights version {manifest.version} is gone"):
        engine.load_weights(manifest)
    with pytest.raises(VersionGoneError):  # at once, and the engine is well
        engine.load_weights(manifest)
