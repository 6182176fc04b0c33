"""One Ray for the whole session, which every test that needs actors shares, and the golden checkpoints."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from benchmarks.parity import Golden
    from benchmarks.parity_oft import GoldenOFT

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # no token file in the home directory
# Many tests import RLlib before this package; TensorFlow, which it would import, is no company for one that renders.
TORCH_ALONE = {"RLLIB_TEST_NO_TF_IMPORT": "1", "RLLIB_TEST_NO_JAX_IMPORT": "1"}
os.environ.update(TORCH_ALONE)
# A shell starts what it puts into the background with Ctrl-C ignored, and the programs that tests interrupt would
# inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    import ray

    with pytest.MonkeyPatch.context() as patch:
        for name in TORCH_ALONE:  # a user's Ray has not heard of them
            patch.delenv(name)
        ray.init(num_cpus=8, include_dashboard=False, object_store_memory=2**28, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def golden_s() -> Golden:
    """The smallest golden checkpoint. Tests that change it must copy it."""
    from benchmarks.parity import DEFAULT_DIRECTORY, load_golden

    return load_golden("S", DEFAULT_DIRECTORY)


@pytest.fixture(scope="session")
def golden_folder() -> Callable[[str], Path]:
    """The first of the folders in VLARL_GOLDEN_DIR that has a file; skips the test where there is none."""

    def find(file: str) -> Path:
        for folder in os.environ.get("VLARL_GOLDEN_DIR", "").split(os.pathsep):
            if folder and (Path(folder) / file).is_file():
                return Path(folder)
        pytest.skip(f"{file} is kept outside the repository, and VLARL_GOLDEN_DIR names no folder with it")

    return find


@pytest.fixture(scope="session", params=["S", "B", "A"])
def golden(request: pytest.FixtureRequest) -> Golden:
    """Each golden checkpoint in turn: a tiny model, and what the original implementation computed with it."""
    from benchmarks.parity import load_golden

    if request.param == "S":
        return request.getfixturevalue("golden_s")
    return load_golden(request.param, request.getfixturevalue("golden_folder")(f"golden_{request.param}.npz"))


@pytest.fixture(scope="session")
def golden_t() -> GoldenOFT:
    """The golden checkpoint of OpenVLA-OFT, with few of its large arrays. Nobody may change what it loads."""
    from benchmarks.parity import DEFAULT_DIRECTORY
    from benchmarks.parity_oft import load_golden_oft

    return load_golden_oft(DEFAULT_DIRECTORY)
