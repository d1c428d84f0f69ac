"""Tables of a run, as Parquet and CSV."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask.core.escaping import format_csv, read_csv
from fruitdask.core.storage import Location, exists, explained
from fruitdask.errors import DamageError
from fruitdask.store import (
    FAILURES,
    OUTCOME_COLUMNS,
    RESULTS,
    RESULTS_CSV,
    advise_repair,
    delete_result,
    open_digested,
    read_run,
    read_table,
    write_table,
)

#: A spreadsheet holds no more rows than about a million (Excel: 1,048,576).
_MAX_CSV_ROWS = 1_000_000


@dataclass
class Counts:
    """Images by status and by class."""

    by_status: Counter[str] = field(default_factory=Counter)
    ok_by_class: Counter[str] = field(default_factory=Counter)
    failed_by_class: Counter[str] = field(default_factory=Counter)

    @property
    def n_images(self) -> int:
        """All images."""
        return self.ok_by_class.total() + self.n_failed

    @property
    def n_failed(self) -> int:
        """Images without features."""
        return self.failed_by_class.total()

    def add(self, outcomes: pd.DataFrame) -> None:
        """Count outcomes."""
        is_ok, labels = outcomes["status"] == "ok", outcomes["label"]
        counters = (self.by_status, self.ok_by_class, self.failed_by_class)
        for counter, column in zip(counters, (outcomes["status"], labels[is_ok], labels[~is_ok]), strict=True):
            counter.update({str(word): int(n) for word, n in column.value_counts().items()})

    def by_class(self) -> dict[str, dict[str, int]]:
        """List the classes."""
        labels = sorted({*self.ok_by_class, *self.failed_by_class})
        return {label: {"ok": self.ok_by_class[label], "failed": self.failed_by_class[label]} for label in labels}


class Rows(Protocol):
    """Numbers of all images, computed for the rows that are requested."""

    def __len__(self) -> int:
        """Return the number of images."""

    def __getitem__(self, rows: slice, /) -> npt.NDArray[np.floating]:
        """Return some rows, shape (n, k)."""


def write_results(
    output: Location,
    outcomes: Iterable[pd.DataFrame],
    *,
    pca: Rows,
    tsne: npt.NDArray[np.floating] | None,
    groupings: Mapping[str, pd.Series] = MappingProxyType({}),
) -> tuple[Counts, dict[str, str]]:
    """Write the table of all images and the table of failures; return the counts, and the digests of CSV files.

    `pca` are the scores of all images, and `tsne` their coordinates, shape (n, 2); NaN without features. `groupings`
    are their splits and groups.
    """
    for name in (RESULTS, RESULTS_CSV, FAILURES):
        delete_result(output, name)
    counts, failures, digests, start = Counts(), list[pd.DataFrame](), dict[str, str](), 0
    with ExitStack() as stack:
        has_csv = len(pca) <= _MAX_CSV_ROWS
        write_csv = stack.enter_context(open_digested(output, RESULTS_CSV, digests)) if has_csv else None
        for number, piece in enumerate(outcomes):
            rows = slice(start, start + len(piece))
            table = piece[["path", "label", "status"]]
            table = table.assign(**{name: words.iloc[rows].astype("str").array for name, words in groupings.items()})
            table = _add_columns(table, pca=pca[rows], tsne=None if tsne is None else tsne[rows])
            write_table(output.child(RESULTS, f"part-{number:05d}.parquet"), table)
            if write_csv is not None:
                write_csv(format_csv(table, with_header=start == 0).encode())
            failures.append(piece[piece["status"] != "ok"])
            counts.add(piece)
            start = rows.stop
    if counts.n_failed:
        digests |= write_failures(output, failures)
    return counts, digests


def write_failures(output: Location, tables: Iterable[pd.DataFrame]) -> dict[str, str]:
    """Write the table of failures from its pieces; return its digest."""
    digests = dict[str, str]()
    with open_digested(output, FAILURES, digests) as write:
        for number, table in enumerate(tables):
            write(format_csv(table, with_header=number == 0).encode())
    return digests


def read_failures(output: Location) -> pd.DataFrame:
    """Read the table of failures."""
    location = output.child(FAILURES)
    if not exists(location):
        return pd.DataFrame(columns=list(OUTCOME_COLUMNS))
    with explained(location, "read", remedy=advise_repair(output)):
        data = location.fs.cat_file(location.path)
        return read_csv(data, dict.fromkeys(OUTCOME_COLUMNS[:-1], str))


def read_results(output: Location) -> pd.DataFrame:
    """Read the table of all images."""
    return pd.concat(read_parts(output), ignore_index=True)


def read_parts(output: Location) -> Iterator[pd.DataFrame]:
    """Read the table of all images part by part, and check at the end that none is missing."""
    manifest, n_images = read_run(output), 0
    for name in list_parts(output):
        part = read_table(output, RESULTS, name)
        n_images += len(part)
        yield part
    n_expected = manifest.n_images if manifest is not None and manifest.is_complete else max(1, n_images)
    if n_images != n_expected:
        raise DamageError(
            f"{output.child(RESULTS).url} is damaged (expected {n_expected:,} images, found {n_images:,}); "
            f"{advise_repair(output)}"
        )


def list_parts(output: Location) -> list[str]:
    """List the files of the table of all images."""
    folder = output.child(RESULTS)
    with explained(folder, "list"):
        folder.fs.invalidate_cache()
        return sorted(path.rsplit("/", 1)[-1] for path in folder.fs.find(folder.path) if path.endswith(".parquet"))


def compare_rows(
    rows: pd.DataFrame, outcomes: pd.DataFrame, scores: npt.NDArray[np.floating] | None, *, tolerance: float
) -> Iterator[str]:
    """Describe how rows of the table of all images differ from their outcomes and features.

    `scores` are the coordinates of these images along the components, shape (n, k); None if they are not known.
    """
    names = ["path", "label", "status"]
    if len(rows) != len(outcomes) or list(rows.columns[:3]) != names:
        yield f"expected rows of {len(outcomes):,} images with the columns path, label, status, found others"
        return
    for name in names:
        if not np.array_equal(rows[name].astype(object), outcomes[name].astype(object)):
            yield f"its {name} differs from the outcomes"
    if scores is None:
        return
    found = rows.filter(regex=r"^pca_\d+$").to_numpy(np.float64)
    expected = np.where((outcomes["status"] == "ok").to_numpy()[:, np.newaxis], scores, np.nan)
    if not (found.shape == expected.shape and np.allclose(found, expected, rtol=0, atol=tolerance, equal_nan=True)):
        yield "pca_1, pca_2 ... disagree with the features"


def _add_columns(
    table: pd.DataFrame, *, pca: npt.NDArray[np.floating], tsne: npt.NDArray[np.floating] | None
) -> pd.DataFrame:
    """Append scores and coordinates as columns pca_1, pca_2 ... tsne_1, tsne_2."""
    columns = {f"pca_{number}": column for number, column in enumerate(pca.T.astype(np.float32), start=1)}
    if tsne is not None:
        columns |= {f"tsne_{number}": column for number, column in enumerate(tsne.T.astype(np.float32), start=1)}
    return pd.concat([table.reset_index(drop=True), pd.DataFrame(columns)], axis=1)
