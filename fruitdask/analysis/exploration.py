"""Combine the findings of tasks: differences within classes, typical images, colours, duplicates, counts."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask.analysis.duplicates import group_duplicates, group_near_duplicates
from fruitdask.core.config import ExploreConfig
from fruitdask.core.partition import Partition
from fruitdask.core.storage import Location, explained
from fruitdask.store import open_thumbnails
from fruitdask.store.catalog import sample_evenly
from fruitdask.store.exploration import Exploration
from fruitdask.worker.explore import COLOUR_LEVELS, ClassSums, Findings, add_sums
from fruitdask.worker.metadata import KINDS

#: Byte levels per unit of each scale.
_LEVELS_PER_UNIT = {"signed": 127.5, "unit": 255.0, "bytes": 1.0}
_QUANTILES = (0.05, 0.5, 0.95)
#: Fewer pairs have no meaningful quantiles.
_MIN_PAIRS = 10
#: Images per class whose pairs give the quantiles: 19,900 pairs.
_MAX_PAIRED = 200
_PALETTE_COLOURS = 6
_COLOURS = ("red", "green", "blue")


@dataclass(frozen=True, eq=False)
class Reference:
    """The mean images from which a second pass, over the thumbnails, measures distances."""

    #: The output folder, which holds the thumbnails.
    output: Location
    #: Mean thumbnail of each class, float64, 0 to 255.
    means: Mapping[str, npt.NDArray[np.float64]]
    #: Catalog rows whose thumbnails to keep, ascending, int64.
    kept_rows: npt.NDArray[np.int64]
    unreadable_rows: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Distances:
    """Distances of the images of a partition from the mean images of their classes."""

    #: Catalog row of the partition's first image.
    start: int
    #: Mean squared differences, shape (n,), float64, in byte levels; NaN for an unreadable image.
    distances: npt.NDArray[np.float64]
    #: Catalog rows of the thumbnails.
    rows: npt.NDArray[np.int64]
    thumbnails: npt.NDArray[np.uint8]


class Accumulator:
    """Accumulates the findings of tasks in any order."""

    def __init__(self) -> None:
        self._images: dict[int, pd.DataFrame] = {}
        self.sums: dict[str, ClassSums] = {}

    def add(self, findings: Findings) -> None:
        """Add the findings of a task."""
        self._images[findings.start] = findings.images
        add_sums(self.sums, findings.sums)

    def __contains__(self, partition: Partition) -> bool:
        """Whether the findings of a partition have been added."""
        return partition.start in self._images

    @property
    def images(self) -> pd.DataFrame:
        """Rows of all images in the order of the catalog."""
        images = pd.concat([self._images[start] for start in sorted(self._images)], ignore_index=True)
        looks = dict.fromkeys((*(f"mean_{colour}" for colour in _COLOURS), "contrast", "sharpness"), np.float32)
        return images.astype({"width_px": "Int32", "height_px": "Int32", **looks})

    def build_reference(self, images: pd.DataFrame, config: ExploreConfig, output: Location) -> Reference:
        """Build the reference for the second pass."""
        is_readable = (images["perceptual_hash"] != "").to_numpy()
        chosen = sample_evenly(images[is_readable], config.max_thumbnails)
        return Reference(
            output,
            means={label: sums.thumbnails / sums.n_images for label, sums in self.sums.items()},
            kept_rows=np.flatnonzero(is_readable)[chosen],
            unreadable_rows=np.flatnonzero(~is_readable),
        )


def measure_partition(partition: Partition, reference: Reference) -> Distances:
    """Measure the distances of a partition's images from the mean images of their classes."""
    rows = np.arange(partition.start, partition.start + len(partition.paths))
    thumbnails = _read_thumbnails(reference.output, rows)
    distances = pd.Series(np.nan, index=rows)
    for row in np.setdiff1d(rows, reference.unreadable_rows):
        thumbnail, label = thumbnails[row - rows[0]], partition.labels[row - rows[0]]
        distances[row] = np.mean((thumbnail - reference.means[label]) ** 2)
    kept = np.intersect1d(rows, reference.kept_rows)
    return Distances(partition.start, np.asarray(distances, np.float64), kept, thumbnails[kept - rows[0]])


