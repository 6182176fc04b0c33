"""Rates, peak memory, the rate of matrix products, profiles: what all benchmarks measure with."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import torch

from vlarl_rllib.bench.result import Operation

WARM_UP = 2
"""Calls before the first one that counts: kernels are chosen and compiled, batches of another size among them."""
REPEATS, SECONDS, MOST_REPEATS = 3, 1.0, 50
"""At least so many calls count, and as many as fit into so long."""
GPU_SIDE, CPU_SIDE = 8192, 1024
"""Of the square matrices whose product is the ceiling: large enough that its rate no longer rises."""
PRODUCTS = 10
"""The best of so many."""
PROFILED_STEPS, PROFILE_ROWS = 3, 15


def rate(
    call: Callable[[], float],
    device: torch.device,
    *,
    prepare: Callable[[], None] = lambda: None,
) -> float:
    """Amount a second: the median over calls.

    Args:
        call: returns the amount that it has done.
        prepare: before each call, outside of its time.
    """
    rates: list[float] = []
    began = time.perf_counter()
    for number in range(WARM_UP + MOST_REPEATS):
        if number == WARM_UP:
            began = time.perf_counter()
        prepare()
        _finish(device)
        start = time.perf_counter()
        amount = call()
        _finish(device)
        if number >= WARM_UP:
            rates.append(amount / (time.perf_counter() - start))
        if len(rates) >= REPEATS and time.perf_counter() - began > SECONDS:
            break
    return statistics.median(rates)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large product of this type, the best of several: the ceiling of all that is made of products."""
    side = GPU_SIDE if device.type == "cuda" else CPU_SIDE
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty(side, side, device=device, dtype=dtype)
    best = 0.0
    for _ in range(WARM_UP + PRODUCTS):
        _finish(device)
        began = time.perf_counter()
        torch.mm(left, right, out=out)
        _finish(device)
        best = max(best, 2.0 * side**3 / (time.perf_counter() - began))
    del left, right, out
    forget_peak(device)  # an engine looks at what the card has left
    return best


def copy_rate(device: torch.device, num_bytes: int) -> float:
    """Bytes a second of a plain copy of so many, within the device."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> float:
        target.copy_(source)
        return float(num_bytes)

    return rate(copy, device)


def peak_memory_gb(device: torch.device) -> float:
    """Of this process: the most that torch had on the GPU since `forget_peak`; on the CPU what is resident now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9


def forget_peak(device: torch.device) -> None:
    """Free what nothing refers to any more, and count the peak from here."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@contextmanager
def threads(count: float) -> Iterator[None]:
    """With so many threads for a CPU's products, as the actors that are measured beside it have."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, int(count)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def profiled(step: Callable[[], object], device: torch.device) -> list[Operation]:
    """The operations, on a GPU the kernels, with the largest self time over a few steps."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    step()
    with profile(activities=activities) as recorded:
        for _ in range(PROFILED_STEPS):
            step()
        _finish(device)
    found = [
        (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.key, event.count)
        for event in recorded.key_averages()
    ]
    return [
        Operation(name, microseconds / 1e3 / PROFILED_STEPS, count / PROFILED_STEPS)
        for microseconds, name, count in sorted(found, reverse=True)[:PROFILE_ROWS]
    ]


def device_of(gpus: float) -> torch.device:
    """Of something that reserves so many."""
    return torch.device("cuda", 0) if gpus else torch.device("cpu")


def name_of(device: torch.device) -> str:
    """For the table's title."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
