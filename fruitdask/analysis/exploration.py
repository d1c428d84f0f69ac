"""Combine what an exploration found about each image: differences within classes, duplicates, counts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask.analysis.duplicates import group_duplicates, group_near_duplicates
from fruitdask.core.partition import ClassBlock
from fruitdask.worker.compare import ClassFacts
from fruitdask.worker.metadata import KINDS
from fruitdask.worker.sums import LEVELS_PER_UNIT

#: The columns of the rows of images that are combined.
NUMBERS = (
    *("bytes", "width_px", "height_px"),
    *(f"has_{kind}" for kind in KINDS),
    *("mean_red", "mean_green", "mean_blue"),
)
_QUANTILES = (0.05, 0.5, 0.95)
#: Fewer pairs have no meaningful quantiles.
_MIN_PAIRS = 10
#: Images per class whose pairs give the quantiles: 19,900 pairs.
_MAX_PAIRED = 200
_SUMMED = tuple(f"has_{kind}" for kind in KINDS)
_MEANS = ("mean_red", "mean_green", "mean_blue")
#: Most bytes of the sums over any 512 images in a row: the size at which images are compared is halved ...
_MAX_SUMS_BYTES, _IMAGES_TOGETHER = 64_000_000, 512
#: ... until they fit, but not below this side.
_MIN_COMPARED_PX = 16
#: The most sums (each of one class in one partition) that a task adds up, unless it has a single class, ...
_SUMS_PER_BLOCK = 1_024
#: ... and the most bytes of its totals, unless it has a single class.
_TOTAL_BYTES = 64_000_000


def choose_compared_px(codes: npt.NDArray[np.integer[Any]], input_px: int) -> int:
    """Choose the side at which images are compared: the network's, or less if the sums would fill the memory, because
    many classes alternate; `codes` are the classes of the images in the order of the catalog.
    """
    starts = range(0, len(codes), _IMAGES_TOGETHER)
    n_classes = max(len(np.unique(codes[start : start + _IMAGES_TOGETHER])) for start in starts)
    px = input_px
    while n_classes * px**2 * 3 * 4 > _MAX_SUMS_BYTES and px // 2 >= _MIN_COMPARED_PX:
        px //= 2
    return px


def plan_comparison(
    codes: npt.NDArray[np.integer[Any]], n_classes: int, *, images_per_partition: int, total_bytes: int
) -> list[ClassBlock]:
    """Divide classes into blocks of a bounded number of sums; `codes` are those of all images, in the order of the
    catalog, and `total_bytes` what the sums of one class take.
    """
    pairs = np.unique(np.arange(len(codes)) // images_per_partition * n_classes + codes)
    partitions, held = np.divmod(pairs, n_classes)
    # The position of each class among those of its partition.
    places = np.arange(len(pairs)) - np.searchsorted(partitions, partitions)
    n_sums, blocks, start = np.bincount(held, minlength=n_classes), list[ClassBlock](), 0
    for code in range(n_classes):
        is_full = n_sums[start : code + 1].sum() > _SUMS_PER_BLOCK or (code + 1 - start) * total_bytes > _TOTAL_BYTES
        if is_full and code > start:
            blocks.append(_describe_block(len(blocks), start, code, partitions, held, places))
            start = code
    return [*blocks, _describe_block(len(blocks), start, n_classes, partitions, held, places)]


def _describe_block(
    index: int,
    start: int,
    stop: int,
    partitions: npt.NDArray[np.int64],
    held: npt.NDArray[np.int64],
    places: npt.NDArray[np.int64],
) -> ClassBlock:
    """Describe where the sums of a range of classes are."""
    chosen = np.flatnonzero((held >= start) & (held < stop))
    # Classes that follow each other do so in each partition too.
    firsts = chosen[np.flatnonzero(np.diff(partitions[chosen], prepend=-1))]
    counts = np.diff(np.searchsorted(chosen, firsts), append=len(chosen))
    pieces = zip(partitions[firsts].tolist(), places[firsts].tolist(), (places[firsts] + counts).tolist(), strict=True)
    return ClassBlock(index, start, stop, tuple(pieces), tuple(held[chosen].tolist()))


@dataclass(frozen=True, eq=False)
class ImageNumbers:
    """Numbers about all images, in the order of the catalog: 20 bytes per image."""

    #: Codes of their classes, int32.
    codes: npt.NDArray[np.int32]
    #: int64.
    bytes: npt.NDArray[np.int64]
    #: Sizes in pixels, shape (n, 2), int32; 0 where they are not known.
    sides: npt.NDArray[np.int32]
    #: Sums over the images of each class, by column.
    sums: dict[str, npt.NDArray[np.float64]]

    @classmethod
    def allocate(cls, codes: npt.NDArray[np.int32], n_classes: int) -> "ImageNumbers":
        """Make room for the numbers of images."""
        n = len(codes)
        sums = {name: np.zeros(n_classes) for name in (*_SUMMED, *_MEANS)}
        return cls(codes, np.zeros(n, np.int64), np.zeros((n, 2), np.int32), sums)

    def fill(self, start: int, table: Any) -> int:
        """Fill in the numbers of some images from an Arrow table of `NUMBERS`; returns the row after the last."""
        rows = slice(start, start + table.num_rows)
        self.bytes[rows] = table["bytes"].to_numpy()
        for column, name in enumerate(("width_px", "height_px")):
            self.sides[rows, column] = table[name].fill_null(0).to_numpy()
        for name, total in self.sums.items():
            values = np.nan_to_num(table[name].to_numpy().astype(np.float64))
            total += np.bincount(self.codes[rows], values, len(total))
        return start + int(table.num_rows)


def parse_hashes(column: Any, *, n_bits: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """Parse an Arrow column of hashes in hexadecimal digits, of `n_bits` bits or empty.

    Returns shape (n, n_bits // 64), uint64, and which rows have a hash.

    >>> import pyarrow
    >>> numbers, is_known = parse_hashes(pyarrow.array(["00000000000000ff", "", "00000000000000fe"]), n_bits=64)
    >>> numbers.tolist(), is_known.tolist()
    ([[255], [0], [254]], [True, False, True])
    """
    import pyarrow.compute

    is_known = np.asarray(pyarrow.compute.utf8_length(column), np.int64) > 0
    digits = "".join(column.filter(pyarrow.array(is_known)).to_pylist())
    numbers = np.zeros((len(is_known), n_bits // 64), np.uint64)
    numbers[is_known] = np.frombuffer(bytes.fromhex(digits), ">u8").reshape(-1, n_bits // 64)
    return numbers, is_known


@dataclass(frozen=True, eq=False)
class Groups:
    """Groups of duplicates by image, int32; -1 for images without any."""

    duplicates: npt.NDArray[np.int32]
    near_duplicates: npt.NDArray[np.int32]

    @classmethod
    def find(
        cls,
        read_hashes: Callable[[str, int], npt.NDArray[np.uint64]],
        is_readable: npt.NDArray[np.bool_],
        *,
        max_bits: int,
    ) -> "Groups":
        """Find the groups; `read_hashes` reads a column of hashes with a number of bits, which takes much memory."""
        contents = read_hashes("content_hash", 256)
        duplicates = group_duplicates(contents, (contents != 0).any(axis=1))
        del contents
        near = group_near_duplicates(read_hashes("perceptual_hash", 64)[:, 0], is_readable, max_bits=max_bits)
        return cls(duplicates, near)

    def count(self, codes: npt.NDArray[np.int32]) -> dict[str, dict[str, int]]:
        """Count the groups of each kind."""
        return {name: _count_groups(getattr(self, name), codes) for name in ("duplicates", "near_duplicates")}


def describe_classes(
    numbers: ImageNumbers,
    distances: npt.NDArray[np.float64],
    groups: Groups,
    facts: Sequence[ClassFacts],
    *,
    labels: Sequence[str],
    scale: str,
    sampled_rows: npt.NDArray[np.int64],
    read_thumbnails: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.uint8]],
) -> pd.DataFrame:
    """Describe the classes, and scale the distances of their images in place to the unit of `scale`.

    The most and least typical images are given by their rows, not by their paths; -1 where no image is readable.
    """
    order = np.argsort(numbers.codes, kind="stable")
    ends = np.cumsum(np.bincount(numbers.codes, minlength=len(labels)))
    rows = []
    for fact, end, n_images in zip(facts, ends, np.diff(ends, prepend=0), strict=True):
        members = order[end - n_images : end]
        differences = fact.mean_squared_difference
        factor = _scale_distances(distances[members], differences, scale=scale)
        distances[members] *= factor
        pairs = _measure_pairs(read_thumbnails(_choose_paired(sampled_rows, members))) * factor
        rows.append(
            _count_files(numbers, members, groups, fact)
            | {"palette": fact.palette, "mean_squared_difference": differences}
            | _describe_distances(distances[members], pairs)
            | _find_typical(members, distances)
        )
    return pd.DataFrame(rows, index=pd.Index(labels, name="label"))


def _choose_paired(sampled_rows: npt.NDArray[np.int64], members: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Choose images of a class from a sample of all."""
    chosen = np.intersect1d(sampled_rows, members, assume_unique=True)
    # A regular sample, as consecutive images are often alike.
    return chosen[:: max(1, -(-len(chosen) // _MAX_PAIRED))]


def _scale_distances(distances: npt.NDArray[np.float64], difference: float, *, scale: str) -> float:
    """Find the factor from squared levels of thumbnails to the scale's unit at full size.

    Thumbnails are smooth, so they differ less. The factor makes the mean over all pairs, which is 2 / (n - 1) times the
    sum of the distances from the mean, equal to its exact value, `difference`.
    """
    of_thumbnails = 2 * np.nansum(distances) / max(1, np.isfinite(distances).sum() - 1)
    if np.isnan(difference) or of_thumbnails == 0:
        return 1 / LEVELS_PER_UNIT[scale] ** 2
    return float(difference / of_thumbnails)


def _measure_pairs(thumbnails: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Measure the mean squared difference, in byte levels, of each pair of thumbnails."""
    from scipy.spatial.distance import pdist

    flat = thumbnails.reshape(len(thumbnails), int(np.prod(thumbnails.shape[1:])))
    return np.asarray(pdist(flat, "sqeuclidean") / flat.shape[1])


def _count_files(
    numbers: ImageNumbers, members: npt.NDArray[np.int64], groups: Groups, fact: ClassFacts
) -> dict[str, Any]:
    """Count and measure the files of a class."""
    sides = numbers.sides[members]
    sides = sides[sides[:, 0] > 0].astype(np.float64)
    # Files that are missing have no size. The median of none is a warning.
    n_bytes = numbers.bytes[members][numbers.bytes[members] > 0]
    width, height = np.median(sides, axis=0) if len(sides) else (np.nan, np.nan)
    return {
        "n_images": len(members),
        "n_ok": fact.n_ok,
        "bytes_total": int(numbers.bytes[members].sum()),
        "bytes_median": float(np.median(n_bytes)) if len(n_bytes) else np.nan,
        "width_px_median": float(width),
        "height_px_median": float(height),
        "n_duplicates": int((groups.duplicates[members] >= 0).sum()),
        "n_near_duplicates": int((groups.near_duplicates[members] >= 0).sum()),
        **{f"n_{kind}": int(numbers.sums[f"has_{kind}"][fact.code]) for kind in KINDS},
        **{name: numbers.sums[name][fact.code] / fact.n_ok if fact.n_ok else np.nan for name in _MEANS},
    }


def _describe_distances(distances: npt.NDArray[np.float64], pairs: npt.NDArray[np.float64]) -> dict[str, float]:
    """Describe how much the images of a class differ."""
    known = distances[np.isfinite(distances)]
    quantiles = np.quantile(pairs, _QUANTILES) if len(pairs) >= _MIN_PAIRS else np.full(len(_QUANTILES), np.nan)
    n = len(known)
    return {
        # The mean over pairs is a U-statistic (Hoeffding 1948): its variance is 4 / n times that of an image's mean
        # difference from the others, which is n / (n - 1) times its distance from the mean, plus a constant. Two images
        # are always at the same distance from their mean, and their single pair says nothing about its error.
        "standard_error": float(2 * n / (n - 1) * known.std(ddof=1) / np.sqrt(n)) if n > 2 else float("nan"),
        **{f"pair_q{quantile * 100:02.0f}": float(q) for quantile, q in zip(_QUANTILES, quantiles, strict=True)},
    }


def _find_typical(members: npt.NDArray[np.int64], distances: npt.NDArray[np.float64]) -> dict[str, int]:
    """Find the images of a class that are nearest to its mean image and farthest from it; -1 if none is readable."""
    known = members[np.isfinite(distances[members])]
    if not len(known):
        return {"most_typical": -1, "least_typical": -1}
    return {
        "most_typical": int(known[distances[known].argmin()]),
        "least_typical": int(known[distances[known].argmax()]),
    }


def _count_groups(groups: npt.NDArray[np.int32], codes: npt.NDArray[np.int32]) -> dict[str, int]:
    """Count groups of duplicates, their images, and the groups across several classes."""
    rows = np.flatnonzero(groups >= 0)
    rows = rows[np.lexsort((codes[rows], groups[rows]))]
    numbers, labels = groups[rows], codes[rows]
    is_across = (numbers[1:] == numbers[:-1]) & (labels[1:] != labels[:-1])
    return {
        "n_groups": int(groups.max(initial=-1)) + 1,
        "n_images": len(rows),
        "n_groups_across_classes": len(np.unique(numbers[1:][is_across])),
    }
