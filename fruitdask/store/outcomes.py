"""Outcomes: one Parquet file a partition, which is its commit mark."""

import io
import re
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from fruitdask.errors import StorageError
from fruitdask.storage import Location, explained
from fruitdask.store.names import OUTCOME_COLUMNS, PARTITIONS

_COMMIT_MARK = re.compile(r"(\d{5,})\.parquet")
_PARTITIONS_AT_ONCE = 256


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


def read_outcomes(
    output: Location,
    indices: Sequence[int],
    *,
    columns: Sequence[str] = OUTCOME_COLUMNS,
    partitions_at_once: int = _PARTITIONS_AT_ONCE,
) -> Iterator[pd.DataFrame]:
    """
    Read outcome rows in the order of the store.

    Parameters
    ----------
    output : Location
        The output folder.
    indices : Sequence[int]
        Partitions to read, ascending.
    columns : Sequence[str]
        What to read of each row.
    partitions_at_once : int
        How many outcome files make one table: memory grows with it, the number of tables shrinks.

    Yields
    ------
    pandas.DataFrame
        Outcomes of the next partitions.
    """
    for first in range(0, len(indices), partitions_at_once):
        yield _read_dataset(output, indices[first : first + partitions_at_once], columns)


def read_rows(
    output: Location, indices: Sequence[int], *, images_per_partition: int, columns: Sequence[str]
) -> Iterator[pd.DataFrame]:
    """
    Read outcome rows with the rows of the store that they belong to: a partition that was the last one may hold fewer than others.

    Parameters
    ----------
    output : Location
        The output folder.
    indices : Sequence[int]
        Partitions to read, ascending.
    images_per_partition : int
        Rows a partition.
    columns : Sequence[str]
        What to read of each row.

    Yields
    ------
    pandas.DataFrame
        Outcomes of the next partitions; the index is the row in the store.
    """
    for first in range(0, len(indices), _PARTITIONS_AT_ONCE):
        table = _read_dataset(output, indices[first : first + _PARTITIONS_AT_ONCE], (*columns, "__filename"))
        names = table.pop("__filename")
        starts = names.str.extract(r"(\d+)\.parquet$", expand=False).astype(np.int64) * images_per_partition
        yield table.set_axis(starts + table.groupby(names, sort=False).cumcount())


def _read_dataset(output: Location, indices: Sequence[int], columns: Sequence[str]) -> pd.DataFrame:
    """Read the outcome files of some partitions at once."""
    import pyarrow.dataset

    folder = output.child(PARTITIONS)
    paths = [f"{folder.path}/{index:05d}.parquet" for index in indices]
    with explained(folder, "read"):
        try:
            dataset = pyarrow.dataset.dataset(paths, filesystem=folder.fs, format="parquet")
            found: pd.DataFrame = dataset.to_table(columns=list(columns)).to_pandas()
        except pyarrow.ArrowInvalid as error:
            cause = " ".join(str(error).split())
            raise StorageError(
                f"{folder.url}: an outcome file is damaged; delete it and run again ({cause})"
            ) from error
    return found


def read_table(location: Location) -> pd.DataFrame:
    """
    Read a Parquet file.

    Parameters
    ----------
    location : Location
        The file.

    Returns
    -------
    pandas.DataFrame
        The table.

    Raises
    ------
    StorageError
        If it cannot be read, or is no table.
    """
    with explained(location, "read"):
        data = location.fs.cat_file(location.path)
    try:
        return pd.read_parquet(io.BytesIO(data))
    except (ValueError, OSError) as error:
        raise StorageError(f"{location.url}: the table is damaged; delete it and run again ({error})") from error
