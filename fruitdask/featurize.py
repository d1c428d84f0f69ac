"""Featurizing: one partition of images to features on a worker, and a bounded number of partitions in flight."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask.catalog import Partition
from fruitdask.errors import FeaturizeError, FruitdaskError, ImageError, ImageTooLargeError
from fruitdask.images import decode_images
from fruitdask.models import ModelArtifact, load_predictor, prepare_engine
from fruitdask.storage import Location
from fruitdask.store import OUTCOME_COLUMNS, write_partition

#: Partitions in flight for each thread of the cluster: one in work, one waiting at the worker.
_PARTITIONS_PER_THREAD = 2
#: How often a task is tried again on another worker, and how often the artifact is delivered again after its last holder died.
_TASK_RETRIES = 2
_MAX_DELIVERIES = 20
#: How long to wait for a worker after the last one died: a nanny starts another in seconds, a cloud in minutes.
_WORKER_TIMEOUT_SECONDS = 600
#: The first pause before reading a file again; each further one is twice as long.
_FIRST_PAUSE_SECONDS = 0.2


@dataclass(frozen=True)
class FeaturizeJob:
    """
    What a task needs to know besides its partition and its network; picklable and small.

    Parameters
    ----------
    source : Location
        The folder that the paths of the catalog are relative to.
    output : Location
        The output folder, whose store exists.
    batch_size : int
        Images a call of the network.
    max_pixels : int
        Images with more pixels are not decoded.
    fetch_attempts : int
        How often reading a file is tried.
    concurrent_reads : int
        Files in flight at once from a remote input.
    """

    source: Location
    output: Location
    batch_size: int
    max_pixels: int
    fetch_attempts: int
    concurrent_reads: int


@dataclass(frozen=True)
class PartitionSummary:
    """
    What a task reports: counts and seconds, never features.

    Parameters
    ----------
    index : int
        Which partition.
    n_images : int
        Its images.
    statuses : dict[str, int]
        Images by status.
    bytes_read : int
        Bytes of the files that were read.
    seconds : dict[str, float]
        Seconds by stage: ``fetch``, ``decode``, ``predict``, ``write`` and ``load`` (waiting for the network to be built).
    """

    index: int
    n_images: int
    statuses: dict[str, int]
    bytes_read: int
    seconds: dict[str, float]

    @property
    def n_failed(self) -> int:
        """Images without features."""
        return self.n_images - self.statuses.get("ok", 0)


@dataclass
class _Outcome:
    """What becomes of one image, filled in stage by stage."""

    path: str
    label: str
    status: str = "ok"
    error: str = ""
    attempts: int = 0
    data: bytes = field(default=b"", repr=False)

    def fail(self, status: str, error: str) -> None:
        """Record why there will be no features."""
        self.status, self.error, self.data = status, error, b""


class _Stopwatch:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the seconds of a block to a stage."""
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start  # type: ignore[assignment]


def featurize_partition(partition: Partition, artifact: ModelArtifact, job: FeaturizeJob) -> PartitionSummary:
    """
    Turn the images of a partition into features and store them.

    Images are fetched, decoded and predicted in batches, so that memory does not grow with the partition. An image that fails is data: its
    features are NaN and its outcome says why. The function runs without a cluster too.

    Parameters
    ----------
    partition : Partition
        The images.
    artifact : ModelArtifact
        The network; it is built once per process.
    job : FeaturizeJob
        Where to read and write, and the limits.

    Returns
    -------
    PartitionSummary
        Counts and seconds.

    Raises
    ------
    StorageError
        If the results cannot be written.
    """
    watch = _Stopwatch()
    with watch.measure("load"):
        predict = load_predictor(artifact, n_threads=_count_threads())
    outcomes = [_Outcome(path, label) for path, label in zip(partition.paths, partition.labels, strict=True)]
    features = np.full((len(outcomes), artifact.n_features), np.nan, np.float32)
    bytes_read = 0
    with ThreadPoolExecutor(job.concurrent_reads) as pool:
        fetched = _fetch_ahead(outcomes, job, pool)
        for start in range(0, len(outcomes), job.batch_size):
            with watch.measure("fetch"):
                batch = list(islice(fetched, job.batch_size))
            bytes_read += sum(len(outcome.data) for outcome in batch)
            with watch.measure("decode"):
                rows, images = _decode(batch, artifact.input_px, job.max_pixels)
            with watch.measure("predict"):
                if rows:
                    features[start + np.asarray(rows)] = _check_finite(predict(np.stack(images)), batch, rows)
    table = pd.DataFrame(
        [[getattr(outcome, column) for column in OUTCOME_COLUMNS] for outcome in outcomes],
        columns=list(OUTCOME_COLUMNS),
    )
    with watch.measure("write"):
        write_partition(job.output, index=partition.index, start=partition.start, features=features, outcomes=table)
    return PartitionSummary(
        partition.index, len(outcomes), dict(Counter(table["status"])), bytes_read, dict(watch.seconds)
    )


