"""Hashes of many texts, and the rows that paths have in a table, block by block."""

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pandas as pd

#: Rows hashed at once: pandas makes a Python object of each text.
ROWS_AT_ONCE = 65_536


def hash_rows(column: pd.Series, *, n_rows: int = ROWS_AT_ONCE) -> Iterator[npt.NDArray[np.integer]]:
    """Hash each row to 64 bits, some rows at a time."""
    for start in range(0, len(column), n_rows):
        rows = column.iloc[start : start + n_rows]
        if pd.api.types.is_string_dtype(rows.dtype):
            # The same hashes; that of a pandas object would look for equal texts first.
            yield pd.util.hash_array(rows.to_numpy(object), categorize=False)
        else:
            yield pd.util.hash_pandas_object(rows, index=False).to_numpy()


class PathFinder:
    """Finds the rows of paths in a table, block by block, in a quarter of the memory of an index of all paths.

    Most tables have the same order, which takes no memory at all.

    >>> finder = PathFinder(pd.Series(["b", "a", "c"]))
    >>> finder.find(pd.Series(["b", "a"])), finder.find(pd.Series(["x", "b"]))
    (array([0, 1]), array([-1,  0]))
    """

    def __init__(self, paths: pd.Series) -> None:
        self._paths, self._n_found = paths, 0

    def find(self, block: pd.Series) -> npt.NDArray[np.int64]:
        """Find the rows of the next block of paths, int64; -1 for those that are not there."""
        start, self._n_found = self._n_found, self._n_found + len(block)
        if self._paths.iloc[start : start + len(block)].array.equals(block.array):
            return np.arange(start, start + len(block))
        if not len(self._paths):
            return np.full(len(block), -1)
        order, hashes = self._sorted
        wanted = np.concatenate(list(hash_rows(block)))
        rows = order[np.searchsorted(hashes, wanted).clip(max=len(order) - 1)].astype(np.int64)
        # Another path may have the same hash, though of ten million paths hardly ever one does.
        return np.where(np.asarray(self._paths.iloc[rows].array == block.array), rows, -1)

    @cached_property
    def _sorted(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.integer]]:
        """The rows of all paths in the order of their hashes, and these."""
        hashes = np.concatenate(list(hash_rows(self._paths)))
        order = np.argsort(hashes).astype(np.int32)
        return order, hashes[order]
