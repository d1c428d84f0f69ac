"""Checks the stored parts of a run against each other, partition by partition."""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from fruitdask import report, store
from fruitdask.analysis.reduction import COMPONENT_ARRAYS
from fruitdask.core.config import ReduceConfig
from fruitdask.core.listing import GROUPINGS
from fruitdask.core.progress import RunProgress
from fruitdask.core.storage import Location
from fruitdask.errors import DamageError
from fruitdask.pipeline.reduce import BLOCK_BYTES, fit_components, select_blocks
from fruitdask.pipeline.results import open_components, open_features
from fruitdask.store import Fault

if TYPE_CHECKING:
    from fruitdask.analysis.pca import PCA

#: Partitions whose outcomes are held in memory at once, unless the parts of the results table determine it.
_PARTITIONS_AT_ONCE = 256
#: Partitions that are read at once; the features of each are in memory.
_N_THREADS = 4
#: Rounding of coordinates, stored as float32, relative to the spread along the first component.
_SCORE_TOLERANCE = 1e-5
#: Tolerance of components relative to the largest variance, of exact solvers and of the randomized one.
_TOLERANCE, _ESTIMATE_TOLERANCE = 1e-6, 1e-3


@dataclass(frozen=True)
class StoredRun:
    """A stored run whose features can be opened."""

    output: Location
    manifest: store.RunManifest
    arrays: Mapping[str, store.StoredArray]
    committed: frozenset[int]
    #: Its principal components; None if it has none or they cannot be read.
    components: "PCA | None"
    #: The catalog of its rows; None if that cannot be read.
    catalog: pd.DataFrame | None

    @property
    def is_complete(self) -> bool:
        """Whether it has results."""
        return self.manifest.is_complete

    @property
    def has_components(self) -> bool:
        """Whether it has principal components, even damaged ones."""
        return self.manifest.pca is not None

    @property
    def n_images(self) -> int:
        """Images of the run."""
        return self.manifest.n_images

    @property
    def size(self) -> int:
        """Images per partition."""
        return self.manifest.images_per_partition

    @property
    def n_partitions(self) -> int:
        """Partitions of the run."""
        return self.manifest.n_partitions

    def count_images(self, index: int) -> int:
        """Count the images of a partition."""
        return max(0, min(self.size, self.n_images - index * self.size))


@dataclass
class Totals:
    """Sums over all partitions, and their faults."""

    faults: list[Fault] = field(default_factory=list)
    counts: report.Counts = field(default_factory=report.Counts)
    n_images: int = 0

    def add(self, index: int, outcomes: pd.DataFrame | None, faults: Iterable[Fault]) -> None:
        """Add the next partition."""
        self.faults += faults
        if outcomes is None or outcomes.empty:
            return
        self.counts.add(outcomes)
        self.n_images += len(outcomes)


def check_partitions(run: StoredRun, progress: RunProgress) -> Totals:
    """Check all committed partitions and the tables made from them."""
    totals = Totals()
    progress.begin("Verifying partitions")
    progress.begin_images(run.n_images, n_done=run.n_images - sum(map(run.count_images, run.committed)))
    with ThreadPoolExecutor(_N_THREADS) as pool:
        for first, indices, part in _list_pieces(run, totals.faults):
            check = partial(_check_partition, run, part, first)
            for index, (outcomes, faults) in zip(indices, pool.map(check, indices), strict=True):
                totals.add(index, outcomes, faults)
                n_images = run.count_images(index)
                progress.advance(n_images, failures={"damaged": n_images} if faults else {})
    if run.is_complete:
        names = (store.RESULTS_CSV, store.FAILURES)
        totals.faults += store.check_digests(run.output, run.manifest.digests, names, "reduce")
    if run.is_complete and totals.n_images == run.n_images:
        totals.faults += _check_counts(run, totals)
    return totals