def featurize_catalog(
    client: Any,
    partitions: Iterable[Partition],
    artifact: ModelArtifact,
    job: FeaturizeJob,
    *,
    on_summary: Callable[[PartitionSummary], None],
) -> None:
    """
    Featurize partitions on a cluster, a bounded number at a time.

    The artifact is scattered to all workers once. If the last worker that holds it dies, it is scattered again and what was in flight is
    submitted again.

    Parameters
    ----------
    client : distributed.Client
        The cluster.
    partitions : Iterable[Partition]
        What to do; it is read only as fast as the cluster works.
    artifact : ModelArtifact
        The network.
    job : FeaturizeJob
        Where to read and write, and the limits.
    on_summary : Callable[[PartitionSummary], None]
        Called for each partition when it is committed; an exception from it ends the work.

    Raises
    ------
    FeaturizeError
        If a partition cannot be featurized or stored.
    """
    from distributed import as_completed

    queue = iter(partitions)
    in_flight: dict[Any, Partition] = {}
    completed = as_completed()
    delivery = _Delivery(client, artifact)

    def submit(partition: Partition) -> None:
        future = client.submit(featurize_partition, partition, delivery.future, job, pure=False, retries=_TASK_RETRIES)
        in_flight[future] = partition
        completed.add(future)

    try:
        for partition in islice(queue, _count_window(client)):
            submit(partition)
        for future in completed:
            partition = in_flight.pop(future)
            summary = _get_summary(future, partition)
            if summary is None:
                delivery.renew()
                submit(partition)
                continue
            on_summary(summary)
            for partition in islice(queue, max(0, _count_window(client) - len(in_flight))):
                submit(partition)
    except (OSError, TimeoutError) as error:
        if isinstance(error, FruitdaskError):
            raise
        raise FeaturizeError(
            f"the cluster was lost: {str(error) or type(error).__name__}; what is stored stays, run again to go on"
        ) from error
    finally:
        # Where the scheduler is gone there is nothing left to cancel.
        with suppress(OSError, TimeoutError):
            client.cancel(list(in_flight), force=True)


def prepare_workers(client: Any, engine: str) -> list[Any]:
    """
    Let every worker import an engine while the client does something else.

    Parameters
    ----------
    client : distributed.Client
        The cluster.
    engine : str
        The engine of the artifact to come.

    Returns
    -------
    list[distributed.Future]
        Keep them until the artifact is there; nobody needs to wait for them.
    """
    return [client.submit(_prepare_worker, engine, workers=[worker], pure=False) for worker in client.nthreads()]


class _Delivery:
    """The scattered artifact, and how to scatter it again."""

    def __init__(self, client: Any, artifact: ModelArtifact) -> None:
        self._client = client
        self._artifact = artifact
        self._n_deliveries = 0
        self._scatter()

    def renew(self) -> None:
        """Scatter again, once for all the tasks that one loss has cancelled."""
        if self.future.status == "finished":
            return
        if self._n_deliveries >= _MAX_DELIVERIES:
            raise FeaturizeError(
                f"every worker that held the network died, {self._n_deliveries} times over; see the workers' logs for why"
            )
        self._scatter()

    def _scatter(self) -> None:
        """Copy the artifact to every worker; a new key each time, for the scheduler remembers the lost one."""
        self._client.wait_for_workers(1, timeout=_WORKER_TIMEOUT_SECONDS)
        self.future = self._client.scatter(self._artifact, broadcast=True, hash=False)
        self._n_deliveries += 1


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


