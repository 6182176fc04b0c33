"""The in-process engine: log-probs, seeds, batches, weights."""

from dataclasses import replace

import numpy as np
import pytest
from engine_helpers import make_requests

from vlarl_rllib.engines.protocol import EngineError
from vlarl_rllib.engines.torch_engine import TorchEngine
from vlarl_rllib.types import HALF_LOADED, INITIAL_VERSION
from vlarl_rllib.weights.protocol import GoneError


@pytest.fixture(scope="module")
def engine(spec):
    return TorchEngine(spec)


def test_log_probs_are_the_models_for_uneven_prompts_and_mixed_temperatures(engine, make_oracle):
    requests = make_requests(19, temperatures=(1.0, 0.0, 0.6, 1.7))
    replies = engine.sample(requests)
    assert make_oracle().log_prob_error(requests, replies) <= 1e-4
    assert engine.status().num_decisions >= 19


def test_values_are_zero_before_the_first_push_and_then_the_models(spec, make_oracle):
    engine, oracle, requests = TorchEngine(spec), make_oracle(), make_requests(11, temperatures=(1.0, 0.0))
    assert {reply.value for reply in engine.sample(requests)} == {0.0}
    engine.load_weights(oracle.keep(seed=1))
    replies = [*engine.sample(requests[:1]), *engine.sample(requests[1:])]
    assert oracle.value_error(requests, replies) <= 1e-6
    assert np.std([reply.value for reply in replies]) > 1e-2


def test_without_a_value_head_there_are_none_and_a_policy_that_gives_none_is_refused(spec):
    (reply,) = TorchEngine(replace(spec, values=False)).sample(make_requests(1))
    assert reply.value is None
    engine = TorchEngine(spec)
    engine._model.value_head = None
    with pytest.raises(EngineError, match=r"gives no values; set training\.values to learner"):
        engine.sample(make_requests(1))


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
    manifest = oracle.keep(seed=1)
    renamed = tuple(replace(spec, name=f"module.{spec.name}") for spec in manifest.tensors)
    with pytest.raises(ValueError, match="weights do not fit the policy"):
        engine.load_weights(replace(manifest, tensors=renamed))
    after = engine.sample(requests)
    assert all(np.array_equal(a.log_probs, b.log_probs) for a, b in zip(before, after, strict=True))
    assert after[0].policy_version == INITIAL_VERSION
    assert engine.load_weights(manifest) == manifest.version
    assert oracle.log_prob_error(requests, engine.sample(requests)) <= 1e-4


def test_a_version_that_goes_while_it_is_loaded_leaves_an_engine_that_samples_nothing(spec, make_oracle):
    engine, oracle = TorchEngine(spec), make_oracle()
    manifest = oracle.keep(seed=1)
    first, last = manifest.buckets[0], manifest.buckets[-1]
    kept = list(last.handle)
    last.handle.clear()
    with pytest.raises(EngineError, match="weights of two versions: the weights are gone: it was freed"):
        engine.load_weights(manifest)
    assert engine.policy_version == HALF_LOADED
    with pytest.raises(EngineError, match="weights of two versions"):
        engine.sample(make_requests(1))
    last.handle.extend(kept)
    assert engine.load_weights(manifest) == manifest.version and engine.sample(make_requests(1))
    first.handle.clear()
    with pytest.raises(GoneError):  # before the model was touched: it is well
        TorchEngine(spec).load_weights(manifest)
