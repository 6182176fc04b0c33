"""One Ray for the whole session; every test that needs actors shares it."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # no token file in the home directory


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    import ray

    ray.init(num_cpus=8, include_dashboard=False, object_store_memory=2**28, log_to_driver=False)
    yield
    ray.shutdown()
