"""Compare the explored images of each class on workers: first by blocks of classes, then by partitions."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fruitdask.core.partition import ClassBlock, Partition
from fruitdask.store import Workspace
from fruitdask.store.exploration import open_means
from fruitdask.worker.sums import ClassSums, format_palette, mean_squared_difference


@dataclass(frozen=True)
class CompareJob:
    """The input of a task in addition to its classes or its partition; picklable and small."""

    workspace: Workspace
    #: Scale of differences, as in `explore.scale`.
    scale: str
    #: All classes in alphabetical order; a class's position is its code.
    labels: tuple[str, ...]


@dataclass(frozen=True)
class ClassFacts:
    """Facts about a class that follow from its sums."""

    code: int
    #: Readable images.
    n_ok: int
    mean_squared_difference: float
    palette: str


@dataclass(frozen=True, eq=False)
class Distances:
    """Distances of the images of a partition from the mean images of their classes."""

    #: Catalog row of the partition's first image.
    start: int
    #: Mean squared differences, shape (n,), float64, in byte levels; NaN for an unreadable image.
    distances: npt.NDArray[np.float64]


def compare_classes(block: ClassBlock, job: CompareJob) -> list[ClassFacts]:
    """Add up the sums of some classes, and write their mean images."""
    totals: dict[int, ClassSums] = {}
    codes = iter(block.codes)
    for records in job.workspace.read_sums(block.pieces):
        for record, code in zip(records, codes, strict=False):
            if record["n_images"]:
                _add(totals, code, ClassSums.read(record))
    means = open_means(job.workspace.output)
    return [_describe_class(code, totals.get(code), job, means) for code in range(block.start, block.stop)]


def measure_distances(partition: Partition, job: CompareJob) -> Distances:
    """Measure the distances of a partition's images from the mean images of their classes."""
    records = job.workspace.read_thumbnails([(partition.index, 0, len(partition.paths))])
    distances = np.full(len(records), np.nan)
    labels = np.array(partition.labels, object)
    for code in np.flatnonzero(np.isin(np.array(job.labels, object), list(set(partition.labels)))):
        rows = np.flatnonzero((labels == job.labels[code]) & records["is_readable"])
        mean = job.workspace.read_mean(int(code)) if len(rows) else None
        for row in rows:
            distances[row] = np.mean((records["pixels"][row] - mean) ** 2)
    return Distances(partition.start, distances)


def _add(totals: dict[int, ClassSums], code: int, sums: ClassSums) -> None:
    """Add sums to those of a class."""
    if code in totals:
        totals[code].add(sums)
    else:
        totals[code] = sums


def _describe_class(code: int, sums: ClassSums | None, job: CompareJob, means: Any) -> ClassFacts:
    """Describe a class, and write its mean image; that of a class without readable images is white."""
    if sums is None:
        means[code] = 255
        return ClassFacts(code, 0, float("nan"), "")
    mean = sums.thumbnails / sums.n_images
    job.workspace.write_mean(code, mean)
    means[code] = np.rint(mean).astype(np.uint8)
    difference = mean_squared_difference(sums, scale=job.scale)
    return ClassFacts(code, sums.n_images, difference, format_palette(sums.colours))
