"""What the tests of learners share."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from learner_helpers import build

from vlarl_rllib.learner.learner_group import VLALearnerGroup


@pytest.fixture
def make_group(ray_session: None) -> Iterator[Callable[..., VLALearnerGroup]]:
    groups: list[VLALearnerGroup] = []

    def make(num_learners: int, model: dict[str, Any] | None = None, **sections: Any) -> VLALearnerGroup:
        groups.append(build(num_learners, model, **sections))
        return groups[-1]

    yield make
    for group in groups:
        group.shutdown()
