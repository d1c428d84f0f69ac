"""Outcomes: one Parquet file per partition, which is its commit mark."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fruitdask.core.storage import Location, explained
from fruitdask.store.layout import OUTCOME_COLUMNS, PARTITIONS, VERSION_COLUMNS, name_outcomes
from fruitdask.store.tables import decode_table, decoded

_COMMIT_MARK = re.compile(r"(\d{5,})\.parquet")
#: Partitions that are read at once, unless these have more images.
_PARTITIONS_AT_ONCE, _IMAGES_AT_ONCE = 256, 131_072


def list_committed(output: Location) -> set[int]:
    """List the committed partitions."""
    return list_marks(output.child(PARTITIONS))


def list_marks(folder: Location) -> set[int]:
    """List the partitions whose commit marks are in a folder."""
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
    """Read outcome rows in the order of the store."""
    import pyarrow

    for first in range(0, len(indices), partitions_at_once):
        chosen = indices[first : first + partitions_at_once]
        yield pyarrow.concat_tables(_read_files(output, chosen, columns)).to_pandas()


def read_rows(
    output: Location, indices: Sequence[int], *, images_per_partition: int, columns: Sequence[str]
) -> Iterator[pd.DataFrame]:
    """Read outcome rows, indexed by their rows of the store; a partition that was once the last may be shorter."""
    import pyarrow

    partitions_at_once = count_at_once(images_per_partition)
    for first in range(0, len(indices), partitions_at_once):
        chosen = indices[first : first + partitions_at_once]
        tables = _read_files(output, chosen, columns)
        rows = [
            index * images_per_partition + np.arange(len(table)) for index, table in zip(chosen, tables, strict=True)
        ]
        yield pyarrow.concat_tables(tables).to_pandas().set_axis(np.concatenate(rows))


def count_at_once(images_per_partition: int) -> int:
    """Count the partitions whose outcomes are held in memory at once.

    >>> [count_at_once(n) for n in (32, 512, 4096, 1_000_000)]
    [256, 256, 32, 1]
    """
    return max(1, min(_PARTITIONS_AT_ONCE, _IMAGES_AT_ONCE // images_per_partition))


def _read_files(output: Location, indices: Sequence[int], columns: Sequence[str]) -> list[Any]:
    """Read outcome files concurrently."""
    folder = output.child(PARTITIONS)
    files = [output.child(name_outcomes(index)) for index in indices]
    with explained(folder, "read"):
        contents = folder.fs.cat_ranges([file.path for file in files], None, None, on_error="raise")
    return [_decode_outcomes(file, data, output, columns) for file, data in zip(files, contents, strict=True)]


def _decode_outcomes(file: Location, data: bytes, output: Location, columns: Sequence[str]) -> Any:
    """Decode an outcome file; its columns are known, so the metadata of pandas is dropped."""
    with decoded(file, output):
        table = decode_table(data)
        if tuple(table.column_names) not in (OUTCOME_COLUMNS, OUTCOME_COLUMNS + VERSION_COLUMNS):
            raise ValueError(f"its columns are {', '.join(table.column_names)}")
        return table.select(list(columns)).replace_schema_metadata(None)
