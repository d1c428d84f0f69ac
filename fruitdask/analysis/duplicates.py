"""Duplicates: equal files, and images that look nearly equal."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

_HASH_BITS = 64
#: Pairs to compare at once: 8 MB of differences.
_PAIRS_AT_ONCE = 1 << 20
#: Rows to look up at once.
_ROWS_AT_ONCE = 1 << 18
#: Hashes in a range that is compared together with others.
_MAX_SMALL = 32


def group_duplicates(keys: npt.NDArray[np.uint64], is_known: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """Number the groups of rows with the same key, shape (n, k), in the order of their first rows.

    Returns shape (n,), int32; -1 for rows that have no duplicate or have no key.

    >>> keys = np.array([[7, 1], [7, 2], [0, 0], [7, 1], [0, 0]], np.uint64)
    >>> group_duplicates(keys, np.array([True, True, False, True, False]))
    array([ 0, -1, -1,  0, -1], dtype=int32)
    """
    # Of millions of rows, few share their first number; sorting whole rows would take several times the memory.
    first = keys[is_known, 0]
    first.sort()
    repeated = first[1:][first[1:] == first[:-1]]
    del first
    is_repeated = is_known.copy()
    for block in _split_rows(len(keys)):
        is_repeated[block] &= _is_among(keys[block, 0], repeated)
    rows = np.flatnonzero(is_repeated)
    # Stable, so the rows of a group stay in their order.
    rows = rows[np.lexsort(tuple(keys[rows, column] for column in range(keys.shape[1])))]
    is_first = np.ones(len(rows), bool)
    is_first[1:] = (keys[rows[1:]] != keys[rows[:-1]]).any(axis=1)
    starts = np.flatnonzero(is_first)
    sizes = np.diff(starts, append=len(rows))
    starts, sizes = starts[sizes > 1], sizes[sizes > 1]
    numbers = np.empty(len(starts), np.int32)
    numbers[np.argsort(rows[starts])] = np.arange(len(starts))
    groups = np.full(len(keys), -1, np.int32)
    # Rows of a group follow each other.
    members = np.arange(sizes.sum()) + np.repeat(starts - np.cumsum(sizes) + sizes, sizes)
    groups[rows[members]] = np.repeat(numbers, sizes)
    return groups


def group_near_duplicates(
    hashes: npt.NDArray[np.uint64], is_known: npt.NDArray[np.bool_], *, max_bits: int
) -> npt.NDArray[np.int32]:
    """Number the groups of rows whose 64-bit hashes differ in at most `max_bits` bits, directly or through others.

    Returns shape (n,), int32; -1 for rows that have no duplicate or have no hash.

    Exact without comparing all pairs: two hashes that differ in at most ``max_bits`` bits agree in at least one of
    ``max_bits + 1`` bands of bits (the pigeonhole principle; Norouzi, Punjani and Fleet 2014, "Fast exact search in
    Hamming space with multi-index hashing"), so only hashes that share a band are compared.

    >>> hashes = np.array([0xFF, 0xFE, 0xFF << 56], np.uint64)
    >>> group_near_duplicates(hashes, np.ones(3, bool), max_bits=1)
    array([ 0,  0, -1], dtype=int32)
    """
    unique, codes = _number_distinct(hashes[is_known])
    # This frees their memory, unless the caller has kept them.
    del hashes
    # The number of a component serves as a hash.
    components = np.zeros((len(is_known), 1), np.uint64)
    components[is_known, 0] = _connect(unique, max_bits)[codes]
    del unique, codes
    return group_duplicates(components, is_known)


def _number_distinct(values: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32]]:
    """Return the distinct values, sorted, and the position of each value among them; in less memory than NumPy."""
    ordered = np.sort(values)
    is_first = np.ones(len(values), bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    distinct = ordered[is_first]
    del ordered, is_first
    codes = np.empty(len(values), np.int32)
    for rows in _split_rows(len(values)):
        codes[rows] = np.searchsorted(distinct, values[rows])
    return distinct, codes


def _split_rows(n_rows: int) -> Iterator[slice]:
    """Split rows into blocks."""
    return (slice(start, start + _ROWS_AT_ONCE) for start in range(0, n_rows, _ROWS_AT_ONCE))


def _is_among(values: npt.NDArray[np.uint64], wanted: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Return a mask of values that are among others, which are sorted; without the copies of ``numpy.isin``."""
    if not len(wanted):
        return np.zeros(len(values), bool)
    found: npt.NDArray[np.bool_] = wanted[np.searchsorted(wanted, values).clip(max=len(wanted) - 1)] == values
    return found


def choose_groups(
    groups: npt.NDArray[np.int32], codes: npt.NDArray[np.int32], *, n_groups: int, n_rows: int
) -> npt.NDArray[np.int64]:
    """Choose rows of groups, as many groups as are wanted and as many more as make up `n_rows`: those across classes
    first, and large ones before small ones.

    >>> choose_groups(np.array([0, 0, 1, -1, 1], np.int32), np.array([3, 3, 3, 3, 4]), n_groups=1, n_rows=1)
    array([2, 4])
    """
    rows = np.flatnonzero(groups >= 0)
    if not len(rows):
        return rows
    rows = rows[np.lexsort((codes[rows], groups[rows]))]
    numbers = groups[rows]
    is_other = np.diff(codes[rows], prepend=-1) != 0
    is_other[np.flatnonzero(np.diff(numbers, prepend=-1))] = True
    sizes, n_labels = np.bincount(numbers), np.bincount(numbers, is_other)
    order = np.lexsort((-sizes, -n_labels))
    n_chosen = max(n_groups, int(np.searchsorted(np.cumsum(sizes[order]), n_rows)) + 1)
    return np.flatnonzero(np.isin(groups, order[:n_chosen]))


def _connect(values: npt.NDArray[np.uint64], max_bits: int) -> npt.NDArray[np.int32]:
    """Number the connected components of distinct hashes, holding a bounded number of pairs at a time."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    components = np.arange(len(values), dtype=np.int32)

    def merge(pairs: list[npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
        ends = components[np.concatenate(pairs, axis=1)]
        # SciPy needs 30 bytes per node, and of millions of values only a few are close to another one.
        nodes, places = np.unique(ends, return_inverse=True)
        links = coo_array(
            (np.ones(ends.shape[1], np.bool_), tuple(places.reshape(ends.shape))), shape=(len(nodes),) * 2
        )
        n_connected, numbers = connected_components(links, directed=False)
        # A component takes the number of its last node.
        last = np.empty(n_connected, np.int32)
        last[numbers] = nodes
        renamed = np.arange(len(values), dtype=np.int32)
        renamed[nodes] = last[numbers]
        return renamed[components]

    waiting: list[npt.NDArray[np.int32]] = []
    n_waiting = 0
    for pairs in find_close_pairs(values, max_bits):
        waiting.append(pairs)
        n_waiting += pairs.shape[1]
        if n_waiting > _PAIRS_AT_ONCE:
            components, waiting, n_waiting = merge(waiting), [], 0
    return merge(waiting) if waiting else components


def find_close_pairs(values: npt.NDArray[np.uint64], max_bits: int) -> Iterator[npt.NDArray[np.int32]]:
    """Find the pairs of 64-bit hashes that differ in at most `max_bits` bits; pairs may repeat.

    Yields positions of shape (2, n_pairs), int32, a bounded number at a time.
    """
    edges = np.linspace(0, _HASH_BITS, max_bits + 2).astype(int) if len(values) else np.empty(0, int)
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        order, band = _order_by_bits(values, int(low), int(high))
        starts, sizes = _find_runs(band)
        del band
        is_large = sizes > _MAX_SMALL
        yield from _compare_small(values, order, starts[~is_large], sizes[~is_large], max_bits)
        for start, size in zip(starts[is_large], sizes[is_large], strict=True):
            yield from _compare(values, order[start : start + size], max_bits)


def _order_by_bits(
    values: npt.NDArray[np.uint64], low: int, high: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint64]]:
    """Order values by some of their bits; returns their positions and these bits, in this order."""
    bits = values >> np.uint64(low)
    bits &= np.uint64((1 << (high - low)) - 1)
    if high - low > 32:
        order = np.argsort(bits)
        return order.astype(np.int32), bits[order]
    # Sorting numbers of bits and position in place takes half of the memory of argsort.
    bits <<= np.uint64(32)
    bits |= np.arange(len(values), dtype=np.uint64)
    bits.sort()
    positions = bits.astype(np.uint32).view(np.int32)
    bits >>= np.uint64(32)
    return positions, bits


def _find_runs(
    ordered: npt.NDArray[np.unsignedinteger],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Find where equal values follow each other: the starts of such runs, and their sizes of two and more."""
    is_same = ordered[1:] == ordered[:-1]
    edges = np.flatnonzero(np.diff(is_same, prepend=False, append=False))
    return edges[::2], edges[1::2] - edges[::2] + 1


def _compare_small(
    values: npt.NDArray[np.uint64],
    order: npt.NDArray[np.int32],
    starts: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    max_bits: int,
) -> Iterator[npt.NDArray[np.int32]]:
    """Compare all pairs of hashes in each of many small ranges of `order`, some ranges at once."""
    n_ranges = _PAIRS_AT_ONCE // _MAX_SMALL
    for first in range(0, len(starts), n_ranges):
        size = sizes[first : first + n_ranges]
        ends = np.repeat(starts[first : first + n_ranges] + size, size)
        places = np.arange(size.sum()) + np.repeat(starts[first : first + n_ranges] + size - np.cumsum(size), size)
        for distance in range(1, int(size.max(initial=1))):
            is_inside = places + distance < ends
            places, ends = places[is_inside], ends[is_inside]
            one, other = order[places], order[places + distance]
            is_close = np.bitwise_count(values[one] ^ values[other]) <= max_bits
            if is_close.any():
                yield np.stack([one[is_close], other[is_close]])


def _compare(
    values: npt.NDArray[np.uint64], members: npt.NDArray[np.int32], max_bits: int
) -> Iterator[npt.NDArray[np.int32]]:
    """Compare all pairs of hashes that share a band, in blocks."""
    n_rows = max(1, _PAIRS_AT_ONCE // len(members))
    for start in range(0, len(members) - 1, n_rows):
        block, others = members[start : start + n_rows], members[start + 1 :]
        is_close = np.bitwise_count(values[block][:, np.newaxis] ^ values[others]) <= max_bits
        first, second = np.nonzero(is_close)
        yield np.stack([block[first], others[second]])
