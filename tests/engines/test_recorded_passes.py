"""Passes of an engine that are recorded, where one pass gives a decision."""

from pathlib import Path

import pytest
import torch
from engine_helpers import make_requests
from torch import nn

from tests.replay_helpers import pretend_capture
from vlarl_rllib.engines.recorded_passes import RecordedPasses
from vlarl_rllib.models.family import family_of
from vlarl_rllib.models.presets import write_checkpoint
from vlarl_rllib.models.replay import EAGER_CALLS

TEMPERATURES = (1.0, 0.0, 1.6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("tiny-oft")
    write_checkpoint("tiny-oft", directory)
    return directory


def test_recorded_passes_sample_what_the_policy_samples(checkpoint: Path) -> None:
    """Rows and prompts are filled up; new weights are read where the old ones were."""
    family = family_of(str(checkpoint))
    plain, policy = (family.load(str(checkpoint), dtype=torch.float32).eval() for _ in range(2))
    for model in (plain, policy):
        nn.init.normal_(model.add_value_head().fc3.weight, generator=torch.Generator().manual_seed(0))
    processor, shapes = family.processor(str(checkpoint)), set()
    forward = policy.forward

    def watched(*args: object, **kwargs: object) -> object:
        shapes.add(tuple(args[0].shape))  # type: ignore[attr-defined]
        return forward(*args, **kwargs)

    passes = RecordedPasses(policy, 6, pretend_capture(policy))
    passes._forward = lambda **given: watched(given.pop("input_ids"), **given)
    for count in (3, 4, 3, 1, 3, 5, 6, 3):
        requests = make_requests(count, TEMPERATURES)
        inputs = processor.raw_inputs([r.image for r in requests], [r.instruction for r in requests])
        temperatures, seeds = torch.tensor([r.temperature for r in requests]), [r.seed for r in requests]
        expected = plain.sample_action_tokens(**inputs, temperatures=temperatures, seeds=seeds)
        sampled = passes.sample(inputs, temperatures, seeds)
        assert torch.equal(sampled.tokens, expected.tokens)
        torch.testing.assert_close(sampled.log_probs, expected.log_probs, atol=1e-5, rtol=0)
        torch.testing.assert_close(sampled.values, expected.values, atol=1e-5, rtol=0)
        with torch.no_grad():
            assert torch.equal(expected.values, plain(**inputs).values) and expected.values.all()
        with torch.no_grad():
            for model in (plain, policy):
                nn.init.normal_(model.projector.fc1.weight, generator=torch.Generator().manual_seed(count))
    assert {rows for rows, _ in shapes} == {1, 4, 6} and all(length % 16 == 0 for _, length in shapes)
    replayed = [shape for shape in passes._recorded._shapes.values() if shape.replay]
    assert [shape.calls > EAGER_CALLS for shape in replayed] == [True]
