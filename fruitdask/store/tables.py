"""Parquet tables whose pages carry checksums."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pandas as pd

from fruitdask.core.storage import Location, describe_cause, explained, open_new, write_file
from fruitdask.errors import DamageError, FruitdaskError
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
    """Decode a Parquet file, or some of its columns, and verify the checksums of its pages."""
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
    # Handing a small table to other threads takes longer than decoding it.
    return file.read(columns, use_threads=False)


@contextmanager
def stream_table(location: Location) -> Iterator[Callable[[pd.DataFrame], None]]:
    """Write a Parquet file block by block, each a row group of the same columns; all of it or none."""
    import pyarrow.parquet

    with ExitStack() as stack:
        file, writer = stack.enter_context(open_new(location)), None

        def write(block: pd.DataFrame) -> None:
            nonlocal writer
            table = pyarrow.Table.from_pandas(block, preserve_index=False)
            if writer is None:
                writer = pyarrow.parquet.ParquetWriter(file, table.schema, write_page_checksum=True)
            writer.write_table(table.cast(writer.schema))

        yield write
        if writer is not None:
            writer.close()


@contextmanager
def open_table(output: Location, *names: str) -> Iterator[Any]:
    """Open a Parquet file to read some of its row groups and columns."""
    import pyarrow.parquet

    location = output.child(*names)
    with explained(location, "read"):
        file = location.fs.open(location.path, "rb")
    with file, decoded(location, output):
        yield pyarrow.parquet.ParquetFile(_Explained(file, location), page_checksum_verification=True)


def read_blocks(output: Location, name: str, columns: Sequence[str] | None = None) -> Iterator[Any]:
    """Read a Parquet file as Arrow tables, a row group each."""
    with open_table(output, name) as file:
        for number in range(file.num_row_groups):
            yield file.read_row_group(number, columns=columns)


class _Explained(io.RawIOBase):
    """A file whose errors are those of its storage, not of a decoder."""

    def __init__(self, file: Any, location: Location) -> None:
        self._file, self._location = file, location

    def readable(self) -> bool:
        """Whether it can be read."""
        return True

    def seekable(self) -> bool:
        """Whether any part of it can be read."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a position."""
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        """Return the position."""
        return int(self._file.tell())

    def read(self, size: int = -1) -> bytes:
        """Read the next bytes."""
        with explained(self._location, "read"):
            return bytes(self._file.read(size))


@contextmanager
def decoded(location: Location, output: Location) -> Iterator[None]:
    """Turn any error of a decoder into one sentence."""
    try:
        yield
    except FruitdaskError:
        raise
    except Exception as error:
        # pyarrow raises OSError too; here it cannot come from the storage.
        raise DamageError(f"{location.url} is damaged ({describe_cause(error)}); {advise_repair(output)}") from error