def _list_pieces(run: StoredRun, faults: list[Fault]) -> Iterator[tuple[int, list[int], pd.DataFrame | None]]:
    """Yield groups of partitions: the first one, the committed ones, and the part of the results that holds them, if
    any.
    """
    first = 0
    for name in report.list_parts(run.output) if run.is_complete else []:
        try:
            part = store.read_table(run.output, store.RESULTS, name)
        except DamageError as error:
            faults.append(Fault(f"{store.RESULTS}/{name}", store.describe_damage(error), "reduce"))
            break
        end = first + -(-len(part) // run.size)
        yield first, [index for index in range(first, end) if index in run.committed], part
        first = end
    else:
        if run.is_complete and first != run.n_partitions:
            faults.append(Fault(store.RESULTS, "it does not have one row per image", "reduce"))
    for start in range(first, run.n_partitions, _PARTITIONS_AT_ONCE):
        end = min(start + _PARTITIONS_AT_ONCE, run.n_partitions)
        yield start, [index for index in range(start, end) if index in run.committed], None


def _check_partition(
    run: StoredRun, part: pd.DataFrame | None, first: int, index: int
) -> tuple[pd.DataFrame | None, list[Fault]]:
    """Check a partition and its rows of the results; returns its outcomes, not its features, which are large."""
    checked = store.check_partition(run.output, run.arrays, index, may_grow=not run.is_complete)
    faults, outcomes = list(checked.faults), checked.outcomes
    if run.catalog is not None and outcomes is not None:
        expected = run.catalog.iloc[index * run.size :].iloc[: len(outcomes)]
        # A changed class is not a fault until the run is complete.
        for name in ("path", "label") if run.is_complete else ("path",):
            if not np.array_equal(expected[name].astype(str), outcomes[name].astype(str)):
                what = f"its {name}s are not those in {store.CATALOG}"
                faults.append(Fault(f"partition {index}", what, "compute", index))
    if part is not None and outcomes is not None:
        start = (index - first) * run.size
        # Without components there must be no coordinates.
        scores, tolerance = None if run.has_components else np.empty((len(outcomes), 0)), 0.0
        if run.components is not None and checked.features is not None:
            scores = run.components.transform(checked.features)
            tolerance = _SCORE_TOLERANCE * float(np.sqrt(run.components.explained_variance_[0]))
        rows = part.iloc[start : start + run.size]
        where = f"{store.RESULTS}, partition {index}"
        for name in _compare_groupings(rows, run.catalog, index * run.size):
            faults.append(Fault(where, f"{name} is not that in {store.CATALOG}", "reduce"))
        for what in report.compare_rows(rows, outcomes, scores, tolerance=tolerance):
            faults.append(Fault(where, what, "reduce"))
    return outcomes, faults


def _compare_groupings(rows: pd.DataFrame, catalog: pd.DataFrame | None, start: int) -> Iterator[str]:
    """Name the groupings in which rows of the results differ from their images."""
    if catalog is None:
        return
    images = catalog.iloc[start : start + len(rows)]
    for name in GROUPINGS:
        if (name in rows) != (name in images) or (name in rows and not np.array_equal(rows[name], images[name])):
            yield name


def _check_counts(run: StoredRun, totals: Totals) -> Iterator[Fault]:
    """Compare the counts in the manifest with all outcomes."""
    counts = {"by_status": dict(totals.counts.by_status), "by_class": totals.counts.by_class()}
    for name, found in counts.items():
        if (said := getattr(run.manifest.counts, name)) != found:
            what = f"counts.{name} disagrees with the outcomes: expected {found}, found {said}"
            yield Fault(store.MANIFEST, what, "reduce")


def read_components(output: Location, *, n_features: int) -> "tuple[PCA | None, list[Fault]]":
    """Read the principal components of a run and check their shapes."""
    faults = list(store.check_arrays(output, store.COMPONENTS, COMPONENT_ARRAYS, "reduce"))
    if faults:
        return None, faults
    try:
        found = open_components(output, {})
    except DamageError as error:
        return None, [Fault(store.COMPONENTS, store.describe_damage(error), "reduce")]
    if found is None or found.components_.shape[1:] != (n_features,) or found.mean_.shape != (n_features,):
        return None, [Fault(store.COMPONENTS, f"expected components of {n_features} features, found others", "reduce")]
    return found, []


def check_components(run: StoredRun) -> Iterator[Fault]:
    """Fit the principal components of a complete run again and compare."""
    import dask

    from fruitdask.analysis.pca import compare_components

    if run.components is None:
        return
    settings = run.manifest.read_settings("reduce", ReduceConfig)
    features, is_ok = open_features(run.output, block_bytes=BLOCK_BYTES)
    with dask.config.set(scheduler="threads"):
        found = fit_components(settings, select_blocks(features, is_ok))
    tolerance = _ESTIMATE_TOLERANCE if settings.solver == "randomized" else _TOLERANCE
    for what in compare_components(run.components, found, tolerance=tolerance):
        yield Fault(store.COMPONENTS, what, "reduce")
    said, ratios = run.manifest.pca, run.components.explained_variance_ratio_
    if said is not None and (
        said.n_components != len(ratios)
        or len(said.explained_variance_ratio) != len(ratios)
        or not np.allclose(said.explained_variance_ratio, ratios, rtol=0, atol=1e-6)
    ):
        yield Fault(store.MANIFEST, f"pca disagrees with {store.COMPONENTS}", "reduce")
