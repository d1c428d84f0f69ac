"""Parquet tables whose pages carry checksums."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd

from fruitdask.core.storage import Location, describe_cause, explained, write_file
from fruitdask.errors import DamageError
from fruitdask.store.manifests import advise_repair


def write_table(location: Location, table: pd.DataFrame) -> None:
    """Write a Parquet file."""
    write_file(location, table.to_parquet(index=False, write_page_checksum=True))


def read_table(output: Location, *names: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Read a Parquet file, or some of its columns."""
    location = output.child(*names)
    with explained(location, "read"):
        data = location.fs.cat_file(location.path)
    with decoded(location, output):
        table: pd.DataFrame = decode_table(data, columns).to_pandas()
    return table


def decode_table(data: bytes, columns: Sequence[str] | None = None) -> Any:
    """Decode a Parquet file and verify the checksums of its pages."""
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
    # Handing a small table to other threads takes longer than decoding it.
    return file.read(columns, use_threads=False)


@contextmanager
def decoded(location: Location, output: Location) -> Iterator[None]:
    """Turn any error of a decoder into one sentence."""
    try:
        yield
    except Exception as error:
        # pyarrow raises OSError too; here it cannot come from the storage.
        raise DamageError(f"{location.url} is damaged ({describe_cause(error)}); {advise_repair(output)}") from error
