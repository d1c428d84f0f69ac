"""Explore the images of one partition on a worker: rows about each image, sums over each class, and thumbnails."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image

from fruitdask.cluster.scheduling import let_next_begin
from fruitdask.core.partition import Partition
from fruitdask.core.storage import Location, explained
from fruitdask.store import open_thumbnails
from fruitdask.worker.fetch import Batch, ImageSource, Outcome, Stopwatch, read_batches
from fruitdask.worker.images import read_header
from fruitdask.worker.metadata import KINDS, find_metadata

#: Colours are counted in 8 x 8 x 8 bins of 32 levels per channel.
COLOUR_LEVELS = 8
#: A pixel has the colour of the background if no channel is further from it, in byte levels.
_BACKGROUND_LEVELS = 24
#: An image has a background if this share of its edge has one colour, and if no more than that share of the image is
#: background.
_MIN_EDGE, _MAX_BACKGROUND = 0.8, 0.98


@dataclass(frozen=True)
class ExploreJob:
    """What a task needs besides its partition; picklable and small."""

    source: ImageSource
    #: The output folder, which already holds the array of thumbnails.
    output: Location
    #: Side to which images are resized for comparison.
    input_px: int
    thumbnail_px: int


@dataclass(eq=False)
class ClassSums:
    """Exact integer sums over images of a class; those of disjoint sets of images add up."""

    n_images: int
    #: Sum of the pixels (0 to 255), shape (px, px, 3); uint32 for one batch, int64 after adding.
    pixels: npt.NDArray[np.integer[Any]]
    #: Sum of the squares of all pixel values.
    squares: int
    #: Sum of the thumbnails, shape (thumbnail_px, thumbnail_px, 3), int64.
    thumbnails: npt.NDArray[np.int64]
    #: Histogram of the thumbnails' colours without the background, shape (512,), int64; red varies slowest.
    colours: npt.NDArray[np.int64]

    @classmethod
    def measure(cls, pixels: npt.NDArray[np.uint8], thumbnails: npt.NDArray[np.uint8]) -> Self:
        """Sum images of shape (n, px, px, 3) and their thumbnails."""
        # About 64 x 64 pixels tell the colours of an image as well as more do.
        step = max(1, thumbnails.shape[1] // 64)
        sampled = thumbnails[:, ::step, ::step]
        levels = (sampled // (256 // COLOUR_LEVELS))[~find_background(sampled)].astype(np.int64)
        flat = pixels.reshape(-1).astype(np.float64)
        return cls(
            n_images=len(pixels),
            # Enough for 16 million images, at half the size for the way to the client.
            pixels=pixels.sum(axis=0, dtype=np.uint32),
            # Exact: a batch's sum of squares stays far below 2**53.
            squares=int(flat @ flat),
            thumbnails=thumbnails.sum(axis=0, dtype=np.int64),
            colours=np.bincount(levels @ [COLOUR_LEVELS**2, COLOUR_LEVELS, 1], minlength=COLOUR_LEVELS**3),
        )

    def add(self, other: "ClassSums") -> None:
        """Add the sums of other images."""
        self.n_images += other.n_images
        self.pixels = np.add(self.pixels, other.pixels, dtype=np.int64)
        self.squares += other.squares
        self.thumbnails += other.thumbnails
        self.colours += other.colours


def find_background(thumbnails: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Return a mask, (n, px, px), of the pixels that look like the edge of their image, where that has one colour.

    A photograph whose edge has several colours has no background here, and neither has one that is all of one colour.
    """
    n, px = thumbnails.shape[:2]
    rows, columns = thumbnails[:, [0, -1]], thumbnails[:, :, [0, -1]]
    edge = np.concatenate([rows, columns.swapaxes(1, 2)], axis=1).reshape(n, 4 * px, 3)
    usual = np.median(edge, axis=1).astype(np.int16)[:, np.newaxis]
    on_edge, inside = (
        (np.abs(pixels - usual) <= _BACKGROUND_LEVELS).all(axis=2) for pixels in (edge, thumbnails.reshape(n, px**2, 3))
    )
    has_background = (on_edge.mean(axis=1) >= _MIN_EDGE) & (inside.mean(axis=1) <= _MAX_BACKGROUND)
    return np.asarray((inside & has_background[:, np.newaxis]).reshape(thumbnails.shape[:3]))


def add_sums(total: dict[str, ClassSums], more: Mapping[str, ClassSums]) -> None:
    """Add sums class by class."""
    for label, sums in more.items():
        if label in total:
            total[label].add(sums)
        else:
            total[label] = sums


@dataclass(frozen=True, eq=False)
class Findings:
    """The results of a task, without pixels of single images, as they go to the client."""

    #: Catalog row of the partition's first image.
    start: int
    images: pd.DataFrame
    #: Sums by class.
    sums: dict[str, ClassSums]


class Explorer:
    """Explores the images of a partition batch by batch."""

    def __init__(self, partition: Partition, job: ExploreJob) -> None:
        self._partition = partition
        self._job = job
        self._rows: list[dict[str, Any]] = []
        self._sums: dict[str, ClassSums] = {}
        px = job.thumbnail_px
        self._thumbnails = np.zeros((len(partition.paths), px, px, 3), np.uint8)

    def add(self, batch: Batch) -> None:
        """Explore a batch."""
        described = [_describe_file(outcome) for outcome in batch.outcomes]
        thumbnails = self._thumbnails[batch.start : batch.start + len(batch.outcomes)]
        for row, pixels in zip(batch.rows, batch.pixels, strict=True):
            image = Image.fromarray(pixels)
            thumbnails[row] = np.asarray(image.resize(thumbnails.shape[1:3], Image.Resampling.BOX))
            described[row] |= _describe_look(image, thumbnails[row])
        self._rows += described
        labels = np.array([batch.outcomes[row].label for row in batch.rows], object)
        for label in dict.fromkeys(labels):
            is_label = labels == label
            sums = ClassSums.measure(batch.pixels[is_label], thumbnails[batch.rows][is_label])
            add_sums(self._sums, {label: sums})

    def finish(self) -> Findings:
        """Store the thumbnails and return the findings."""
        rows = slice(self._partition.start, self._partition.start + len(self._thumbnails))
        with explained(self._job.output, "write thumbnails to"):
            open_thumbnails(self._job.output, mode="r+")[rows] = self._thumbnails
        return Findings(self._partition.start, pd.DataFrame(self._rows, columns=list(_EMPTY)), self._sums)


def explore_partition(partition: Partition, job: ExploreJob) -> Findings:
    """Explore the images of a partition and store their thumbnails."""
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
