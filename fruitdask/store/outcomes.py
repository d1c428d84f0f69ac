"""Outcomes: one Parquet file a partition, which is its commit mark."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fruitdask.storage import Location, explained
from fruitdask.store.names import OUTCOME_COLUMNS, PARTITIONS
from fruitdask.store.tables import decode_table, decoded

_COMMIT_MARK = re.compile(r"(\d{5,})\.parquet")


def list_committed(output: Location) -> set[int]:
    """
    List the partitions that are done.

    Parameters
    ----------
    output : Location
        The output folder.

    Returns
    -------
    set[int]
        Indices of partitions with a commit mark.

    Raises
    ------
    StorageError
        If the folder cannot be listed.
    """
    folder = output.child(PARTITIONS)
    with explained(folder, "list"):
        folder.fs.invalidate_cache()
        names = [path.rsplit("/", 1)[-1] for path in folder.fs.find(folder.path)]
    return {int(match[1]) for name in names if (match := _COMMIT_MARK.fullmatch(name))}


def list_unreachable(output: Location, indices: Sequence[int], *, images_per_partition: int) -> set[int]:
    """
    List the partitions of which some images could not be read, though they were there.

    Parameters
    ----------
    output : Location
        The output folder.
    indices : Sequence[int]
        Partitions to look at, ascending; they have commit marks.
    images_per_partition : int
        Images of each but the last partition of the run.

    Returns
    -------
    set[int]
        Indices of partitions.

    Raises
    ------
    StorageError
        If the outcomes cannot be read.
    """
    is_lost = [table["status"].to_numpy() == "unreachable" for table in read_outcomes(output, indices)]
    rows = np.flatnonzero(np.concatenate([np.empty(0, bool), *is_lost]))
    return {indices[place] for place in (rows // images_per_partition).tolist()}


def read_outcomes(output: Location, indices: Sequence[int], *, partitions_at_once: int = 256) -> Iterator[pd.DataFrame]:
    """
    Read outcome rows in the order of the catalog.

    Parameters
    ----------
    output : Location
        The output folder.
    indices : Sequence[int]
        Partitions to read, ascending.
    partitions_at_once : int
        How many outcome files make one table: memory grows with it, the number of tables shrinks.

    Yields
    ------
    pandas.DataFrame
        Outcomes of the next partitions.

    Raises
    ------
    StorageError
        If a file cannot be read.
    DamageError
        If one is damaged.
    """
    import pyarrow

    folder = output.child(PARTITIONS)
    for first in range(0, len(indices), partitions_at_once):
        files = [folder.child(f"{index:05d}.parquet") for index in indices[first : first + partitions_at_once]]
        with explained(folder, "read"):
            contents = folder.fs.cat_ranges([file.path for file in files], None, None, on_error="raise")
        tables = [_decode_outcomes(file, data, output) for file, data in zip(files, contents, strict=True)]
        yield pyarrow.concat_tables(tables).to_pandas()


def _decode_outcomes(file: Location, data: bytes, output: Location) -> Any:
    """Decode an outcome file; its columns are known, so that what pandas says about them is not needed."""
    with decoded(file, output):
        table = decode_table(data)
        if tuple(table.column_names) != OUTCOME_COLUMNS:
            raise ValueError(f"its columns are {', '.join(table.column_names)}")
        return table.replace_schema_metadata(None)
