"""Featurize the images of one partition on a worker."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask.cluster.scheduling import let_next_begin
from fruitdask.core.partition import Partition
from fruitdask.core.storage import Location
from fruitdask.errors import StorageError
from fruitdask.store import OUTCOME_COLUMNS, VERSION_COLUMNS, read_partition, write_partition
from fruitdask.worker.explore import ExploreJob, Explorer
from fruitdask.worker.fetch import Batch, ImageSource, Photograph, Stopwatch, read_batches, read_photographs
from fruitdask.worker.models import ModelArtifact, load_predictor, prepare_engine
from fruitdask.worker.models.artifact import Predictor

#: Features and outcomes of a committed partition.
_Stored = tuple[npt.NDArray[np.float32], pd.DataFrame]


@dataclass(frozen=True)
class FeaturizeJob:
    """The input of a task in addition to its partition and its network; picklable and small."""

    source: ImageSource
    output: Location
    #: Explores the images too, if given; its input size must be the network's.
    explore: ExploreJob | None = None


@dataclass(frozen=True)
class PartitionSummary:
    """The report of a task: counts and seconds, never features."""

    index: int
    n_images: int
    statuses: dict[str, int]
    bytes_read: int
    #: Seconds by stage: ``fetch``, ``decode``, ``predict``, ``write``, ``load`` (of the network) and ``explore``.
    seconds: dict[str, float]
    #: Whether its images were explored too.
    is_explored: bool = False

    @property
    def failures(self) -> dict[str, int]:
        """Number of images without features, by status."""
        return {status: count for status, count in self.statuses.items() if status != "ok"}

    @property
    def n_failed(self) -> int:
        """Number of images without features."""
        return sum(self.failures.values())


def featurize_partition(partition: Partition, artifact: ModelArtifact, job: FeaturizeJob) -> PartitionSummary:
    """Compute the features of a partition's images and store them; runs without a cluster too.

    Memory holds one batch of images and the features and thumbnails of the partition. A failed image is data: its
    features are NaN and its outcome says why. If only some images of a committed partition are pending, the rows of the
    others are written back unchanged.
    """
    return _featurize(partition, artifact, job, is_stored=True)


def probe_partition(partition: Partition, artifact: ModelArtifact, job: FeaturizeJob) -> None:
    """Compute the features of a partition without storing them, to test whether the process survives."""
    _featurize(partition, artifact, job, is_stored=False)


def mark_vanished(partition: Partition, output: Location, *, n_features: int) -> None:
    """Record the vanished images of a partition without other pending work, which needs no network."""
    partition, before = _read_before(partition, output)
    if partition.places_to_read:
        raise StorageError(
            f"expected partition {partition.index} of {output.url} to be committed, found it incomplete; run again"
        )
    nothing = pd.DataFrame(columns=list(OUTCOME_COLUMNS))
    _store(partition, output, np.empty((0, n_features), np.float32), nothing, before)


def featurize_photographs(
    photographs: Sequence[tuple[str, Photograph]], artifact: ModelArtifact, source: ImageSource
) -> _Stored:
    """Compute the features of photographs from anywhere in this process, as a task does for a partition."""
    predict = load_predictor(artifact, n_threads=_count_threads())
    features = np.full((len(photographs), artifact.n_features), np.nan, np.float32)
    rows = list[list[str]]()
    for batch in read_photographs(photographs, source, input_px=artifact.input_px):
        _predict(batch, predict, features)
        rows += [[outcome.path, outcome.status, outcome.error] for outcome in batch.outcomes]
    return features, pd.DataFrame(rows, columns=["path", "status", "error"])


def prepare_workers(client: Any, engine: str) -> list[Any]:
    """Let every worker import an engine in the background."""
    return [
        client.submit(prepare_engine, engine, n_threads=n_threads, workers=[worker], pure=False)
        for worker, n_threads in client.nthreads().items()
    ]


def _featurize(
    partition: Partition, artifact: ModelArtifact, job: FeaturizeJob, *, is_stored: bool
) -> PartitionSummary:
    """Compute the features of a partition batch by batch, and store them if asked to."""
    watch = Stopwatch()
    with watch.measure("load"):
        predict = load_predictor(artifact, n_threads=_count_threads())
    partition, before = _read_before(partition, job.output)
    chosen = partition.select(partition.places_to_read)
    explorer = Explorer(partition, job.explore) if job.explore and chosen is partition else None
    features = np.full((len(chosen.paths), artifact.n_features), np.nan, np.float32)
    rows, bytes_read = list[list[Any]](), 0
    batches = read_batches(chosen, job.source, input_px=artifact.input_px, watch=watch, on_asked=let_next_begin)
    for batch in batches:
        bytes_read += sum(len(outcome.data) for outcome in batch.outcomes)
        if explorer is not None:
            with watch.measure("explore"):
                explorer.add(batch)
        with watch.measure("predict"):
            _predict(batch, predict, features)
        rows += [[getattr(outcome, column) for column in OUTCOME_COLUMNS] for outcome in batch.outcomes]
    table = pd.DataFrame(rows, columns=list(OUTCOME_COLUMNS))
    if is_stored:
        with watch.measure("write"):
            if explorer is not None:
                explorer.finish()
            _store(partition, job.output, features, table, before)
    statuses = dict(Counter(table["status"]))
    return PartitionSummary(partition.index, len(table), statuses, bytes_read, watch.seconds, explorer is not None)


def _read_before(partition: Partition, output: Location) -> tuple[Partition, _Stored | None]:
    """Read the stored rows of a partition with pending rows; a partition without a commit is pending as a whole."""
    if partition.rows is None:
        return partition, None
    before = read_partition(output, index=partition.index, start=partition.start)
    # The commit is missing if a worker was killed while writing.
    return (partition if before is not None else replace(partition, rows=None)), before


def _store(
    partition: Partition,
    output: Location,
    features: npt.NDArray[np.float32],
    outcomes: pd.DataFrame,
    before: _Stored | None,
) -> None:
    """Write computed rows together with the rows stored before, and the versions of the files."""
    places = np.asarray(partition.places_to_read, np.int64)
    if before is not None or len(places) < len(partition.paths):
        features, outcomes = _merge_rows(partition, features, outcomes.set_axis(places), before)
    versions = zip(VERSION_COLUMNS, (partition.bytes, partition.versions), strict=True)
    write_partition(
        output,
        index=partition.index,
        start=partition.start,
        features=features,
        outcomes=outcomes.assign(**{name: values for name, values in versions if values}),
        is_committed=before is not None,
    )


def _merge_rows(
    partition: Partition, features: npt.NDArray[np.float32], outcomes: pd.DataFrame, before: _Stored | None
) -> tuple[npt.NDArray[np.float32], pd.DataFrame]:
    """Merge computed rows, indexed by place, into those of an earlier commit; images in neither have vanished."""
    whole = np.full((len(partition.paths), features.shape[1]), np.nan, np.float32)
    vanished = {"status": "missing", "error": "the input no longer contains this image", "attempts": 0}
    table = pd.DataFrame({"path": partition.paths, "label": partition.labels, **vanished})
    if before is not None:
        kept = before[1].index.difference(list(partition.rows or ()))
        whole[kept] = before[0][kept]
        table.loc[kept] = before[1].loc[kept, list(OUTCOME_COLUMNS)]
        # Attempts at an image that failed before add up.
        failed = before[1].loc[before[1]["status"] != "ok", "attempts"]
        outcomes["attempts"] = outcomes["attempts"].add(failed.reindex(outcomes.index), fill_value=0).astype(int)
    whole[outcomes.index] = features
    table.loc[outcomes.index] = outcomes
    return whole, table


def _count_threads() -> int:
    """Count the threads of this worker, or all cores outside a worker."""
    from dask.system import CPU_COUNT
    from distributed import get_worker

    try:
        return int(get_worker().state.nthreads)
    except ValueError:
        return int(CPU_COUNT)


def _predict(batch: Batch, predict: Predictor, features: npt.NDArray[np.float32]) -> None:
    """Compute the features of the decoded images of a batch, into their rows."""
    if batch.rows:
        features[batch.start + np.asarray(batch.rows)] = _check_finite(predict(batch.pixels), batch)


def _check_finite(features: npt.NDArray[np.float32], batch: Batch) -> npt.NDArray[np.float32]:
    """Fail the images whose features are NaN or infinite, which would spoil the reduction of all others."""
    is_finite = np.asarray(np.isfinite(features).all(axis=1))
    for row in np.flatnonzero(~is_finite):
        batch.outcomes[batch.rows[row]].fail("not_finite", "the network returned NaN or infinite features")
    return np.where(is_finite[:, np.newaxis], features, np.float32(np.nan))
