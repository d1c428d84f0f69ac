"""Explore the images of one partition on a worker: rows about each image, sums over each class, and thumbnails."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image

from fruitdask.cluster.scheduling import let_next_begin
from fruitdask.core.partition import Partition
from fruitdask.store import Workspace
from fruitdask.worker.fetch import Batch, ImageSource, Outcome, Stopwatch, read_batches
from fruitdask.worker.images import read_header
from fruitdask.worker.metadata import KINDS, find_metadata
from fruitdask.worker.sums import ClassSums


@dataclass(frozen=True)
class ExploreJob:
    """The input of a task in addition to its partition; picklable and small."""

    source: ImageSource
    #: Where it writes.
    workspace: Workspace
    #: Side to which images are resized.
    input_px: int


@dataclass(frozen=True)
class ExploredPartition:
    """The report of a task: counts, never rows or pixels."""

    index: int
    n_images: int
    #: Images that could not be read, by status.
    failures: dict[str, int]


class Explorer:
    """Explores the images of a partition batch by batch."""

    def __init__(self, partition: Partition, job: ExploreJob) -> None:
        self._partition = partition
        self._job = job
        self._rows: list[dict[str, Any]] = []
        self._places = {label: place for place, label in enumerate(sorted(set(partition.labels)))}
        self._sums = np.zeros(len(self._places), job.workspace.sums_type)
        self._thumbnails = np.zeros(len(partition.paths), job.workspace.thumbnail_type)

    def add(self, batch: Batch) -> None:
        """Explore a batch."""
        described = [_describe_file(outcome) for outcome in batch.outcomes]
        places = batch.start + np.asarray(batch.rows, np.intp)
        thumbnails = np.empty((len(places), *self._thumbnails["pixels"].shape[1:]), np.uint8)
        for row, pixels, thumbnail in zip(batch.rows, batch.pixels, thumbnails, strict=True):
            image = Image.fromarray(pixels)
            thumbnail[:] = _shrink(image, len(thumbnail))
            described[row] |= _describe_look(image, thumbnail)
        self._rows += described
        self._thumbnails["is_readable"][places], self._thumbnails["pixels"][places] = True, thumbnails
        compared = _shrink_all(batch.pixels, self._job.workspace.compared_px)
        labels = np.array([batch.outcomes[row].label for row in batch.rows], object)
        for label in dict.fromkeys(labels):
            is_label = labels == label
            ClassSums.measure(compared[is_label], thumbnails[is_label]).add_to(self._sums[self._places[label]])

    def finish(self) -> ExploredPartition:
        """Store what was found."""
        rows = pd.DataFrame(self._rows, columns=list(_EMPTY)).astype(_TYPES)
        self._job.workspace.write_partition(self._partition.index, rows, sums=self._sums, thumbnails=self._thumbnails)
        failures = Counter(rows["status"][rows["status"] != "ok"])
        return ExploredPartition(self._partition.index, len(rows), dict(failures))


def explore_partition(partition: Partition, job: ExploreJob) -> ExploredPartition:
    """Explore the images of a partition and store what was found."""
    return _explore(partition, job).finish()


def probe_exploration(partition: Partition, job: ExploreJob) -> None:
    """Explore the images of a partition without storing anything, to test whether the process survives."""
    _explore(partition, job)


def _explore(partition: Partition, job: ExploreJob) -> Explorer:
    """Explore the images of a partition batch by batch."""
    explorer, watch = Explorer(partition, job), Stopwatch()
    for batch in read_batches(partition, job.source, input_px=job.input_px, watch=watch, on_asked=let_next_begin):
        explorer.add(batch)
    return explorer


#: The row of an image before anything is known about it.
_EMPTY: dict[str, Any] = {
    "path": "",
    "label": "",
    "status": "ok",
    "error": "",
    "bytes": 0,
    "width_px": None,
    "height_px": None,
    "format": "",
    "content_hash": "",
    "perceptual_hash": "",
    **{f"has_{kind}": False for kind in KINDS},
    **{f"mean_{colour}": np.nan for colour in ("red", "green", "blue")},
    "contrast": np.nan,
    "sharpness": np.nan,
}
#: Types of columns that cannot be inferred in a partition without a readable image.
_TYPES = dict.fromkeys(("width_px", "height_px"), "Int32") | {
    name: np.float32 for name, value in _EMPTY.items() if isinstance(value, float)
}


def _shrink(image: Image.Image, px: int) -> npt.NDArray[np.uint8]:
    """Shrink an image, as the mean of the pixels that become one."""
    return np.asarray(image.resize((px, px), Image.Resampling.BOX))


def _shrink_all(pixels: npt.NDArray[np.uint8], px: int) -> npt.NDArray[np.uint8]:
    """Shrink images of shape (n, px, px, 3), if they are larger than wanted."""
    if not len(pixels) or pixels.shape[1] == px:
        return pixels
    return np.stack([_shrink(Image.fromarray(each), px) for each in pixels])


def _describe_file(outcome: Outcome) -> dict[str, Any]:
    """Describe a file without decoding it: sizes, format, content hash, kinds of metadata."""
    row = _EMPTY | {name: getattr(outcome, name) for name in ("path", "label", "status", "error")}
    row["bytes"] = len(outcome.data)
    if outcome.data:
        found = find_metadata(outcome.data)
        row |= {"content_hash": hashlib.sha256(outcome.data).hexdigest()}
        row |= {f"has_{kind}": kind in found for kind in KINDS}
    header = read_header(outcome.data)
    return row if header is None else row | dict(zip(("format", "width_px", "height_px"), header, strict=True))


def _describe_look(image: Image.Image, thumbnail: npt.NDArray[np.uint8]) -> dict[str, Any]:
    """Compute the perceptual hash (imagehash's, by discrete cosine transform), the mean colour, the contrast (standard
    deviation of the grey levels) and the sharpness (variance of their Laplacian; Pech-Pacheco et al. 2000) of an image.
    """
    import imagehash

    grey = np.asarray(image.convert("L"), np.int16)
    edges = 4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]
    return {
        "perceptual_hash": str(imagehash.phash(image)),
        **dict(zip(("mean_red", "mean_green", "mean_blue"), thumbnail.reshape(-1, 3).mean(axis=0), strict=True)),
        "contrast": grey.std(),
        "sharpness": edges.var(dtype=np.float32),
    }
