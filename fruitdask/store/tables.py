"""Tables, in Parquet, whose pages carry checksums."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd

from fruitdask.errors import DamageError
from fruitdask.storage import Location, describe_cause, explained, write_file
from fruitdask.store.manifests import advise_repair


def write_table(location: Location, table: pd.DataFrame) -> None:
    """
    Write a Parquet file.

    Parameters
    ----------
    location : Location
        The file.
    table : pandas.DataFrame
        The table; its index is left out.

    Raises
    ------
    StorageError
        If it cannot be written.
    """
    write_file(location, table.to_parquet(index=False, write_page_checksum=True))


def read_table(output: Location, *names: str) -> pd.DataFrame:
    """
    Read a Parquet file.

    Parameters
    ----------
    output : Location
        The output folder.
    *names : str
        Path components of the file below it.

    Returns
    -------
    pandas.DataFrame
        The table.

    Raises
    ------
    StorageError
        If it cannot be read.
    DamageError
        If it is damaged, or no table.
    """
    location = output.child(*names)
    with explained(location, "read"):
        data = location.fs.cat_file(location.path)
    with decoded(location, output):
        table: pd.DataFrame = decode_table(data).to_pandas()
    return table


def decode_table(data: bytes) -> Any:
    """
    Decode a Parquet file, comparing the checksums of pages that have one.

    Parameters
    ----------
    data : bytes
        The file.

    Returns
    -------
    pyarrow.Table
        The table.
    """
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(io.BytesIO(data), page_checksum_verification=True).read()


@contextmanager
def decoded(location: Location, output: Location) -> Iterator[None]:
    """
    Turn whatever a decoder raises about bytes that were read into one sentence.

    Parameters
    ----------
    location : Location
        The file that they are of.
    output : Location
        The output folder that it is in.

    Yields
    ------
    None
        Control, once.

    Raises
    ------
    DamageError
        If the block raises anything.
    """
    try:
        yield
    except Exception as error:
        # pyarrow raises OSError too, of which nothing can come from the storage here.
        raise DamageError(f"{location.url} is damaged ({describe_cause(error)}); {advise_repair(output)}") from error
