"""The allocator's settings do what they are for."""

import os
import subprocess
import sys

from vlarl_rllib.process.malloc import KEEP_FREED_MEMORY

ALLOCATE = """
import resource
import numpy as np

before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    arrays = [np.ones(2**22, dtype=np.uint8) for _ in range(20)]
    del arrays
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(**environment: str) -> int:
    """Of ten rounds that use the same 84 MB; how many a round has depends on the size of the kernel's pages."""
    command = [sys.executable, "-c", ALLOCATE]
    return int(subprocess.run(command, env=os.environ | environment, check=True, capture_output=True, text=True).stdout)


def test_memory_comes_from_the_kernel_once() -> None:
    kept, returned = page_faults(**KEEP_FREED_MEMORY), page_faults()
    assert 3 * kept < returned
