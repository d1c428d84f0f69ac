"""Reading: the images of a partition, batch by batch, fetched ahead of the one that is wanted; each ends with one outcome."""

import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from fruitdask.core.aws import explain_aws_error
from fruitdask.core.partition import Partition
from fruitdask.core.storage import Location, hide_secrets
from fruitdask.errors import DamageError, ImageError, ImageTooLargeError
from fruitdask.worker.images import decode_images

#: The longest pause before reading a file again; each further one may be twice as long. Pauses are drawn at random up to that, so that
#: many who were refused at once do not come back at once.
_FIRST_PAUSE_SECONDS = 0.5
_MAX_PAUSE_SECONDS = 20
#: Where no file could be read for so long, each of the others is tried once: an attempt at a server that has stalled takes 15 seconds.
_PATIENCE_SECONDS = 60
#: Bytes of files that are in memory ahead of the batch in work, and in a batch: where files are large, there are fewer, at least one.
_MAX_BYTES = 64 * 1024**2
#: An image of 16-bit RGBA that is not compressed has 8 bytes a pixel, and room for metadata. A larger file is not read.
_MAX_BYTES_PER_PIXEL, _MAX_METADATA_BYTES = 8, 64 * 1024**2


@dataclass(frozen=True)
class ImageSource:
    """Where images are and how to read them; picklable and small."""

    #: The folder that the paths of the catalog are relative to.
    location: Location
    #: Images that are decoded and predicted together, at most: there are fewer where their files are large.
    batch_size: int
    #: Images with more pixels are not decoded; files of more than 8 bytes a pixel and 64 MiB are not read.
    max_pixels: int
    #: How often reading a file is tried.
    fetch_attempts: int
    #: Files in flight at once from a remote input.
    concurrent_reads: int
    decode: str = "exact"

    @property
    def max_bytes(self) -> int:
        """Bytes of the largest file that is read."""
        return _MAX_BYTES_PER_PIXEL * self.max_pixels + _MAX_METADATA_BYTES


@dataclass
class Outcome:
    """What becomes of one image, filled in stage by stage."""

    path: str
    label: str
    status: str = "ok"
    #: Why it has no features; empty where it has.
    error: str = ""
    attempts: int = 0
    #: Bytes of the file, as it was listed.
    n_bytes: int = 0
    #: The content of the file while its batch is worked on.
    data: bytes = field(default=b"", repr=False)

    def fail(self, status: str, error: str) -> None:
        """Record why there will be no features."""
        self.status, self.error = status, error


@dataclass(frozen=True, eq=False)
class Batch:
    """Some images of a partition, read and decoded."""

    #: The place of the first one in the partition.
    start: int
    #: All of them, with the content of their files.
    outcomes: list[Outcome]
    #: Places in ``outcomes`` of those that were decoded.
    rows: list[int]
    #: RGB pixels of those, shape (len(rows), input_px, input_px, 3), uint8.
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
    """Read and decode the images of a partition, so many at a time that memory does not grow with it."""
    sizes = partition.bytes or (0,) * len(partition.paths)
    files = zip(partition.paths, partition.labels, sizes, strict=True)
    outcomes = [Outcome(path, label, n_bytes=size) for path, label, size in files]
    for outcome in outcomes:
        if outcome.n_bytes > source.max_bytes:
            outcome.fail(
                "too_large",
                f"expected a file of at most {source.max_bytes:,} bytes (8 a pixel of featurize.max_pixels, and metadata), found "
                f"{outcome.n_bytes:,}",
            )
    for place in partition.unlisted_places:
        outcomes[place].fail("missing", "input.manifest names this file, but it is not in input.url")
    for place in partition.excluded:
        outcomes[place].fail(
            "crashed", "each process that worked on this image died: it needs too much memory or crashes a decoder"
        )
    with ThreadPoolExecutor(source.concurrent_reads) as pool:
        fetched = _fetch_ahead(outcomes, source, pool, on_asked)
        start = 0
        while start < len(outcomes):
            with watch.measure("fetch"):
                batch = list(_take_batch(fetched, source.batch_size))
            with watch.measure("decode"):
                rows, pixels = _decode(batch, source, input_px)
            yield Batch(start, batch, rows, pixels)
            for outcome in batch:
                outcome.data = b""
            start += len(batch)


def _take_batch(fetched: Iterator[Outcome], batch_size: int) -> Iterator[Outcome]:
    """Take the images of a batch, fewer where their files are large."""
    n_bytes = 0
    for outcome in islice(fetched, batch_size):
        yield outcome
        n_bytes += len(outcome.data)
        if n_bytes >= _MAX_BYTES:
            return


def _fetch_ahead(
    outcomes: list[Outcome], source: ImageSource, pool: ThreadPoolExecutor, on_asked: Callable[[], None]
) -> Iterator[Outcome]:
    """Read files in their order, some ahead of the one that is wanted, so that they arrive while others are decoded."""
    fs, waiting, patience = source.location.fs, deque[tuple[Outcome, Future[None]]](), _Patience()
    for outcome in outcomes:
        waiting.append((outcome, pool.submit(_fetch, outcome, fs, source, patience)))
        while len(waiting) > source.concurrent_reads or (
            len(waiting) > 1 and sum(ahead.n_bytes for ahead, _ in waiting if ahead.status == "ok") > _MAX_BYTES
        ):
            yield _wait(*waiting.popleft())
    on_asked()
    while waiting:
        yield _wait(*waiting.popleft())


def _wait(outcome: Outcome, reading: "Future[None]") -> Outcome:
    """Wait until a file is read."""
    reading.result()
    return outcome


class _Patience:
    """How long the files of a partition could not be read, any of them."""

    def __init__(self) -> None:
        self._failing_since: float | None = None

    @property
    def is_lost(self) -> bool:
        """Whether that is too long for trying again."""
        since = self._failing_since
        return since is not None and time.monotonic() - since > _PATIENCE_SECONDS

    def note(self, *, is_read: bool) -> None:
        """Note an attempt."""
        self._failing_since = None if is_read else self._failing_since or time.monotonic()


def _fetch(outcome: Outcome, fs: Any, source: ImageSource, patience: _Patience) -> None:
    """Read one file, trying again unless it is certainly not there or not to be had, or the server is lost."""
    if outcome.status != "ok":
        return
    root, cause = source.location, ""
    while outcome.attempts < source.fetch_attempts and not (outcome.attempts and patience.is_lost):
        if outcome.attempts:
            longest = min(_FIRST_PAUSE_SECONDS * 2 ** (outcome.attempts - 1), _MAX_PAUSE_SECONDS)
            time.sleep(random.uniform(0, longest))
        outcome.attempts += 1
        try:
            outcome.data = fs.cat_file(root.locate(outcome.path))
            return patience.note(is_read=True)
        except FileNotFoundError:
            return outcome.fail("missing", "the file was listed, but is not there any more")
        except DamageError as error:
            return outcome.fail("unreadable", str(error))
        except MemoryError:
            raise
        except Exception as error:
            # File systems raise OSError, but also their clients' own exceptions; whichever it is, only this image is concerned.
            cause = explain_aws_error(error) or " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, PermissionError):
                break
            patience.note(is_read=False)
    outcome.fail("unreachable", hide_secrets(f"cannot read {root.child(outcome.path).url}: {cause}"))


def _decode(batch: list[Outcome], source: ImageSource, input_px: int) -> tuple[list[int], npt.NDArray[np.uint8]]:
    """Decode a batch; gives the places and the pixels of the images that are well."""
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
