"""The catalog of a store: which image each of its rows is, and of which version of the file."""

import io

import pandas as pd

from fruitdask.storage import Location, exists, write_file
from fruitdask.store.names import CATALOG
from fruitdask.store.tables import read_table


def read_catalog(output: Location) -> pd.DataFrame | None:
    """Read the catalog of a store."""
    return read_table(output, CATALOG) if exists(output.child(CATALOG)) else None


def write_catalog(output: Location, catalog: pd.DataFrame) -> None:
    """Write the catalog of a store, all of it or none."""
    buffer = io.BytesIO()
    # Categories would keep the names of classes of which no image is left, and a dictionary of paths would hold each of them.
    words = [name for name in ("label", "split") if name in catalog]
    table = catalog.astype(dict.fromkeys(words, "str"))
    table.to_parquet(buffer, index=False, compression="zstd", use_dictionary=words, write_page_checksum=True)
    write_file(output.child(CATALOG), buffer.getvalue())