def mean_squared_difference(sums: ClassSums, *, scale: str = "signed") -> float:
    """Compute the mean squared difference over all unordered pairs of images of a class, without visiting the pairs.

    For vectors x_1 ... x_n,

        sum over i < j of |x_i - x_j|^2  =  n * sum over i of |x_i|^2  -  |sum over i of x_i|^2,

    because the square, written out over all i and j, contains each unordered pair twice. Both sums are integers, so the
    result is exact up to one rounding. It is twice the unbiased variance, averaged over pixels and channels.
    """
    n = sums.n_images
    if n < 2:
        return float("nan")
    over_pairs = n * sums.squares - _square(sums.pixels.ravel().astype(np.int64))
    return float(over_pairs / (n * (n - 1) // 2) / sums.pixels.size / _LEVELS_PER_UNIT[scale] ** 2)


def _square(vector: npt.NDArray[np.int64]) -> int:
    """Compute the exact scalar product of a vector of counts with itself, which may need more than 64 bits."""
    # Sums over images of up to 2**40 have halves of 20 bits, and those of a million values do not overflow.
    high, low = np.divmod(vector, 1 << 20)
    return (int(high @ high) << 40) + (int(high @ low) << 21) + int(low @ low)


def summarize_findings(
    found: Accumulator,
    images: pd.DataFrame,
    measured: Iterable[Distances],
    *,
    reference: Reference,
    config: ExploreConfig,
    described: dict[str, Any],
) -> Exploration:
    """Summarize the findings and distances of all partitions."""
    parts = sorted(measured, key=lambda part: part.start)
    rows = np.concatenate([part.rows for part in parts])
    thumbnails = np.concatenate([part.thumbnails for part in parts])
    distances = np.concatenate([part.distances for part in parts])
    members_of = {str(label): np.asarray(rows) for label, rows in images.groupby("label").indices.items()}
    described_classes, means = {}, []
    for label in sorted(members_of):
        members, sums = members_of[label], found.sums.get(label)
        difference = float("nan") if sums is None else mean_squared_difference(sums, scale=config.scale)
        factor = _scale_distances(distances[members], difference, scale=config.scale)
        distances[members] *= factor
        pairs = _measure_pairs(thumbnails[np.isin(rows, members)]) * factor
        described_classes[label] = (
            {"palette": "" if sums is None else _format_palette(sums.colours), "mean_squared_difference": difference}
            | _describe_distances(distances[members], pairs)
            | _find_typical(images["path"], members, distances)
        )
        means.append(_round_mean(sums, thumbnails.shape[1:]))
    images = images.assign(
        distance_to_mean=distances,
        duplicate_group=group_duplicates(images["content_hash"]),
        near_duplicate_group=group_near_duplicates(images["perceptual_hash"], max_bits=config.near_duplicate_bits),
    )
    classes = pd.concat([_count_files(images), pd.DataFrame.from_dict(described_classes, orient="index")], axis=1)
    summary = described | {
        "n_images": len(images),
        "n_ok": int((images["perceptual_hash"] != "").sum()),
        "scale": config.scale,
        "near_duplicate_bits": config.near_duplicate_bits,
        "duplicates": _count_groups(images, "duplicate_group"),
        "near_duplicates": _count_groups(images, "near_duplicate_group"),
        "metadata": {kind: int(images[f"has_{kind}"].sum()) for kind in KINDS},
    }
    is_typical = images["path"].isin([*classes["most_typical"], *classes["least_typical"]])
    more = np.setdiff1d(np.flatnonzero(is_typical), rows)
    order = np.argsort(np.concatenate([rows, more]))
    return Exploration(
        images=images.astype({"distance_to_mean": np.float32}),
        classes=classes.rename_axis("label"),
        thumbnail_rows=np.concatenate([rows, more])[order],
        thumbnails=np.concatenate([thumbnails, _read_thumbnails(reference.output, more)])[order],
        means=np.stack(means),
        summary=summary,
    )


def _read_thumbnails(output: Location, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Read the thumbnails of some catalog rows."""
    with explained(output, "read thumbnails from", remedy="explore again"):
        return np.asarray(open_thumbnails(output, mode="r").oindex[rows], np.uint8)


def _scale_distances(distances: npt.NDArray[np.float64], difference: float, *, scale: str) -> float:
    """Find the factor from squared levels of thumbnails to the scale's unit at full size.

    Thumbnails are smooth, so they differ less. The factor makes the mean over all pairs, which is 2 / (n - 1) times the
    sum of the distances from the mean, equal to its exact value, `difference`.
    """
    of_thumbnails = 2 * np.nansum(distances) / max(1, np.isfinite(distances).sum() - 1)
    if np.isnan(difference) or of_thumbnails == 0:
        return 1 / _LEVELS_PER_UNIT[scale] ** 2
    return float(difference / of_thumbnails)


def _measure_pairs(thumbnails: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Measure the mean squared difference, in byte levels, of each pair of a sample of thumbnails."""
    from scipy.spatial.distance import pdist

    # A regular sample, as consecutive images are often alike.
    chosen = thumbnails[:: max(1, -(-len(thumbnails) // _MAX_PAIRED))]
    flat = chosen.reshape(len(chosen), int(np.prod(thumbnails.shape[1:])))
    return np.asarray(pdist(flat, "sqeuclidean") / flat.shape[1])


def _count_files(images: pd.DataFrame) -> pd.DataFrame:
    """Count and measure the files of each class."""
    numbers = pd.DataFrame(
        {
            "n_ok": images["perceptual_hash"] != "",
            "bytes": images["bytes"],
            **{side: images[side].astype(float) for side in ("width_px", "height_px")},
            "n_duplicates": images["duplicate_group"].notna(),
            "n_near_duplicates": images["near_duplicate_group"].notna(),
            **{f"n_{kind}": images[f"has_{kind}"] for kind in KINDS},
            **{f"mean_{colour}": images[f"mean_{colour}"].astype(float) for colour in _COLOURS},
        }
    ).groupby(images["label"])
    counts = ("n_duplicates", "n_near_duplicates", *(f"n_{kind}" for kind in KINDS))
    return pd.DataFrame(
        {
            "n_images": numbers.size(),
            "n_ok": numbers["n_ok"].sum(),
            "bytes_total": numbers["bytes"].sum(),
            **{f"{name}_median": numbers[name].median() for name in ("bytes", "width_px", "height_px")},
            **{name: numbers[name].sum() for name in counts},
            **{f"mean_{colour}": numbers[f"mean_{colour}"].mean() for colour in _COLOURS},
        }
    )


def _describe_distances(distances: npt.NDArray[np.float64], pairs: npt.NDArray[np.float64]) -> dict[str, float]:
    """Describe how much the images of a class differ."""
    known = distances[np.isfinite(distances)]
    quantiles = np.quantile(pairs, _QUANTILES) if len(pairs) >= _MIN_PAIRS else np.full(len(_QUANTILES), np.nan)
    n = len(known)
    return {
        # The mean over pairs is a U-statistic (Hoeffding 1948): its variance is 4 / n times that of an image's mean
        # difference from the others, which is n / (n - 1) times its distance from the mean, plus a constant.
        "standard_error": float(2 * n / (n - 1) * known.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan"),
        **{f"pair_q{quantile * 100:02.0f}": float(q) for quantile, q in zip(_QUANTILES, quantiles, strict=True)},
    }


def _find_typical(
    paths: pd.Series, members: npt.NDArray[np.intp], distances: npt.NDArray[np.float64]
) -> dict[str, str]:
    """Find the images of a class that are nearest to its mean image and farthest from it; empty if none is readable."""
    known = members[np.isfinite(distances[members])]
    if not len(known):
        return {"most_typical": "", "least_typical": ""}
    nearest, farthest = known[distances[known].argmin()], known[distances[known].argmax()]
    return {"most_typical": str(paths.iloc[nearest]), "least_typical": str(paths.iloc[farthest])}


def _format_palette(colours: npt.NDArray[np.int64]) -> str:
    """Format the centres and shares of the most frequent bins of colours."""
    step = 256 // COLOUR_LEVELS
    most = [index for index in np.argsort(-colours, kind="stable")[:_PALETTE_COLOURS] if colours[index]]
    centres = [np.array(np.unravel_index(index, (COLOUR_LEVELS,) * 3)) * step + step // 2 for index in most]
    shares = colours[most] / colours.sum()
    return ", ".join(f"#{r:02x}{g:02x}{b:02x} {share:.3f}" for (r, g, b), share in zip(centres, shares, strict=True))


def _round_mean(sums: ClassSums | None, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Round the mean thumbnail of a class to bytes; white if the class has none."""
    if sums is None:
        return np.full(shape, 255, np.uint8)
    return np.asarray(np.rint(sums.thumbnails / sums.n_images), np.uint8)


def _count_groups(images: pd.DataFrame, column: str) -> dict[str, int]:
    """Count groups of duplicates, their images, and the groups across several classes."""
    grouped = images.dropna(subset=column).groupby(column)["label"]
    return {
        "n_groups": int(grouped.ngroups),
        "n_images": int(grouped.size().sum()),
        "n_groups_across_classes": int((grouped.nunique() > 1).sum()),
    }
