"""The allocator's settings do what they are for."""

import os
import subprocess
import sys

from vlarl_rllib.malloc import KEEP_FREED_MEMORY

ROUNDS, ARRAYS, PAGES = 10, 20, 1024

ALLOCATE = f"""
import resource
import numpy as np

for _ in range({ROUNDS}):
    arrays = [np.ones({PAGES} * 4096, dtype=np.uint8) for _ in range({ARRAYS})]
    del arrays
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def page_faults(**environment: str) -> int:
    command = [sys.executable, "-c", ALLOCATE]
    return int(subprocess.run(command, env=os.environ | environment, check=True, capture_output=True, text=True).stdout)


def test_memory_comes_from_the_kernel_once() -> None:
    kept, returned = page_faults(**KEEP_FREED_MEMORY), page_faults()
    assert kept < 2 * ARRAYS * PAGES < returned
