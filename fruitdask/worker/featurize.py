"""Featurizing: one partition of images to features, on a worker."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask.cluster.scheduling import let_next_begin
from fruitdask.core.partition import Partition
from fruitdask.core.storage import Location
from fruitdask.errors import StorageError
from fruitdask.store import OUTCOME_COLUMNS, VERSION_COLUMNS, read_partition, write_partition
from fruitdask.worker.explore import ExploreJob, Explorer, Findings
from fruitdask.worker.fetch import Batch, ImageSource, Outcome, Stopwatch, read_batches
from fruitdask.worker.models import ModelArtifact, load_predictor, prepare_engine

#: Features and outcomes of a partition that is committed.
_Stored = tuple[npt.NDArray[np.float32], pd.DataFrame]


@dataclass(frozen=True)
class FeaturizeJob:
    """What a task needs to know besides its partition and its network; picklable and small."""

    #: Where images are and how to read them.
    source: ImageSource
    output: Location
    #: Explore the images too, while they are there; its input size must be the network's.
    explore: ExploreJob | None = None


@dataclass(frozen=True)
class PartitionSummary:
    """What a task reports: counts and seconds, never features."""

    index: int
    n_images: int
    statuses: dict[str, int]
    #: Bytes of the files that were read.
    bytes_read: int
    #: Seconds by stage: ``fetch``, ``decode``, ``predict``, ``write``, ``load`` (waiting for the network to be built)
    #: and ``explore``.
    seconds: dict[str, float]
    #: What exploring the images found, where that was asked for.
    findings: Findings | None = field(default=None, repr=False)

    @property
    def n_failed(self) -> int:
        """Images without features."""
        return self.n_images - self.statuses.get("ok", 0)


def featurize_partition(partition: Partition, artifact: ModelArtifact, job: FeaturizeJob) -> PartitionSummary:
    """Turn the images of a partition into features and store them.

    Images are fetched, decoded and predicted in batches, so that of a partition only its features (and, where it is
    explored too, small thumbnails) are held. An image that fails is data: its features are NaN and its outcome says
    why. Of a partition that is committed and of which only some images are to be computed, the others are written again
    as they are. The function runs without a cluster too.
    """
    computed = _compute(partition, artifact, job)
    table = pd.DataFrame(
        [[getattr(outcome, column) for column in OUTCOME_COLUMNS] for outcome in computed.outcomes],
        columns=list(OUTCOME_COLUMNS),
    )
    watch = computed.watch
    with watch.measure("write"):
        findings = computed.explorer.finish() if computed.explorer is not None else None
        _store(computed.partition, job.output, computed.features, table, computed.before)
    statuses = dict(Counter(table["status"]))
    return PartitionSummary(partition.index, len(table), statuses, computed.bytes_read, watch.seconds, findings)


def mark_vanished(partition: Partition, output: Location, *, n_features: int) -> None:
    """Record which images of a partition have vanished, where none is to be computed; that takes no network."""
    partition, before = _read_before(partition, output)
    if partition.places_to_read:
        raise StorageError(f"partition {partition.index} of {output.url} is not committed any more; run again")
    nothing = pd.DataFrame(columns=list(OUTCOME_COLUMNS))
    _store(partition, output, np.empty((0, n_features), np.float32), nothing, before)


def probe_partition(partition: Partition, artifact: ModelArtifact, job: FeaturizeJob) -> None:
    """Do the same as `featurize_partition` and store nothing, to see whether the process survives."""
    _compute(partition, artifact, job)


@dataclass(frozen=True, eq=False)
class _Computed:
    """What was computed of the images of a partition that were to be read (features are NaN where one failed); what was there before."""

    partition: Partition
    before: _Stored | None
    features: npt.NDArray[np.float32]
    outcomes: list[Outcome]
    bytes_read: int
    explorer: Explorer | None
    watch: Stopwatch


def _compute(partition: Partition, artifact: ModelArtifact, job: FeaturizeJob) -> _Computed:
    """Compute the features of a partition, batch by batch."""
    watch = Stopwatch()
    with watch.measure("load"):
        predict = load_predictor(artifact, n_threads=_count_threads())
    partition, before = _read_before(partition, job.output)
    chosen = partition.select(partition.places_to_read)
    explorer = Explorer(partition, job.explore) if job.explore and chosen is partition else None
    features = np.full((len(chosen.paths), artifact.n_features), np.nan, np.float32)
    outcomes, bytes_read = list[Outcome](), 0
    batches = read_batches(chosen, job.source, input_px=artifact.input_px, watch=watch, on_asked=let_next_begin)
    for batch in batches:
        bytes_read += sum(len(outcome.data) for outcome in batch.outcomes)
        if explorer is not None:
            with watch.measure("explore"):
                explorer.add(batch)
        with watch.measure("predict"):
            if batch.rows:
                features[batch.start + np.asarray(batch.rows)] = _check_finite(predict(batch.pixels), batch)
        outcomes += batch.outcomes
    return _Computed(partition, before, features, outcomes, bytes_read, explorer, watch)


def prepare_workers(client: Any, engine: str) -> list[Any]:
    """Let every worker import an engine while the client does something else."""
    return [client.submit(_prepare_worker, engine, workers=[worker], pure=False) for worker in client.nthreads()]


def _read_before(partition: Partition, output: Location) -> tuple[Partition, _Stored | None]:
    """Read what stays of a partition of which only some images are to be computed; gives what is to be computed, too."""
    if partition.rows is None:
        return partition, None
    before = read_partition(output, index=partition.index, start=partition.start)
    # A worker was killed while it wrote: there is nothing to keep.
    return (partition if before is not None else replace(partition, rows=None)), before


def _store(
    partition: Partition,
    output: Location,
    features: npt.NDArray[np.float32],
    outcomes: pd.DataFrame,
    before: _Stored | None,
) -> None:
    """Lay what was computed of a partition beside what stays of it, say of which versions of the files it is, and write it."""
    places = np.asarray(partition.places_to_read, np.int64)
    if before is not None or len(places) < len(partition.paths):
        features, outcomes = _spread(partition, features, outcomes.set_axis(places), before)
    versions = zip(VERSION_COLUMNS, (partition.bytes, partition.versions), strict=True)
    write_partition(
        output,
        index=partition.index,
        start=partition.start,
        features=features,
        outcomes=outcomes.assign(**{name: values for name, values in versions if values}),
        is_committed=before is not None,
    )


def _spread(
    partition: Partition,
    features: npt.NDArray[np.float32],
    outcomes: pd.DataFrame,
    before: _Stored | None,
) -> tuple[npt.NDArray[np.float32], pd.DataFrame]:
    """Lay computed rows, by their places, over those of an earlier commit, if any; the rest has vanished."""
    n_images = len(partition.paths)
    whole = np.full((n_images, features.shape[1]), np.nan, np.float32)
    vanished = {"status": "missing", "error": "it is not in the input any more", "attempts": 0}
    table = pd.DataFrame({"path": partition.paths, "label": partition.labels, **vanished})
    if before is not None:
        kept = before[1].index.difference(list(partition.rows or ()))
        whole[kept] = before[0][kept]
        table.loc[kept] = before[1].loc[kept, list(OUTCOME_COLUMNS)]
        # One that had failed is tried on.
        failed = before[1].loc[before[1]["status"] != "ok", "attempts"]
        outcomes["attempts"] = outcomes["attempts"].add(failed.reindex(outcomes.index), fill_value=0).astype(int)
    whole[outcomes.index] = features
    table.loc[outcomes.index] = outcomes
    return whole, table


def _prepare_worker(engine: str) -> None:
    """Import an engine on a worker."""
    prepare_engine(engine, n_threads=_count_threads())


def _count_threads() -> int:
    """Count the threads that this process may use: its worker's, or all cores where there is no worker."""
    from dask.system import CPU_COUNT
    from distributed import get_worker

    try:
        return int(get_worker().state.nthreads)
    except ValueError:
        return int(CPU_COUNT)


def _check_finite(features: npt.NDArray[np.float32], batch: Batch) -> npt.NDArray[np.float32]:
    """Fail the images for which the network gives infinity or no number, which would spoil the reduction of all others."""
    is_finite = np.asarray(np.isfinite(features).all(axis=1))
    for row in np.flatnonzero(~is_finite):
        batch.outcomes[batch.rows[row]].fail("not_finite", "the network gives features that are not finite numbers")
    return np.where(is_finite[:, np.newaxis], features, np.float32(np.nan))
