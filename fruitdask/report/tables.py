"""Tables of a run, as files for people and programs."""

import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask.storage import Location, exists, explained, write_file
from fruitdask.store import OUTCOME_COLUMNS, advise_repair, delete_result, read_table, write_table

RESULTS = "results.parquet"
#: A spreadsheet holds no more rows than about a million (Excel: 1,048,576).
_MAX_CSV_ROWS = 1_000_000


@dataclass
class Counts:
    """
    Images by status and by class.

    Parameters
    ----------
    by_status : Counter[str]
        Images of each status.
    ok_by_class : Counter[str]
        Images with features, of each class.
    failed_by_class : Counter[str]
        Images without, of each class.
    """

    by_status: Counter[str] = field(default_factory=Counter)
    ok_by_class: Counter[str] = field(default_factory=Counter)
    failed_by_class: Counter[str] = field(default_factory=Counter)

    @property
    def n_failed(self) -> int:
        """Images without features."""
        return self.failed_by_class.total()

    def add(self, outcomes: pd.DataFrame) -> None:
        """
        Count outcomes.

        Parameters
        ----------
        outcomes : pandas.DataFrame
            Rows with ``label`` and ``status``.
        """
        is_ok = outcomes["status"] == "ok"
        self.by_status.update(outcomes["status"])
        self.ok_by_class.update(outcomes.loc[is_ok, "label"])
        self.failed_by_class.update(outcomes.loc[~is_ok, "label"])

    def by_class(self) -> dict[str, dict[str, int]]:
        """
        List the classes.

        Returns
        -------
        dict[str, dict[str, int]]
            For each class, in alphabetical order, its images ``ok`` and ``failed``.
        """
        labels = sorted({*self.ok_by_class, *self.failed_by_class})
        return {label: {"ok": self.ok_by_class[label], "failed": self.failed_by_class[label]} for label in labels}


def write_results(
    output: Location,
    outcomes: Iterable[pd.DataFrame],
    *,
    pca: npt.NDArray[np.floating],
    tsne: npt.NDArray[np.floating] | None,
) -> Counts:
    """
    Write the table of all images, and the table of those that failed.

    Parameters
    ----------
    output : Location
        The output folder; tables of an earlier run in it are replaced.
    outcomes : Iterable[pandas.DataFrame]
        Outcomes in the order of the catalog, piece by piece; a piece at a time is in memory.
    pca : numpy.ndarray
        Scores of all images, shape (n, k); NaN where an image failed.
    tsne : numpy.ndarray or None
        Coordinates of all images, shape (n, 2); NaN where there are none.

    Returns
    -------
    Counts
        Images by status and class.

    Raises
    ------
    StorageError
        If a table cannot be written.
    """
    for name in (RESULTS, "results.csv", "failures.csv"):
        delete_result(output, name)
    counts, failures, csv, start = Counts(), [], io.StringIO(), 0
    for number, piece in enumerate(outcomes):
        rows = slice(start, start + len(piece))
        table = _add_columns(
            piece[["path", "label", "status"]], pca=pca[rows], tsne=None if tsne is None else tsne[rows]
        )
        write_table(output.child(RESULTS, f"part-{number:05d}.parquet"), table)
        if len(pca) <= _MAX_CSV_ROWS:
            table.to_csv(csv, index=False, header=start == 0, lineterminator="\n")
        failures.append(piece[piece["status"] != "ok"])
        counts.add(piece)
        start = rows.stop
    if csv.tell():
        write_file(output.child("results.csv"), csv.getvalue().encode())
    if counts.n_failed:
        write_failures(output, pd.concat(failures))
    return counts


def write_failures(output: Location, outcomes: pd.DataFrame) -> None:
    """
    Write the table of the images that failed.

    Parameters
    ----------
    output : Location
        The output folder.
    outcomes : pandas.DataFrame
        Their outcomes.

    Raises
    ------
    StorageError
        If it cannot be written.
    """
    write_file(output.child("failures.csv"), outcomes.to_csv(index=False, lineterminator="\n").encode())


def read_failures(output: Location) -> pd.DataFrame:
    """
    Read the table of the images that failed.

    Parameters
    ----------
    output : Location
        The output folder.

    Returns
    -------
    pandas.DataFrame
        Their outcomes: ``path``, ``label``, ``status``, ``error``, ``attempts``; no row where nothing failed.

    Raises
    ------
    StorageError
        If it cannot be read.
    """
    location = output.child("failures.csv")
    if not exists(location):
        return pd.DataFrame(columns=list(OUTCOME_COLUMNS))
    with explained(location, "read", remedy=advise_repair(output)):
        data = location.fs.cat_file(location.path)
        return pd.read_csv(io.BytesIO(data), keep_default_na=False, dtype=dict.fromkeys(OUTCOME_COLUMNS[:-1], str))


def read_results(output: Location) -> pd.DataFrame:
    """
    Read the table of all images.

    Parameters
    ----------
    output : Location
        The output folder of a finished run.

    Returns
    -------
    pandas.DataFrame
        ``path``, ``label``, ``status``, ``pca_1`` ... and where it was asked for ``tsne_1``, ``tsne_2``, in the order of the catalog.

    Raises
    ------
    StorageError
        If it cannot be read.
    """
    return pd.concat([read_table(output, RESULTS, name) for name in list_parts(output)], ignore_index=True)


def list_parts(output: Location) -> list[str]:
    """
    List the files of the table of all images.

    Parameters
    ----------
    output : Location
        The output folder of a finished run.

    Returns
    -------
    list[str]
        Their names in order.

    Raises
    ------
    StorageError
        If the folder cannot be listed.
    """
    folder = output.child(RESULTS)
    with explained(folder, "list"):
        folder.fs.invalidate_cache()
        return sorted(path.rsplit("/", 1)[-1] for path in folder.fs.find(folder.path) if path.endswith(".parquet"))


def _add_columns(
    table: pd.DataFrame, *, pca: npt.NDArray[np.floating], tsne: npt.NDArray[np.floating] | None
) -> pd.DataFrame:
    """Lay scores and coordinates beside the outcomes as pca_1, pca_2 ... tsne_1, tsne_2."""
    columns = {f"pca_{number}": column for number, column in enumerate(pca.T.astype(np.float32), start=1)}
    if tsne is not None:
        columns |= {f"tsne_{number}": column for number, column in enumerate(tsne.T.astype(np.float32), start=1)}
    return pd.concat([table.reset_index(drop=True), pd.DataFrame(columns)], axis=1)
