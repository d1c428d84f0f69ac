"""Compares the results of a run with those that a Spark job left as Parquet."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask import report, store
from fruitdask.analysis.comparison import (
    AMBIGUOUS,
    UNMATCHED,
    align_scores,
    compare_vectors,
    judge_features,
    judge_scores,
    match_paths,
)
from fruitdask.core.escaping import format_csv
from fruitdask.core.spark import SparkFolder, open_spark
from fruitdask.core.storage import Location, hide_secrets, write_file
from fruitdask.errors import CatalogError, StorageError
from fruitdask.pipeline.open import open as open_result
from fruitdask.pipeline.results import RunResult, open_features, read_images

#: Bytes of features that are in memory at once.
_BLOCK_BYTES = 64 * 1024**2
#: Components whose scores are compared: those of all images are in memory.
_MAX_COMPONENTS = 10


@dataclass(frozen=True, eq=False)
class Comparison:
    """
    How the results of a run agree with those of a Spark job.

    Parameters
    ----------
    table : pandas.DataFrame
        All images of the run, then those that only Spark has: ``path``, ``spark_path``, ``status``, ``cosine``,
        ``relative_error``, ``score_error``. Statuses: ``compared``; ``failed``, without features in the run;
        ``empty``, null, zeros, NaN or of another width in Spark; ``matched``, where features were not compared;
        ``only_run``; ``only_spark``; ``ambiguous``.
    components : pandas.DataFrame
        Of each of the first components ``sign``, ``offset`` (Spark minus run), ``expected_offset`` (the mean of the
        features times the component, which Spark does not subtract), ``correlation``, ``relative_error``.
    counts : Mapping[str, int]
        Images by status, and Spark's rows that repeat a path (``duplicate``).
    n_features : int
        Features per image in the run.
    n_spark_features : int
        Features per image in Spark; 0 if there are none.
    agrees : bool
        Whether something could be compared, and all of it agrees.
    verdict : str
        The verdict in one sentence, with likely causes of differences.
    """

    table: pd.DataFrame = field(repr=False)
    components: pd.DataFrame = field(repr=False)
    counts: Mapping[str, int]
    n_features: int
    n_spark_features: int
    agrees: bool
    verdict: str


def compare(
    results: "str | RunResult",
    parquet: str,
    *,
    path_column: str | None = None,
    features_column: str | None = None,
    scores_column: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    parquet_options: Mapping[str, Any] | None = None,
) -> Comparison:
    """
    Compare the features and scores of a finished run with those that a Spark job left as Parquet.

    Parameters
    ----------
    results : str or RunResult
        The finished run, or the folder or URL of its results.
    parquet : str
        Folder, file or URL that Spark wrote, with a column of paths and one of features or scores: arrays of numbers or
        vectors of Spark ML, dense or sparse.
    path_column : str, optional
        Column of paths; by default the first of the usual names, such as ``path``.
    features_column : str, optional
        Column of features; by default the first of the usual names, such as ``features``.
    scores_column : str, optional
        Column of scores of Spark's PCA; by default the first of the usual names, such as ``pcaFeatures``.
    storage_options : Mapping[str, Any], optional
        Options of the fsspec file system of ``results``.
    parquet_options : Mapping[str, Any], optional
        Options of the fsspec file system of ``parquet``.

    Returns
    -------
    Comparison
        A table of all images, how far components agree, counts and a verdict.

    Raises
    ------
    CatalogError
        If the folder holds no Parquet files or no rows.
    ConfigError
        If a column is missing or holds something else.
    DamageError
        If a file is damaged.
    FruitdaskError
        If something else is wrong; see the subclasses in `fruitdask.errors`.

    Notes
    -----
    Paths match by their longest common ending that is unique, whatever their prefix. Features of matched images go
    through a temporary file of 4 bytes per number, in the folder for temporary files (``TMPDIR``), because Spark's
    rows have another order. Scores of up to 10 components are compared after their signs and the constant offset of
    Spark's PCA are removed. Of rows with the same path, the first counts.
    """
    result = results if isinstance(results, RunResult) else open_result(str(results), storage_options)
    folder = open_spark(
        Location(str(parquet).rstrip("/") or "/", parquet_options or {}),
        path_column=path_column,
        features_column=features_column,
        scores_column=scores_column,
    )
    pairs = _match(result, folder)
    features = _compare_features(result, folder, pairs)
    components = _compare_scores(result, folder, pairs)
    return _conclude(pairs, features, components)


def write_comparison(location: Location, found: Comparison) -> None:
    """Write the table of all images as CSV or Parquet, by the name of the file."""
    if location.url.lower().endswith(".csv"):
        write_file(location, format_csv(found.table).encode())
    else:
        store.write_table(location, found.table)


@dataclass(frozen=True, eq=False)
class _Pairs:
    """The rows of Spark matched with the images of the run."""

    #: Path and status of all images of the run, spark_path where there is one; then rows that only Spark has.
    table: pd.DataFrame
    #: The place of each row of Spark among the matched images, int64; -1 for unmatched rows.
    places: npt.NDArray[np.int64]
    #: Rows of the run of the matched images, ascending.
    rows: npt.NDArray[np.int64]
    n_duplicates: int


def _match(result: RunResult, folder: SparkFolder) -> _Pairs:
    """Match the rows of Spark with the images of the run."""
    images = read_images(result.output)[["path", "status"]]
    given = pd.Series(folder.read_paths(), dtype=object)
    if given.empty:
        raise CatalogError(f"{folder.location.url}: expected rows, found Parquet files without any; run the job again")
    is_first = (given.notna() & ~given.duplicated()).to_numpy()
    theirs = given[is_first].tolist()
    matches = match_paths(images["path"].tolist(), theirs, root=result.manifest["config"]["input"]["url"])
    of_row = np.full(len(given), UNMATCHED)
    of_row[is_first] = matches
    rows = np.unique(matches[matches >= 0])
    places = np.where(of_row >= 0, np.searchsorted(rows, of_row), -1)
    spark_paths = np.full(len(images), "", object)
    spark_paths[of_row[of_row >= 0]] = given[of_row >= 0].to_numpy()
    has_features, is_matched = (images["status"] == "ok").to_numpy(), spark_paths != ""
    status = np.where(is_matched, np.where(has_features, "matched", "failed"), "only_run").astype(object)
    kept = pd.DataFrame({"path": images["path"], "spark_path": spark_paths, "status": status})
    is_left = (of_row < 0) & (is_first | given.isna().to_numpy())
    left = np.where(of_row[is_left] == AMBIGUOUS, "ambiguous", "only_spark")
    others = pd.DataFrame({"path": "", "spark_path": given[is_left].fillna("").to_numpy(), "status": left})
    table = pd.concat([kept, others], ignore_index=True).astype("str")
    numbers = dict.fromkeys(("cosine", "relative_error", "score_error"), np.nan)
    return _Pairs(table.assign(**numbers), places, rows, int((given.notna() & ~is_first).sum()))


def _compare_features(result: RunResult, folder: SparkFolder, pairs: _Pairs) -> tuple[int, int]:
    """Compare features and write the differences into the table; returns the widths of our features and Spark's."""
    features, is_ok = open_features(result.output, block_bytes=_BLOCK_BYTES)
    width = int(features.shape[1])
    their_width = folder.find_width(folder.feature_column) if folder.feature_column else 0
    if width != their_width or not len(pairs.rows):
        return width, their_width
    status, cosines, errors = (pairs.table[name].to_numpy(copy=True) for name in ("status", "cosine", "relative_error"))
    with tempfile.TemporaryFile() as file:
        theirs = _sort_vectors(folder, pairs, width, file)
        stops = np.cumsum(features.chunks[0])
        for start, stop in zip([0, *stops[:-1]], stops, strict=True):
            first, last = np.searchsorted(pairs.rows, [start, stop])
            rows, found = pairs.rows[first:last], np.asarray(theirs[first:last])
            rows, found = rows[is_ok[rows]], found[is_ok[rows]]
            if not len(rows):
                continue
            ours = features[start:stop].compute(scheduler="threads")[rows - start]
            cosines[rows], errors[rows] = compare_vectors(ours, found)
            is_empty = ~found.any(axis=1) & ours.any(axis=1) | ~np.isfinite(cosines[rows])
            cosines[rows[is_empty]] = errors[rows[is_empty]] = np.nan
            status[rows] = np.where(is_empty, "empty", "compared")
        del theirs
    pairs.table["status"], pairs.table["cosine"], pairs.table["relative_error"] = status, cosines, errors
    return width, their_width


