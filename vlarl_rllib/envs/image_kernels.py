"""The inner loops of the observation path, compiled by numba: five times faster than NumPy's array operations.

Without fast-math, LLVM neither reorders a sum nor fuses a product with an addition: float32 results are those of the
loops as written, on every machine. Compiled code is kept beside this file, or in the user's cache directory where that
one cannot be written (`NUMBA_CACHE_DIR` chooses another): the first call on a machine takes seconds, later processes
load it. Importing numba takes a second; LIBERO's simulator does it anyway.
"""

from __future__ import annotations

import numba
import numpy as np

TILE = 16
"""Rows that `transpose_pixels` moves together, so that a cache line is written whole."""


@numba.njit(cache=True, nogil=True)
def resample_rows(source: np.ndarray, first: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    """Write to row y of `out` the sum over k of weights[y, k] times row first[y] + k of `source`, in this order.

    Args:
        source: [H, N] uint8 or float32.
        first: [T] int64.
        weights: [T, taps] float32.
        out: [T, N] float32.
    """
    for y in range(len(first)):
        total = out[y]
        weight, row = weights[y, 0], source[first[y]]
        for x in range(len(total)):
            total[x] = weight * np.float32(row[x])
        for tap in range(1, weights.shape[1]):
            weight, row = weights[y, tap], source[first[y] + tap]
            for x in range(len(total)):
                total[x] += weight * np.float32(row[x])


@numba.njit(cache=True, nogil=True)
def transpose_pixels(image: np.ndarray, out: np.ndarray) -> None:
    """Write [A, B, 3] into [B, A, 3], converting to the dtype of `out`."""
    for start in range(0, image.shape[0], TILE):
        for column in range(image.shape[1]):
            for row in range(start, min(start + TILE, image.shape[0])):
                for channel in range(3):
                    out[column, row, channel] = image[row, column, channel]


@numba.njit(cache=True, nogil=True)
def interpolate_rows(
    source: np.ndarray, low: np.ndarray, high: np.ndarray, fraction: np.ndarray, out: np.ndarray
) -> None:
    """Write to row y of `out` a + (b - a) * fraction[y], where a and b are the rows low[y] and high[y] of `source`.

    Args:
        source: [H, N] float32.
        low, high: [T] int64.
        fraction: [T] float32.
        out: [T, N] float32.
    """
    for y in range(len(low)):
        a, b, share, total = source[low[y]], source[high[y]], fraction[y], out[y]
        for x in range(len(total)):
            total[x] = a[x] + (b[x] - a[x]) * share
