"""Looking at the images of one partition, on a worker: rows about each image, sums over each class, a thumbnail of each."""

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

#: Colours are counted in cubes of 32 levels a channel: 8 x 8 x 8 of them.
COLOUR_LEVELS = 8


@dataclass(frozen=True)
class ExploreJob:
    """What a task needs to know besides its partition; picklable and small."""

    #: Where images are and how to read them.
    source: ImageSource
    #: The output folder, where the array of thumbnails exists.
    output: Location
    #: Side to which images are resized for comparing, in pixels.
    input_px: int
    thumbnail_px: int


@dataclass(eq=False)
class ClassSums:
    """Sums over images of a class, exact integers; those of disjoint sets of images add up."""

    n_images: int
    #: Sum of their pixels, shape (px, px, 3), of values 0 to 255; uint32 of one batch, int64 once sums are added.
    pixels: npt.NDArray[np.integer[Any]]
    #: Sum of the squares of all their values.
    squares: int
    #: Sum of their thumbnails, shape (thumbnail_px, thumbnail_px, 3), int64.
    thumbnails: npt.NDArray[np.int64]
    #: Pixels of the thumbnails in each cube of colours, shape (512,), int64; red is the slowest index.
    colours: npt.NDArray[np.int64]

    @classmethod
    def measure(cls, pixels: npt.NDArray[np.uint8], thumbnails: npt.NDArray[np.uint8]) -> Self:
        """Sum some images.

        pixels: numpy.ndarray, images of shape (n, px, px, 3), uint8. thumbnails: numpy.ndarray, their thumbnails.
        """
        cubes = (thumbnails // (256 // COLOUR_LEVELS)).reshape(-1, 3).astype(np.int64)
        flat = pixels.reshape(-1).astype(np.float64)
        return cls(
            n_images=len(pixels),
            # Enough for a batch of 16 million images; the smaller type is half the size on its way to the client.
            pixels=pixels.sum(axis=0, dtype=np.uint32),
            # Exact: a batch's sum of squares stays far below 2**53.
            squares=int(flat @ flat),
            thumbnails=thumbnails.sum(axis=0, dtype=np.int64),
            colours=np.bincount(cubes @ [COLOUR_LEVELS**2, COLOUR_LEVELS, 1], minlength=COLOUR_LEVELS**3),
        )

    def add(self, other: "ClassSums") -> None:
        """Add the sums of other images."""
        self.n_images += other.n_images
        self.pixels = np.add(self.pixels, other.pixels, dtype=np.int64)
        self.squares += other.squares
        self.thumbnails += other.thumbnails
        self.colours += other.colours


def add_sums(total: dict[str, ClassSums], more: Mapping[str, ClassSums]) -> None:
    """Add sums class by class."""
    for label, sums in more.items():
        if label in total:
            total[label].add(sums)
        else:
            total[label] = sums


@dataclass(frozen=True, eq=False)
class Findings:
    """What a task found; it goes to the client, so no pixels of single images are in it."""

    #: The catalog row of the partition's first image.
    start: int
    images: pd.DataFrame
    #: Sums over the images of each class.
    sums: dict[str, ClassSums]


class Explorer:
    """Looks at the images of a partition, batch by batch."""

    def __init__(self, partition: Partition, job: ExploreJob) -> None:
        self._partition = partition
        self._job = job
        self._rows: list[dict[str, Any]] = []
        self._sums: dict[str, ClassSums] = {}
        px = job.thumbnail_px
        self._thumbnails = np.zeros((len(partition.paths), px, px, 3), np.uint8)

    def add(self, batch: Batch) -> None:
        """Look at a batch."""
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
        """Store the thumbnails and hand over the rest."""
        rows = slice(self._partition.start, self._partition.start + len(self._thumbnails))
        with explained(self._job.output, "write thumbnails to"):
            open_thumbnails(self._job.output, mode="r+")[rows] = self._thumbnails
        return Findings(self._partition.start, pd.DataFrame(self._rows, columns=list(_EMPTY)), self._sums)


def explore_partition(partition: Partition, job: ExploreJob) -> Findings:
    """Look at the images of a partition."""
    return _look(partition, job).finish()


def probe_exploration(partition: Partition, job: ExploreJob) -> None:
    """Do the same as `explore_partition` and store nothing, to see whether the process survives."""
    _look(partition, job)


def _look(partition: Partition, job: ExploreJob) -> Explorer:
    """Look at the images of a partition, batch by batch."""
    explorer = Explorer(partition, job)
    batches = read_batches(partition, job.source, input_px=job.input_px, watch=Stopwatch(), on_asked=let_next_begin)
    for batch in batches:
        explorer.add(batch)
    return explorer


#: A row about an image of which nothing is known but its name.
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
    "mean_red": np.nan,
    "mean_green": np.nan,
    "mean_blue": np.nan,
}


def _describe_file(outcome: Outcome) -> dict[str, Any]:
    """Say what a file is without decoding it: sizes, format, content hash, kinds of metadata."""
    row = _EMPTY | {name: getattr(outcome, name) for name in ("path", "label", "status", "error")}
    row["bytes"] = len(outcome.data)
    if outcome.data:
        found = find_metadata(outcome.data)
        row |= {"content_hash": hashlib.sha256(outcome.data).hexdigest()}
        row |= {f"has_{kind}": kind in found for kind in KINDS}
    header = read_header(outcome.data)
    return row if header is None else row | dict(zip(("format", "width_px", "height_px"), header, strict=True))


def _describe_look(image: Image.Image, thumbnail: npt.NDArray[np.uint8]) -> dict[str, Any]:
    """Say what an image looks like: its perceptual hash (the discrete cosine transform's, by imagehash) and its mean colour."""
    import imagehash

    red, green, blue = thumbnail.reshape(-1, 3).mean(axis=0)
    return {"perceptual_hash": str(imagehash.phash(image)), "mean_red": red, "mean_green": green, "mean_blue": blue}
