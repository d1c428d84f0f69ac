"""Reading: fetch and decode the images of a partition in batches, some ahead of use; each image gets one outcome."""

import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from fruitdask.core.partition import Partition
from fruitdask.core.storage import Location, explain_error, hide_secrets
from fruitdask.errors import DamageError, ImageError, ImageTooLargeError, StorageError
from fruitdask.worker.images import decode_images

#: Exponential backoff with full jitter: bounds of the random pause before the first and any later retry of a file.
_FIRST_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS = 0.5, 20
#: After this time without a successful read, each further file is tried once: a stalled server costs 15 s per attempt.
_CIRCUIT_BREAKER_SECONDS = 60
#: Bytes of files per batch, and in memory ahead of the current batch; at least one file, however large.
_MAX_BYTES = 64 * 1024**2
#: Size of uncompressed 16-bit RGBA, and room for metadata; larger files are not read.
_MAX_BYTES_PER_PIXEL, _MAX_METADATA_BYTES = 8, 64 * 1024**2

#: The file of a photograph, its content, or why there is none.
Photograph = Location | bytes | ImageError


@dataclass(frozen=True)
class ImageSource:
    """Where images are and how to read them; picklable and small."""

    #: The folder that the catalog's paths are relative to.
    location: Location
    #: Images to decode and predict together, fewer if their files are large.
    batch_size: int
    #: Images with more pixels are not decoded.
    max_pixels: int
    fetch_attempts: int
    concurrent_reads: int
    decode: str = "exact"

    @property
    def max_bytes(self) -> int:
        """Size of the largest file to read."""
        return _MAX_BYTES_PER_PIXEL * self.max_pixels + _MAX_METADATA_BYTES


@dataclass
class Outcome:
    """The result of one image, filled in stage by stage."""

    path: str
    label: str
    status: str = "ok"
    #: Why the image has no features, if so.
    error: str = ""
    attempts: int = 0
    #: Size of the file in the catalog.
    n_bytes: int = 0
    #: Content of the file, until the next batch.
    data: bytes = field(default=b"", repr=False)

    def fail(self, status: str, error: str) -> None:
        """Record why the image will have no features."""
        self.status, self.error = status, error


@dataclass(frozen=True, eq=False)
class Batch:
    """Consecutive images of a partition, read and decoded."""

    #: Place of the first image in the partition.
    start: int
    outcomes: list[Outcome]
    #: Places in ``outcomes`` of the decoded images.
    rows: list[int]
    #: RGB pixels of the decoded images, shape (len(rows), input_px, input_px, 3), uint8.
    pixels: npt.NDArray[np.uint8]


class Stopwatch:
    """Seconds by stage of a task."""

    def __init__(self) -> None:
        self._seconds: Counter[str] = Counter()

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds so far."""
        return dict(self._seconds)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the seconds of a block to a stage."""
        start = time.perf_counter()
        yield
        self._seconds[stage] += time.perf_counter() - start  # type: ignore[assignment]


def read_batches(
    partition: Partition, source: ImageSource, *, input_px: int, watch: Stopwatch, on_asked: Callable[[], None]
) -> Iterator[Batch]:
    """Read and decode a partition in batches of bounded memory; calls ``on_asked`` once all files are requested."""
    sizes = partition.bytes or (0,) * len(partition.paths)
    files = zip(partition.paths, partition.labels, sizes, strict=True)
    outcomes = [Outcome(path, label, n_bytes=size) for path, label, size in files]
    for outcome in outcomes:
        if outcome.n_bytes > source.max_bytes:
            bound = f"{source.max_bytes:,} bytes (8 per pixel of featurize.max_pixels, plus metadata)"
            outcome.fail("too_large", f"expected a file of at most {bound}, found {outcome.n_bytes:,}")
    for place in partition.unlisted_places:
        outcomes[place].fail("missing", "input.manifest lists this file, but input.url does not contain it")
    for place in partition.excluded:
        outcomes[place].fail(
            "crashed", "every process that read this image died: it needs too much memory or crashes a decoder"
        )
    with ThreadPoolExecutor(source.concurrent_reads) as pool:
        fetch = partial(_fetch_listed, source=source, fs=source.location.fs, breaker=_CircuitBreaker())
        fetched = _fetch_ahead(outcomes, fetch, pool, on_asked, n_ahead=source.concurrent_reads)
        yield from _decode_batches(fetched, source, input_px, watch)


def read_photographs(
    photographs: Sequence[tuple[str, Photograph]], source: ImageSource, *, input_px: int
) -> Iterator[Batch]:
    """Read and decode photographs from anywhere or in memory, each with its name, like `read_batches`."""
    outcomes, breaker = [Outcome(name, "") for name, _ in photographs], _CircuitBreaker()
    places = {id(outcome): place for outcome, (_, place) in zip(outcomes, photographs, strict=True)}

    def fetch(outcome: Outcome) -> None:
        place = places[id(outcome)]
        if isinstance(place, ImageError):
            outcome.fail("unreadable", str(place))
        elif isinstance(place, bytes):
            outcome.data = place
        else:
            try:
                fs, path = place.fs, place.path
            except StorageError as error:
                # Its protocol is unknown.
                return outcome.fail("unreachable", str(error))
            _fetch(outcome, place, fs, path, source, breaker)
            if outcome.status == "missing":
                outcome.error = "there is no such file"

    with ThreadPoolExecutor(source.concurrent_reads) as pool:
        fetched = _fetch_ahead(outcomes, fetch, pool, lambda: None, n_ahead=source.concurrent_reads)
        yield from _decode_batches(fetched, source, input_px, Stopwatch())