def _sort_vectors(folder: SparkFolder, pairs: _Pairs, width: int, file: Any) -> npt.NDArray[np.float32]:
    """Write the vectors of matched images in the order of the run to a file; returns it as an array (n, width)."""
    n_bytes = len(pairs.rows) * width * np.dtype(np.float32).itemsize
    free = shutil.disk_usage(tempfile.gettempdir()).free
    # A mapped file that does not fit ends the process without a message.
    if n_bytes > free:
        raise StorageError(
            f"{tempfile.gettempdir()}: expected {n_bytes:,} free bytes for a temporary file, found {free:,}; set "
            "TMPDIR to a folder with more"
        )
    kept = np.memmap(file, np.float32, "w+", shape=(len(pairs.rows), width))
    start = 0
    n_at_once = max(1, _BLOCK_BYTES // (width * np.dtype(np.float64).itemsize))
    for block in folder.read_vectors(str(folder.feature_column), width, n_at_once):
        places = pairs.places[start : start + len(block)]
        with np.errstate(over="ignore"):
            kept[places[places >= 0]] = block[places >= 0]
        start += len(block)
    return kept


def _compare_scores(result: RunResult, folder: SparkFolder, pairs: _Pairs) -> pd.DataFrame:
    """Compare the scores of the first components; returns a row per component."""
    pca, column = result.pca, folder.score_column
    width = folder.find_width(column) if column else 0
    n_components = 0 if pca is None else min(len(pca.components_), width, _MAX_COMPONENTS)
    if column is None or pca is None or not n_components:
        return pd.DataFrame()
    theirs, start = np.full((len(pairs.rows), n_components), np.nan), 0
    for block in folder.read_vectors(column, width, max(1, _BLOCK_BYTES // (8 * width))):
        places = pairs.places[start : start + len(block)]
        theirs[places[places >= 0]] = block[places >= 0, :n_components]
        start += len(block)
    ours = _read_scores(result.output, n_components)[pairs.rows]
    is_kept = np.isfinite(ours).all(axis=1) & np.isfinite(theirs).all(axis=1) & theirs.any(axis=1)
    is_kept &= pairs.table["status"].iloc[pairs.rows].isin(["compared", "matched"]).to_numpy()
    if is_kept.sum() <= 1:
        return pd.DataFrame()
    aligned = align_scores(ours[is_kept], theirs[is_kept])
    pairs.table.loc[pairs.rows[is_kept], "score_error"] = aligned.image_errors
    return pd.DataFrame(
        {
            "component": np.arange(1, n_components + 1),
            "sign": aligned.signs.astype(int),
            "offset": aligned.offsets,
            "expected_offset": aligned.signs * (pca.components_[:n_components] @ pca.mean_),
            "correlation": aligned.correlations,
            "relative_error": aligned.errors,
        }
    )


def _read_scores(output: Location, n_components: int) -> npt.NDArray[np.float32]:
    """Read our scores of the first components (n, n_components), part by part."""
    names = [f"pca_{number}" for number in range(1, n_components + 1)]
    return np.concatenate([part[names].to_numpy(np.float32) for part in report.read_parts(output)])


def _conclude(pairs: _Pairs, widths: tuple[int, int], components: pd.DataFrame) -> Comparison:
    """Count the images by status, and reach a verdict."""
    table = pairs.table
    counts = dict(Counter(table["status"])) | {"duplicate": pairs.n_duplicates}
    if not len(pairs.rows):
        spark = next(iter(table["spark_path"][table["spark_path"] != ""]), "none")
        agrees, verdict = False, (
            f"No image could be matched: the run has {table['path'].iloc[0]}, Spark {hide_secrets(spark)}; compare "
            "results of the same photographs, or name the column with --path-column."
        )
    elif widths[1] not in (0, widths[0]):
        agrees, verdict = False, (
            f"The widths differ, {widths[0]:,} features per image in the run and {widths[1]:,} in Spark: use the same "
            "network, layer and model.pooling on both sides (avg and max give one number per channel, flatten all)."
        )
    else:
        has_features, (agrees, verdict) = bool(widths[1]), judge_features(table)
        if not has_features and not components.empty:
            agrees, verdict = judge_scores(components)
        elif agrees and not components.empty:
            agrees, more = judge_scores(components)
            verdict = f"{verdict.rstrip('.')}; {more[0].lower()}{more[1:]}"
    return Comparison(table, components, counts, *widths, agrees, verdict)
