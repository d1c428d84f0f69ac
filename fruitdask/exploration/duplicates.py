"""Images that are there more than once: equal files, and images of nearly equal look."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pandas as pd

_HASH_BITS = 64
#: Pairs whose bits are counted at once: 8 MB of differences.
_PAIRS_AT_ONCE = 1 << 20


def group_duplicates(hashes: pd.Series) -> pd.Series:
    """
    Number the groups of rows that have the same hash.

    Parameters
    ----------
    hashes : pandas.Series
        Hashes as text; an empty one equals no other.

    Returns
    -------
    pandas.Series
        For each row the number of its group, Int64, from 0 in the order of their first rows; missing for rows that are alone.

    Examples
    --------
    >>> group_duplicates(pd.Series(["a", "b", "", "a", ""])).tolist()
    [0, <NA>, <NA>, 0, <NA>]
    """
    is_shared = hashes.ne("") & hashes.duplicated(keep=False)
    groups = pd.Series(pd.NA, index=hashes.index, dtype="Int64")
    groups[is_shared] = pd.factorize(hashes[is_shared])[0]
    return groups


def group_near_duplicates(hashes: pd.Series, *, max_bits: int) -> pd.Series:
    """
    Number the groups of rows whose 64-bit hashes differ in few bits, directly or by way of others.

    Parameters
    ----------
    hashes : pandas.Series
        Perceptual hashes, 16 hexadecimal digits each; an empty one is like no other.
    max_bits : int
        Two hashes are alike if they differ in at most so many bits.

    Returns
    -------
    pandas.Series
        For each row the number of its group, Int64, from 0 in the order of their first rows; missing for rows that are alone.

    Notes
    -----
    Exact, and seldom all pairs: of two hashes that differ in at most ``max_bits`` bits at least one of ``max_bits + 1`` bands of bits is
    the same (the pigeonhole principle; Norouzi, Punjani and Fleet 2014, "Fast exact search in Hamming space with multi-index hashing"),
    so only hashes that share a band are compared.

    Examples
    --------
    >>> group_near_duplicates(pd.Series(["00000000000000ff", "00000000000000fe", "ff00000000000000"]), max_bits=1).tolist()
    [0, 0, <NA>]
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    known = hashes[hashes != ""]
    codes, unique = pd.factorize(known)
    values = np.array([int(text, 16) for text in unique], np.uint64)
    pairs = np.concatenate([np.empty((2, 0), np.int64), *_find_close(values, max_bits)], axis=1)
    links = coo_array((np.ones(pairs.shape[1], np.bool_), (pairs[0], pairs[1])), shape=(len(values), len(values)))
    components = connected_components(links, directed=False)[1] if len(values) else np.empty(0, np.int64)
    # The number of a component is as good a hash as any.
    return group_duplicates(
        pd.Series(components[codes].astype(str), index=known.index).reindex(hashes.index, fill_value="")
    )


def _find_close(values: npt.NDArray[np.uint64], max_bits: int) -> Iterator[npt.NDArray[np.int64]]:
    """Find the pairs of distinct hashes that differ in at most so many bits; a pair may come several times."""
    edges = np.linspace(0, _HASH_BITS, max_bits + 2).astype(int)
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        band = (values >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.diff(band[order], prepend=~band[order[:1]]))
        for members in np.split(order, starts[1:]):
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