def _count_window(client: Any) -> int:
    """Count the partitions that may be in flight on the cluster as it is now."""
    n_threads: int = sum(client.nthreads().values())
    return max(1, _PARTITIONS_PER_THREAD * n_threads)


def _get_summary(future: Any, partition: Partition) -> PartitionSummary | None:
    """Get a task's summary, or say which images it stood for; None where it was lost with its worker."""
    try:
        summary: PartitionSummary = future.result()
    except CancelledError:
        return None
    except Exception as error:
        raise FeaturizeError(
            f"partition {partition.index} ({partition.paths[0]} to {partition.paths[-1]}) failed: {str(error) or type(error).__name__}"
            + ("" if isinstance(error, FruitdaskError) else f" ({type(error).__name__})")
        ) from error
    return summary


def _fetch_ahead(outcomes: list[_Outcome], job: FeaturizeJob, pool: ThreadPoolExecutor) -> Iterator[_Outcome]:
    """Read files in their order, some ahead of the one that is wanted, so that they arrive while others are decoded."""
    fs, root = job.source.fs, job.source.path
    waiting: deque[tuple[_Outcome, Future[None]]] = deque()
    for outcome in outcomes:
        waiting.append((outcome, pool.submit(_fetch, outcome, fs, f"{root}/{outcome.path}", job.fetch_attempts)))
        if len(waiting) > job.concurrent_reads:
            yield _wait(*waiting.popleft())
    while waiting:
        yield _wait(*waiting.popleft())


def _wait(outcome: _Outcome, reading: "Future[None]") -> _Outcome:
    """Wait until a file is read."""
    reading.result()
    return outcome


def _fetch(outcome: _Outcome, fs: Any, path: str, max_attempts: int) -> None:
    """Read one file, trying again unless it is certainly not there."""
    while outcome.attempts < max_attempts:
        if outcome.attempts:
            time.sleep(_FIRST_PAUSE_SECONDS * 2 ** (outcome.attempts - 1))
        outcome.attempts += 1
        try:
            outcome.data = fs.cat_file(path)
            return
        except FileNotFoundError:
            return outcome.fail("missing", "the file was listed, but is not there any more")
        except MemoryError:
            raise
        except Exception as error:
            # File systems raise OSError, but also their clients' own exceptions; whichever it is, only this image is concerned.
            last = f"cannot be read: {' '.join(str(error).split()) or type(error).__name__}"
    outcome.fail("unreachable", last)


def _decode(batch: list[_Outcome], size_px: int, max_pixels: int) -> tuple[list[int], list[npt.NDArray[np.uint8]]]:
    """Decode a batch; gives the positions and the pixels of the images that are well."""
    fetched = [row for row, outcome in enumerate(batch) if outcome.status == "ok"]
    rows, images = [], []
    for row, result in zip(
        fetched,
        decode_images([batch[row].data for row in fetched], size_px=size_px, max_pixels=max_pixels),
        strict=True,
    ):
        batch[row].data = b""
        if isinstance(result, ImageError):
            batch[row].fail("too_large" if isinstance(result, ImageTooLargeError) else "unreadable", str(result))
        else:
            rows.append(row)
            images.append(result)
    return rows, images


def _check_finite(features: npt.NDArray[np.float32], batch: list[_Outcome], rows: list[int]) -> npt.NDArray[np.float32]:
    """Fail the images for which the network gives infinity or no number, which would spoil the reduction of all others."""
    is_finite = np.asarray(np.isfinite(features).all(axis=1))
    for row in np.flatnonzero(~is_finite):
        batch[rows[row]].fail("not_finite", "the network gives features that are not finite numbers")
    return np.where(is_finite[:, np.newaxis], features, np.float32(np.nan))
