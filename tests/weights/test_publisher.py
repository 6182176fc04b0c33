"""What exists of a version at a time, and what stays of it."""

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch

from tests.weights.probe_transport import NUM_BUCKETS, LocalTransport, TinyModel
from vlarl_rllib.settings import WeightSettings
from vlarl_rllib.types import Site
from vlarl_rllib.weights.publisher import Publisher
from vlarl_rllib.weights.sync import WeightSync

COUNTING = f"{__name__}:CountingTransport"


class CountingTransport(LocalTransport):
    """Counts the buckets that exist."""

    alive: ClassVar[int] = 0
    most: ClassVar[int] = 0

    def put(self, tensors: Sequence[torch.Tensor]) -> Any:
        CountingTransport.alive += 1
        CountingTransport.most = max(CountingTransport.most, CountingTransport.alive)
        return super().put(tensors)

    def free(self, handle: Any) -> None:
        CountingTransport.alive -= 1
        super().free(handle)


class LendingTransport(LocalTransport):
    """A handle is the very tensors."""

    lends_tensors = True

    def put(self, tensors: Sequence[torch.Tensor]) -> Any:
        return list(tensors)


class Learners:
    """One rank in this process."""

    def __init__(self) -> None:
        self.model = TinyModel(0.0)
        self.publisher = Publisher(self.model, torch.float32, WeightSettings(bucket_mb=1), rank=0)
        self.begin_publishing, self.next_bucket = self.publisher.begin, self.publisher.next
        self.end_publishing = self.publisher.end

    def call(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        return [getattr(self, method)(*args, **kwargs)]

    def place(self) -> Site:
        return Site()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[CountingTransport]:
    monkeypatch.setattr(CountingTransport, "alive", 0)
    monkeypatch.setattr(CountingTransport, "most", 0)
    return CountingTransport


def test_two_buckets_exist_at_a_time_and_none_behind_a_push(counted: type[CountingTransport]):
    sync = WeightSync(Learners(), None, version=0, transport=COUNTING)
    for _ in range(2):
        sync.push()
        assert (counted.alive, counted.most) == (0, 2)


def test_a_kept_version_goes_when_the_next_one_is_complete(counted: type[CountingTransport]):
    learners = Learners()
    sync, trained = WeightSync(learners, None, version=0, transport=COUNTING, keep=True), NUM_BUCKETS - 1
    first = sync.push()
    assert (counted.alive, counted.most) == (NUM_BUCKETS, NUM_BUCKETS)
    second = sync.push()
    assert (counted.alive, counted.most) == (NUM_BUCKETS, NUM_BUCKETS + trained)
    assert second.buckets[0] is first.buckets[0] and second.buckets[0].handle, "what is frozen is kept for all versions"
    assert not any(bucket.handle for bucket in first.buckets[1:])
    # Somebody who knows of no kept buckets is given all of them.
    third = WeightSync(learners, None, version=10, transport=COUNTING, keep=True).push()
    assert third.whole and counted.alive == NUM_BUCKETS and not second.buckets[0].handle
    learners.publisher.close()
    assert counted.alive == 0


def test_what_is_lent_does_not_change_with_the_learner():
    learners = Learners()
    transport = f"{__name__}:LendingTransport"
    frozen, *trained = WeightSync(learners, None, version=0, transport=transport, keep=True).push().buckets
    learners.model.train_to(5.0)
    assert frozen.handle[0].data_ptr() == next(learners.model.parameters()).data_ptr()
    assert [float(bucket.handle[0][0, 0]) for bucket in trained] == [1.0, 2.0, 3.0]


def test_versions_do_not_decrease():
    publisher = Learners().publisher
    publisher.begin(3, COUNTING, whole=True, keep=False)
    publisher.begin(3, COUNTING, whole=False, keep=False)  # the same weights once more
    with pytest.raises(ValueError, match="version=2 must not be below the last published one, 3"):
        publisher.begin(2, COUNTING, whole=True, keep=False)
