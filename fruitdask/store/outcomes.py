"""Outcomes: one Parquet file a partition, which is its commit mark."""

import io
import re
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from fruitdask.errors import StorageError
from fruitdask.storage import Location, explained
from fruitdask.store.names import PARTITIONS

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
    """
    import pyarrow.dataset

    folder = output.child(PARTITIONS)
    for first in range(0, len(indices), partitions_at_once):
        paths = [f"{folder.path}/{index:05d}.parquet" for index in indices[first : first + partitions_at_once]]
        with explained(folder, "read"):
            try:
                table = pyarrow.dataset.dataset(paths, filesystem=folder.fs, format="parquet").to_table()
            except pyarrow.ArrowInvalid as error:
                cause = " ".join(str(error).split())
                raise StorageError(
                    f"{folder.url}: an outcome file is damaged; delete it and run again ({cause})"
                ) from error
        yield table.to_pandas()


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