def _decode_batches(
    fetched: Iterator[Outcome], source: ImageSource, input_px: int, watch: Stopwatch
) -> Iterator[Batch]:
    """Decode what was read, batch by batch."""
    start = 0
    while True:
        with watch.measure("fetch"):
            batch = list(_take_batch(fetched, source.batch_size))
        if not batch:
            return
        with watch.measure("decode"):
            rows, pixels = _decode(batch, source, input_px)
        yield Batch(start, batch, rows, pixels)
        for outcome in batch:
            outcome.data = b""
        start += len(batch)


def _take_batch(fetched: Iterator[Outcome], batch_size: int) -> Iterator[Outcome]:
    """Take the images of a batch, fewer if their files are large."""
    n_bytes = 0
    for outcome in islice(fetched, batch_size):
        yield outcome
        n_bytes += len(outcome.data)
        if n_bytes >= _MAX_BYTES:
            return


def _fetch_ahead(
    outcomes: list[Outcome],
    fetch: Callable[[Outcome], None],
    pool: ThreadPoolExecutor,
    on_asked: Callable[[], None],
    *,
    n_ahead: int,
) -> Iterator[Outcome]:
    """Read files in order, some ahead of use, so that they arrive while others are decoded."""
    waiting = deque[tuple[Outcome, "Future[None]"]]()
    for outcome in outcomes:
        waiting.append((outcome, pool.submit(fetch, outcome)))
        while len(waiting) > n_ahead or (
            len(waiting) > 1 and sum(ahead.n_bytes for ahead, _ in waiting if ahead.status == "ok") > _MAX_BYTES
        ):
            yield _wait(*waiting.popleft())
    on_asked()
    while waiting:
        yield _wait(*waiting.popleft())


def _wait(outcome: Outcome, reading: "Future[None]") -> Outcome:
    """Wait until a file has been read."""
    reading.result()
    return outcome


class _CircuitBreaker:
    """Stops retries after all reads of a partition have failed for some time."""

    def __init__(self) -> None:
        self._failing_since: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether to stop retrying."""
        since = self._failing_since
        return since is not None and time.monotonic() - since > _CIRCUIT_BREAKER_SECONDS

    def record(self, *, is_read: bool) -> None:
        """Record an attempt."""
        self._failing_since = None if is_read else self._failing_since or time.monotonic()


def _fetch_listed(outcome: Outcome, source: ImageSource, fs: Any, breaker: _CircuitBreaker) -> None:
    """Read a file of the catalog, unless it has failed already."""
    if outcome.status == "ok":
        root = source.location
        _fetch(outcome, root.child(outcome.path), fs, root.locate(outcome.path), source, breaker)


def _fetch(
    outcome: Outcome, place: Location, fs: Any, path: str, source: ImageSource, breaker: _CircuitBreaker
) -> None:
    """Read one file, retrying unless it is missing, damaged or forbidden, or the circuit breaker is open."""
    cause = ""
    while outcome.attempts < source.fetch_attempts and not (outcome.attempts and breaker.is_open):
        if outcome.attempts:
            longest = min(_FIRST_BACKOFF_SECONDS * 2 ** (outcome.attempts - 1), _MAX_BACKOFF_SECONDS)
            time.sleep(random.uniform(0, longest))
        outcome.attempts += 1
        try:
            outcome.data = fs.cat_file(path)
            return breaker.record(is_read=True)
        except FileNotFoundError:
            return outcome.fail("missing", "the file was in the listing, but has been deleted since")
        except DamageError as error:
            return outcome.fail("unreadable", str(error))
        except MemoryError:
            raise
        except Exception as error:
            # File systems raise OSError, but also exceptions of their clients; any of them affects only this image.
            cause = explain_error(error) or " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, PermissionError):
                break
            breaker.record(is_read=False)
    outcome.fail("unreachable", hide_secrets(f"cannot read {place.url}: {cause}"))


def _decode(batch: list[Outcome], source: ImageSource, input_px: int) -> tuple[list[int], npt.NDArray[np.uint8]]:
    """Decode a batch; returns the places and the pixels of the decoded images."""
    fetched = [row for row, outcome in enumerate(batch) if outcome.status == "ok"]
    files = [batch[row].data for row in fetched]
    decoded = decode_images(files, size_px=input_px, max_pixels=source.max_pixels, is_fast=source.decode == "fast")
    rows: list[int] = []
    pixels = np.empty((len(fetched), input_px, input_px, 3), np.uint8)
    for row, result in zip(fetched, decoded, strict=True):
        if isinstance(result, ImageError):
            batch[row].fail("too_large" if isinstance(result, ImageTooLargeError) else "unreadable", str(result))
        else:
            pixels[len(rows)] = result
            rows.append(row)
    return rows, pixels[: len(rows)]
