"""Finds photographs to check, from stored features and the findings of an exploration."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from fruitdask import store
from fruitdask.core.config import CheckConfig
from fruitdask.core.escaping import format_csv
from fruitdask.core.memory import return_freed_memory
from fruitdask.core.storage import Location
from fruitdask.pipeline.open import open as open_result
from fruitdask.pipeline.reduce import BLOCK_BYTES
from fruitdask.pipeline.results import RunResult, open_features, read_images
from fruitdask.store.catalog import sample_evenly
from fruitdask.store.exploration import read_images as read_explored

if TYPE_CHECKING:
    import dask.array as da

    from fruitdask.analysis.issues import Reference, Votes

#: Columns of an exploration by which near duplicates are found.
_LOOKS = ("perceptual_hash", "near_duplicate_group", "duplicate_group", "mean_red", "mean_green", "mean_blue")
#: Images whose neighbours vote in one Dask graph: Dask warns of graphs of 10 MB, and their votes take 15 MB.
_ROWS_AT_ONCE = 250_000
#: Pairs of near duplicates whose features are compared: one block of them is in memory.
_PAIRS_AT_ONCE = 4_096


def check(results: "str | RunResult", *, storage_options: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """
    Find the photographs of a finished run that a person should look at.

    Parameters
    ----------
    results : str or RunResult
        The finished run, or the folder or URL of its results.
    storage_options : Mapping[str, Any], optional
        Options of the fsspec file system of ``results``.

    Returns
    -------
    pandas.DataFrame
        One row per issue, most serious first: ``path``, ``label``; ``kind`` (``label``, ``copy``, ``near_duplicate``,
        ``outlier``, ``blurry``, ``dark``, ``bright``, ``uniform``, ``size``, ``shape``); ``score``, 0 to 1; ``other``,
        the image it conflicts with; ``suggestion``; ``agreement``, for a wrong label the fraction (0 to 1) of the
        nearest neighbours in other groups that agree with the suggestion. Read if the run has found them, else found
        and written.

    Raises
    ------
    OutputError
        If there is no finished run.
    StorageError
        If it cannot be read, or the list cannot be written.
    """
    import dask

    result = results if isinstance(results, RunResult) else open_result(str(results), storage_options)
    manifest, output = store.RunManifest.model_validate(result.manifest), result.output
    if manifest.issues is None:
        with store.locked(output), dask.config.set(scheduler="threads"):
            issues = find_issues(CheckConfig(), output, read_images(output))
            digests, record = write_issues(output, issues)
            store.write_manifest(output, manifest.change(issues=record, digests=manifest.digests | digests))
    return store.read_table(output, store.ISSUES)


def find_issues(settings: CheckConfig, output: Location, catalog: pd.DataFrame) -> pd.DataFrame:
    """Find the photographs of a run to check, once its features are computed; `catalog` has one row per image."""
    from fruitdask.analysis.issues import COLUMNS, rank_issues

    labels = catalog["label"].astype("category").cat
    codes, classes = np.asarray(labels.codes), np.asarray(labels.categories, str)
    features, is_ok = open_features(output, block_bytes=BLOCK_BYTES)
    found = [pd.DataFrame(columns=["row", "kind", "score", "other_row", "class", "agreement"])]
    exploration = store.read_exploration_manifest(output)
    is_explored = exploration is not None and exploration.is_complete
    findings = _Findings(output, catalog["path"], is_ok) if is_explored else None
    if is_ok.sum() > 1:
        found += _find_by_features(settings, features, is_ok, findings, catalog, codes)
    if exploration is not None and findings is not None:
        bits = exploration.near_duplicate_bits or 0
        found += _find_alike(features, findings, _number_parts(catalog, codes), bits)
    table = pd.concat(found, ignore_index=True)
    rows, paths = table["row"].to_numpy(np.int64), catalog["path"]
    table["path"], table["label"] = paths.iloc[rows].array, classes[codes[rows]]
    for name, source, names in (("other", "other_row", paths), ("suggestion", "class", pd.Series(classes))):
        chosen = table[source].fillna(-1).to_numpy(np.int64)
        table[name] = np.where(chosen >= 0, names.iloc[chosen].to_numpy(object), "")
    return rank_issues(table[list(COLUMNS)].astype({"score": np.float64, "agreement": np.float64}))


def write_issues(output: Location, issues: pd.DataFrame) -> tuple[dict[str, str], store.IssuesRecord]:
    """Write the photographs to check as Parquet and CSV; returns the digest of the CSV file and the record."""
    store.write_table(output.child(store.ISSUES), issues)
    digests = store.write_digested(output, store.ISSUES_CSV, format_csv(issues).encode())
    exploration = store.read_exploration_manifest(output)
    return digests, store.IssuesRecord(
        by_kind=issues["kind"].value_counts().to_dict(), exploration=exploration.finished if exploration else None
    )


class _Findings:
    """What an exploration found about the images of a catalog: of millions, only a few columns fit into memory."""

    def __init__(self, output: Location, paths: pd.Series, is_ok: npt.NDArray[np.bool_]) -> None:
        self._output, self._is_ok = output, is_ok
        # Once images were added, the rows of the store are in another order than those of the exploration.
        finder = store.PathFinder(paths)
        blocks = read_explored(output, ("path",))
        self._rows = [finder.find(block["path"].to_pandas()).astype(np.int32) for block in blocks]

    def read(self, *columns: str) -> pd.DataFrame:
        """Read columns for all images, float32; NaN where nothing was found, and for images without features."""
        values = np.full((len(columns), len(self._is_ok)), np.nan, np.float32)
        for rows, block in self._read_blocks(columns):
            values[:, rows] = np.where(self._is_ok[rows], block.to_numpy(np.float32, na_value=np.nan).T, np.nan)
        return_freed_memory()
        return pd.DataFrame(values.T, columns=list(columns), copy=False)

    def read_copies(self) -> npt.NDArray[np.int32]:
        """Read the numbers of groups of equal files; -1 for files that are alone."""
        groups = np.full(len(self._is_ok), -1, np.int32)
        for rows, block in self._read_blocks(["duplicate_group"]):
            groups[rows] = block["duplicate_group"].fillna(-1)
        return groups

    def read_near_duplicates(self) -> pd.DataFrame:
        """Read hashes, colours and groups of equal files of images that have features and near duplicates."""
        from fruitdask.analysis.exploration import parse_hashes

        found = []
        for rows, block in self._read_blocks(_LOOKS):
            is_chosen = self._is_ok[rows] & block.pop("near_duplicate_group").notna().to_numpy()
            chosen = block.set_index(rows)[is_chosen]
            hashes, _ = parse_hashes(pa.array(chosen["perceptual_hash"]), n_bits=64)
            groups = chosen["duplicate_group"].fillna(-1).astype(np.int64)
            found.append(chosen.assign(perceptual_hash=hashes[:, 0], duplicate_group=groups))
        return pd.concat(found).sort_index()

    def _read_blocks(self, columns: Sequence[str]) -> Iterator[tuple[npt.NDArray[np.int32], pd.DataFrame]]:
        """Read columns block by block, with the rows that their images have in the catalog."""
        for rows, block in zip(self._rows, read_explored(self._output, columns), strict=True):
            is_there = rows >= 0
            yield rows[is_there], block.to_pandas()[is_there]


def _number_parts(catalog: pd.DataFrame, codes: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
    """Number the parts of the data that should have no image in common: classes, and splits of each."""
    if "split" not in catalog:
        return codes.astype(np.int32)
    splits = catalog["split"].astype("category").cat
    # The code of an unknown split is -1.
    return np.asarray(codes, np.int32) * (len(splits.categories) + 1) + np.asarray(splits.codes, np.int32)


def _find_by_features(
    settings: CheckConfig,
    features: "da.Array",
    is_ok: npt.NDArray[np.bool_],
    findings: _Findings | None,
    catalog: pd.DataFrame,
    codes: npt.NDArray[np.integer],
) -> Iterator[pd.DataFrame]:
    """Find probably wrong labels, and images that are unlike their class."""
    from fruitdask.analysis.evaluation import number_groups
    from fruitdask.analysis.issues import find_label_issues, find_odd_values

    groups = number_groups(catalog["group"]) if "group" in catalog else None
    distances = np.full(len(codes), np.nan, np.float32)
    for rows, votes in _collect_votes(settings, features, is_ok, catalog, codes, groups):
        scores = find_label_issues(votes, codes[rows])
        columns = {"row": rows, "kind": "label", "score": scores, "other_row": votes.nearest, "class": votes.codes}
        yield pd.DataFrame(columns | {"agreement": votes.group_shares})[np.isfinite(scores)]
        distances[rows] = votes.distances
    return_freed_memory()
    read = None if findings is None else findings.read
    for kind, here, odd_scores in find_odd_values(read, codes, distances):
        yield pd.DataFrame({"row": here, "kind": kind, "score": odd_scores})


def _collect_votes(
    settings: CheckConfig,
    features: "da.Array",
    is_ok: npt.NDArray[np.bool_],
    catalog: pd.DataFrame,
    codes: npt.NDArray[np.integer],
    groups: npt.NDArray[np.int64] | None,
) -> Iterator[tuple[npt.NDArray[np.int64], "Votes"]]:
    """Let neighbours vote on the classes of all images with features, block by block on the workers that hold them.

    Yields the rows of many blocks, and the votes on them: all votes together would fill the memory.
    """
    import dask.base
    from dask.delayed import delayed

    from fruitdask.analysis.issues import Reference, Votes

    chosen = sample_evenly(catalog, settings.max_rows, among=is_ok)
    known = features[chosen].rechunk((-1, -1)).to_delayed().ravel()[0]
    codes_there, groups_there = codes[chosen].astype(np.int64), None if groups is None else groups[chosen]
    reference = delayed(Reference.build)(known, chosen, codes_there, groups_there, n_classes=int(codes.max()) + 1)
    (reference,) = dask.base.persist(reference)
    starts, vote = np.cumsum((0, *features.chunks[0])), delayed(_vote_on_block)
    blocks = zip(features.to_delayed().ravel(), pairwise(starts), strict=True)
    n_at_once = max(1, _ROWS_AT_ONCE // features.chunks[0][0])
    while some := list(islice(blocks, n_at_once)):
        tasks = [
            vote(
                block,
                start,
                np.flatnonzero(~is_ok[start:stop]),
                codes[start:stop],
                None if groups is None else groups[start:stop],
                reference,
                n_neighbors=settings.n_neighbors,
            )
            for block, (start, stop) in some
        ]
        first, last = some[0][1][0], some[-1][1][1]
        yield first + np.flatnonzero(is_ok[first:last]), Votes.concatenate(dask.base.compute(*tasks))


def _vote_on_block(
    features: npt.NDArray[np.float32],
    start: int,
    failed: npt.NDArray[np.int64],
    codes: npt.NDArray[np.integer],
    groups: npt.NDArray[np.int64] | None,
    reference: "Reference",
    *,
    n_neighbors: int,
) -> "Votes":
    """Let neighbours vote on the classes of the images of a block that have features."""
    from fruitdask.analysis.issues import collect_votes

    rows = np.delete(start + np.arange(len(features)), failed)
    here = rows - start
    of_rows = None if groups is None else groups[here]
    return collect_votes(
        features[here], rows, codes[here].astype(np.int64), of_rows, reference, n_neighbors=n_neighbors
    )


def _find_alike(
    features: "da.Array", findings: _Findings, parts: npt.NDArray[np.int32], max_bits: int
) -> Iterator[pd.DataFrame]:
    """Find copies, and near duplicates in another class or split."""
    from fruitdask.analysis.issues import find_copies, find_near_pairs, measure_pairs

    rows, firsts = find_copies(findings.read_copies())
    # Copies in one class and split do less harm.
    scores = np.where(parts[rows] != parts[firsts], 1.0, 0.5)
    yield pd.DataFrame({"row": rows, "kind": "copy", "score": scores, "other_row": firsts})
    images = findings.read_near_duplicates()
    pairs = find_near_pairs(images.assign(part=parts[images.index]), max_bits=max_bits)
    for start in range(0, pairs.shape[1], _PAIRS_AT_ONCE):
        first, second = pairs[:, start : start + _PAIRS_AT_ONCE]
        scores = measure_pairs(*(features[rows].compute() for rows in (first, second)))
        found = pd.DataFrame({"row": first, "kind": "near_duplicate", "score": scores, "other_row": second})
        yield found[np.isfinite(scores)]
