"""Kernels of resizing, compiled by Numba when this module is imported, and kept for the next process."""

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
import numpy.typing as npt
from numba import types

from fruitdask.worker.images.resize import COEFFICIENT_BITS

Kernel = TypeVar("Kernel", bound=Callable[..., None])

#: Rows that are narrowed together, and the minimum height of an image: their pixels in a column fill two cache lines.
ROWS = 32

_BYTES = types.Array(numba.uint8, 2, "C", readonly=True)
_PIXELS = types.Array(numba.uint32, 2, "C", readonly=True)
_INTEGERS = types.Array(numba.int32, 2, "C", readonly=True)


def _compile(*arguments: Any) -> Callable[[Kernel], Kernel]:
    """Compile a function now or load it from Numba's cache; without a cache, compile for this process only."""

    def decorate(function: Kernel) -> Kernel:
        signature = types.none(*arguments)
        try:
            return numba.njit(signature, nogil=True, cache=True)(function)  # type: ignore[no-any-return]
        except Exception:
            # No folder to write to, a full disk, a damaged file.
            return numba.njit(signature, nogil=True)(function)  # type: ignore[no-any-return]

    return decorate


@_compile(_BYTES, numba.uint8[:, ::1], _INTEGERS, _INTEGERS)
def combine_rows(
    source: npt.NDArray[np.uint8],
    target: npt.NDArray[np.uint8],
    bounds: npt.NDArray[np.int32],
    coefficients: npt.NDArray[np.int32],
) -> None:
    """Combine some rows of the source into each row of the target.

    The types are spelled out because Numba computes products of 32-bit integers in 64 bits, 20 times slower here.
    """
    n_bytes = source.shape[1]
    sums = np.empty(n_bytes, np.int32)
    for row in range(len(bounds)):
        sums[:] = np.int32(1 << (COEFFICIENT_BITS - 1))
        # Unsigned, so that Numba need not look for negative indices.
        first = np.uint64(bounds[row, 0])
        for index in range(np.uint64(bounds[row, 1])):
            coefficient, values = coefficients[row, index], source[first + index]
            for place in range(n_bytes):
                sums[place] = np.int32(sums[place] + np.int32(np.int32(values[place]) * coefficient))
        found = target[row]
        for place in range(n_bytes):
            value = sums[place] >> np.int32(COEFFICIENT_BITS)
            found[place] = np.uint8(min(max(value, np.int32(0)), np.int32(255)))


@_compile(_PIXELS, numba.uint32[:, ::1], _INTEGERS, _INTEGERS)
def narrow_rows(
    source: npt.NDArray[np.uint32],
    target: npt.NDArray[np.uint32],
    bounds: npt.NDArray[np.int32],
    coefficients: npt.NDArray[np.int32],
) -> None:
    """Combine some columns of the source into each column of the target; a pixel has four bytes.

    Some rows at a time are transposed, combined and transposed back, so that the inner loop reads consecutive memory.
    """
    height, width = source.shape
    turned, narrow = np.empty((width, ROWS), np.uint32), np.empty((target.shape[1], ROWS), np.uint32)
    for start in range(0, height, ROWS):
        # The last rows overlap: a loop of a known length is faster.
        top = min(start, height - ROWS)
        for column in range(width):
            for row in range(ROWS):
                turned[column, row] = source[top + row, column]
        combine_rows(turned.view(np.uint8), narrow.view(np.uint8), bounds, coefficients)
        for row in range(ROWS):
            for column in range(target.shape[1]):
                target[top + row, column] = narrow[column, row]


@_compile(_BYTES, numba.uint8[:, ::1])
def pack_pixels(source: npt.NDArray[np.uint8], target: npt.NDArray[np.uint8]) -> None:
    """Copy the first three of each four bytes."""
    for row in range(target.shape[0]):
        for pixel in range(target.shape[1] // 3):
            for channel in range(3):
                target[row, 3 * pixel + channel] = source[row, 4 * pixel + channel]
