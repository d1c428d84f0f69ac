"""Search: the rows of a matrix of any size that are nearest to some queries, exactly, block by block."""

from collections.abc import Sequence
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.delayed import delayed

#: Distances by which to search.
METRICS = ("cosine", "euclidean")
#: Queries compared with a block at once, which bounds the memory of their distances.
_QUERIES_AT_ONCE = 256
#: Squares of norms from which on features are scaled, as sums of two would not be finite in float32.
_LARGEST_SQUARE = 1e37
#: Results of blocks merged at once.
_MERGED_AT_ONCE = 8

#: Row numbers and distances of the nearest rows, each of shape (n_queries, k), nearest first.
_Found = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]


def find_nearest(
    features: da.Array,
    queries: npt.NDArray[np.floating[Any]],
    *,
    k: int,
    metric: str,
    own: Sequence[int] | npt.NDArray[np.int64] | None = None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Find the k rows of features (n, d) that are nearest to each of some queries (q, d), nearest first.

    Exact: float32 products choose candidates, with a margin for their rounding errors, and float64 decides.
    Rows with NaN are never found. `own` are the rows of the queries themselves, which they do not find; -1 for others.
    Rows at the same distance are in the order of their numbers, so that the result does not depend on the blocks.
    Dask's current scheduler works on the blocks; a thread holds one of them.

    Returns row numbers (q, k), int64, and distances (q, k), float32; -1 and infinity where there are fewer rows.
    """
    rows = np.full(len(queries), -1) if own is None else np.asarray(own, np.int64)
    prepared = delayed(np.asarray(queries, np.float32), pure=True), delayed(rows, pure=True)
    search, merge = (delayed(function, pure=False) for function in (_search_block, merge_nearest))
    blocks = features.rechunk({1: -1}).to_delayed().ravel()
    starts = np.cumsum([0, *features.chunks[0]])[:-1].tolist()
    parts = [search(block, start, *prepared, k=k, metric=metric) for block, start in zip(blocks, starts, strict=True)]
    while len(parts) > 1:
        parts = [merge(parts[i : i + _MERGED_AT_ONCE], k=k) for i in range(0, len(parts), _MERGED_AT_ONCE)]
    found, distances = parts[0].compute()
    return found, distances.astype(np.float32)


def merge_nearest(parts: Sequence[_Found], *, k: int) -> _Found:
    """Merge the nearest rows of several blocks."""
    rows, distances = (np.concatenate(each, axis=1) for each in zip(*parts, strict=True))
    order = np.lexsort((rows, distances), axis=1)[:, :k]
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(distances, order, axis=1)


def _search_block(
    block: npt.NDArray[np.float32],
    start: int,
    queries: npt.NDArray[np.float32],
    own: npt.NDArray[np.int64],
    *,
    k: int,
    metric: str,
) -> _Found:
    """Find the nearest rows of a block whose first row has the number `start`."""
    rows, distances = np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), np.inf)
    scaled, scaled_queries = _avoid_overflow(block, queries)
    norms = _square(scaled)
    for first in range(0, len(queries), _QUERIES_AT_ONCE):
        some = slice(first, first + _QUERIES_AT_ONCE)
        lowest, highest = _bound_distances(scaled, norms, scaled_queries[some], metric)
        is_own = np.flatnonzero((own[some] >= start) & (own[some] < start + len(block)))
        for bound in (lowest, highest):
            # Comparisons with NaN are false, so such a row is not a candidate.
            bound[:, ~np.isfinite(norms)] = np.nan
            bound[is_own, own[some][is_own] - start] = np.nan
        limits = np.partition(highest, min(k, len(block)) - 1, axis=1)[:, min(k, len(block)) - 1]
        for place, (low, limit) in enumerate(zip(lowest, limits, strict=True), start=first):
            candidates = np.flatnonzero(~np.isnan(low) if np.isnan(limit) else low <= limit)
            measured = _measure_distances(block[candidates], queries[place], metric)
            nearest = np.lexsort((candidates, measured))[:k]
            rows[place, : len(nearest)] = start + candidates[nearest]
            distances[place, : len(nearest)] = measured[nearest]
    return rows, distances


def _square(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the squared norms of rows."""
    return np.asarray(np.einsum("ij,ij->i", rows, rows))


def _avoid_overflow(*arrays: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], ...]:
    """Scale arrays by one power of two if the squares of their numbers would be infinite; it changes no order."""
    if not any((_square(each) > _LARGEST_SQUARE).any() for each in arrays):
        return arrays
    # Rows with NaN are in no result.
    largest = max(float(np.fmax.reduce(np.abs(each), axis=None, initial=0)) for each in arrays)
    return tuple(np.ldexp(each, -np.frexp(largest)[1]) for each in arrays)


def _bound_distances(
    block: npt.NDArray[np.float32], norms: npt.NDArray[np.float32], queries: npt.NDArray[np.float32], metric: str
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Bound the distances, or their squares, of the rows of a block from queries, each of shape (n_queries, n).

    `norms` are the squared norms of the rows. A float32 product of d pairs is wrong by at most d times the machine
    epsilon times both norms (Higham 2002, section 3.1), whatever the order of its sums.
    """
    error = np.float32(block.shape[1] * np.finfo(np.float32).eps)
    products, own_norms = queries @ block.T, _square(queries)[:, np.newaxis]
    if metric == "cosine":
        scale = np.sqrt(own_norms) * np.sqrt(norms)
        distances = 1 - np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
        return distances - error, distances + error
    sums = own_norms + norms
    distances = sums - 2 * products
    return distances - error * sums, distances + error * sums


def _measure_distances(
    rows: npt.NDArray[np.float32], query: npt.NDArray[np.float32], metric: str
) -> npt.NDArray[np.float64]:
    """Measure the distances of rows from a query in float64; a row of zeros has no direction: its cosine is 0."""
    exact, wanted = rows.astype(np.float64), query.astype(np.float64)
    if metric == "euclidean":
        return np.asarray(np.linalg.norm(exact - wanted, axis=1))
    scale = np.linalg.norm(exact, axis=1) * np.linalg.norm(wanted)
    cosines = np.divide((exact * wanted).sum(axis=1), scale, out=np.zeros(len(exact)), where=scale > 0)
    return np.asarray(np.clip(1 - cosines, 0, 2))
