"""Duplicates: equal files, and images that look nearly equal."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pandas as pd

_HASH_BITS = 64
#: Pairs to compare at once: 8 MB of differences.
_PAIRS_AT_ONCE = 1 << 20


def group_duplicates(hashes: pd.Series) -> pd.Series:
    """Number the groups of rows with the same hash.

    >>> group_duplicates(pd.Series(["a", "b", "", "a", ""])).tolist()
    [0, <NA>, <NA>, 0, <NA>]
    """
    is_shared = hashes.ne("") & hashes.duplicated(keep=False)
    groups = pd.Series(pd.NA, index=hashes.index, dtype="Int64")
    groups[is_shared] = pd.factorize(hashes[is_shared])[0]
    return groups


def group_near_duplicates(hashes: pd.Series, *, max_bits: int) -> pd.Series:
    """Number the groups of rows whose 64-bit hashes differ in at most so many bits, directly or through others.

    Exact without comparing all pairs: two hashes that differ in at most ``max_bits`` bits agree in at least one of
    ``max_bits + 1`` bands of bits (the pigeonhole principle; Norouzi, Punjani and Fleet 2014, "Fast exact search in
    Hamming space with multi-index hashing"), so only hashes that share a band are compared.

    >>> hashes = pd.Series(["00000000000000ff", "00000000000000fe", "ff00000000000000"])
    >>> group_near_duplicates(hashes, max_bits=1).tolist()
    [0, 0, <NA>]
    """
    known = hashes[hashes != ""]
    codes, unique = pd.factorize(known)
    components = _connect(np.array([int(text, 16) for text in unique], np.uint64), max_bits)
    # The number of a component serves as a hash.
    numbers = pd.Series(components[codes].astype(str), index=known.index)
    return group_duplicates(numbers.reindex(hashes.index, fill_value=""))


def _connect(values: npt.NDArray[np.uint64], max_bits: int) -> npt.NDArray[np.int64]:
    """Number the connected components of distinct hashes, holding a bounded number of pairs at a time."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    components = np.arange(len(values))

    def merge(pairs: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
        ends = components[np.concatenate(pairs, axis=1)]
        links = coo_array((np.ones(ends.shape[1], np.bool_), tuple(ends)), shape=(len(values), len(values)))
        return np.asarray(connected_components(links, directed=False)[1])[components]

    waiting: list[npt.NDArray[np.int64]] = []
    n_waiting = 0
    for pairs in find_close_pairs(values, max_bits):
        waiting.append(pairs)
        n_waiting += pairs.shape[1]
        if n_waiting > _PAIRS_AT_ONCE:
            components, waiting, n_waiting = merge(waiting), [], 0
    return merge(waiting) if waiting else components


def find_close_pairs(values: npt.NDArray[np.uint64], max_bits: int) -> Iterator[npt.NDArray[np.int64]]:
    """Find the pairs of 64-bit hashes that differ in at most so many bits; pairs may repeat.

    Yields positions of shape (2, n_pairs), int64, a bounded number at a time.
    """
    edges = np.linspace(0, _HASH_BITS, max_bits + 2).astype(int) if len(values) else np.empty(0, int)
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        band = (values >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.diff(band[order], prepend=~band[order[:1]]))
        sizes = np.diff(starts, append=len(order))
        for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
            members = order[start : start + size]
            yield from _compare(values, members, max_bits)


def _compare(
    values: npt.NDArray[np.uint64], members: npt.NDArray[np.int64], max_bits: int
) -> Iterator[npt.NDArray[np.int64]]:
    """Compare all pairs of hashes that share a band, in blocks."""
    n_rows = max(1, _PAIRS_AT_ONCE // len(members))
    for start in range(0, len(members) - 1, n_rows):
        block, others = members[start : start + n_rows], members[start + 1 :]
        is_close = np.bitwise_count(values[block][:, np.newaxis] ^ values[others]) <= max_bits
        first, second = np.nonzero(is_close)
        yield np.stack([block[first], others[second]])
