"""Images that are there more than once: equal files, and images of nearly equal look."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pandas as pd

_HASH_BITS = 64
#: Pairs whose bits are counted at once: 8 MB of differences.
_PAIRS_AT_ONCE = 1 << 20


def group_duplicates(hashes: pd.Series) -> pd.Series:
    """Number the groups of rows that have the same hash.

    >>> group_duplicates(pd.Series(["a", "b", "", "a", ""])).tolist()
    [0, <NA>, <NA>, 0, <NA>]
    """
    is_shared = hashes.ne("") & hashes.duplicated(keep=False)
    groups = pd.Series(pd.NA, index=hashes.index, dtype="Int64")
    groups[is_shared] = pd.factorize(hashes[is_shared])[0]
    return groups


def group_near_duplicates(hashes: pd.Series, *, max_bits: int) -> pd.Series:
    """Number the groups of rows whose 64-bit hashes differ in few bits, directly or by way of others.

    Exact, and seldom all pairs: of two hashes that differ in at most ``max_bits`` bits at least one of ``max_bits + 1``
    bands of bits is the same (the pigeonhole principle; Norouzi, Punjani and Fleet 2014, "Fast exact search in Hamming
    space with multi-index hashing"), so only hashes that share a band are compared.

    >>> group_near_duplicates(pd.Series(["00000000000000ff", "00000000000000fe", "ff00000000000000"]), max_bits=1).tolist()
    [0, 0, <NA>]
    """
    known = hashes[hashes != ""]
    codes, unique = pd.factorize(known)
    components = _connect(np.array([int(text, 16) for text in unique], np.uint64), max_bits)
    # The number of a component is as good a hash as any.
    return group_duplicates(
        pd.Series(components[codes].astype(str), index=known.index).reindex(hashes.index, fill_value="")
    )


def _connect(values: npt.NDArray[np.uint64], max_bits: int) -> npt.NDArray[np.int64]:
    """Number the connected components of distinct hashes, holding no more than some of the pairs at a time."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    components = np.arange(len(values))

    def merge(pairs: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
        ends = components[np.concatenate(pairs, axis=1)]
        links = coo_array((np.ones(ends.shape[1], np.bool_), tuple(ends)), shape=(len(values), len(values)))
        return np.asarray(connected_components(links, directed=False)[1])[components]

    waiting: list[npt.NDArray[np.int64]] = []
    n_waiting = 0
    for pairs in _find_close(values, max_bits):
        waiting.append(pairs)
        n_waiting += pairs.shape[1]
        if n_waiting > _PAIRS_AT_ONCE:
            components, waiting, n_waiting = merge(waiting), [], 0
    return merge(waiting) if waiting else components


def _find_close(values: npt.NDArray[np.uint64], max_bits: int) -> Iterator[npt.NDArray[np.int64]]:
    """Find the pairs of distinct hashes that differ in at most so many bits; a pair may come several times."""
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
    """Compare the members of a band with one another, some of them with all that follow at a time."""
    n_rows = max(1, _PAIRS_AT_ONCE // len(members))
    for start in range(0, len(members) - 1, n_rows):
        block, others = members[start : start + n_rows], members[start + 1 :]
        is_close = np.bitwise_count(values[block][:, np.newaxis] ^ values[others]) <= max_bits
        first, second = np.nonzero(is_close)
        yield np.stack([block[first], others[second]])
