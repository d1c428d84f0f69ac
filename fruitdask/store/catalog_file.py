"""The file of a catalog in an output folder, read and written in blocks of rows."""

import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from fruitdask.core.listing import GROUPINGS
from fruitdask.core.storage import Location, exists, explained, open_new
from fruitdask.store.layout import CATALOG
from fruitdask.store.tables import decoded

#: Rows that are written, or read and compared, at once.
ROWS_IN_MEMORY = 262_144


def read_catalog(output: Location, columns: Sequence[str] | None = None) -> pd.DataFrame | None:
    """Read the catalog of a store, or some of its columns; classes, splits and groups are categories."""
    tables = list(_read_blocks(output, columns))
    if not tables:
        return None
    whole = pa.concat_tables(tables).unify_dictionaries()
    tables.clear()
    catalog: pd.DataFrame = whole.to_pandas(ignore_metadata=True, split_blocks=True, self_destruct=True)
    return catalog


def read_catalog_blocks(output: Location, among: npt.NDArray[np.bool_] | None = None) -> Iterator[pd.DataFrame]:
    """Read the catalog of a store, if it has one, or some of its rows, in blocks."""
    start = 0
    for table in _read_blocks(output):
        block = table.to_pandas(ignore_metadata=True, split_blocks=True)
        yield block if among is None else block[among[start : start + len(block)]]
        start += len(block)


def _read_blocks(output: Location, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Read the catalog of a store, if it has one, in blocks of rows."""
    import pyarrow.parquet

    location = output.child(CATALOG)
    if not exists(location):
        return
    with explained(location, "read"):
        source = location.path if location.is_local else io.BytesIO(location.fs.cat_file(location.path))
    with decoded(location, output):
        words = [name for name in pyarrow.parquet.read_schema(source).names if name in ("label", *GROUPINGS)]
        file = pyarrow.parquet.ParquetFile(
            source, page_checksum_verification=True, read_dictionary=words, pre_buffer=False
        )
        with file:
            if not file.metadata.num_rows:
                yield file.read(columns)
            for batch in file.iter_batches(ROWS_IN_MEMORY, columns=columns, use_threads=False):
                yield pa.Table.from_batches([batch])


def write_catalog(output: Location, catalog: pd.DataFrame) -> None:
    """Write the catalog of a store atomically."""
    starts = range(0, max(1, len(catalog)), ROWS_IN_MEMORY)
    write_catalog_blocks(output, (catalog.iloc[start : start + ROWS_IN_MEMORY] for start in starts))


def write_catalog_blocks(output: Location, blocks: Iterable[pd.DataFrame]) -> None:
    """Write the catalog of a store atomically, from one or more blocks of rows."""
    import pyarrow.parquet

    texts = map(_write_words, blocks)
    first = next(texts)
    words = [name for name in ("label", *GROUPINGS) if name in first.column_names]
    options = {"compression": "zstd", "use_dictionary": words, "write_page_checksum": True}
    with open_new(output.child(CATALOG)) as file, pyarrow.parquet.ParquetWriter(
        file, first.schema, **options
    ) as writer:
        for table in chain([first], texts):
            writer.write_table(table)


def _write_words(block: pd.DataFrame) -> pa.Table:
    """Return a block with words as texts: categories would keep the names of classes of which no image is left."""
    words = [name for name in ("label", *GROUPINGS) if name in block]
    return pa.Table.from_pandas(block.astype(dict.fromkeys(words, "str")), preserve_index=False)
