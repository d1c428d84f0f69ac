"""Reads, writes and checks the findings of an exploration."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask.core.escaping import format_csv
from fruitdask.core.listing import find_rows
from fruitdask.core.partition import VANISHED_BYTES
from fruitdask.core.storage import Location, exists
from fruitdask.errors import DamageError
from fruitdask.store.arrays import read_arrays, write_arrays
from fruitdask.store.checks import Fault, check_arrays, check_digests, describe_damage
from fruitdask.store.layout import EXPLORED_ARRAYS, EXPLORED_CLASSES, EXPLORED_IMAGES
from fruitdask.store.manifests import (
    advise_repair,
    delete_result,
    read_exploration_manifest,
    write_digested,
    write_manifest,
)
from fruitdask.store.schema import ExplorationManifest
from fruitdask.store.tables import read_table, write_table

#: A spreadsheet holds no more rows than about a million (Excel: 1,048,576).
_MAX_CSV_ROWS = 1_000_000
#: Its arrays, and their dimensions.
_DIMENSIONS = {
    "thumbnail_rows": ("thumbnail",),
    "thumbnails": ("thumbnail", "y", "x", "channel"),
    "means": ("class", "y", "x", "channel"),
}


@dataclass(frozen=True, eq=False)
class Exploration:
    """
    The findings of an exploration.

    Parameters
    ----------
    images : pandas.DataFrame
        One row per image, in the order of the catalog: ``path``, ``label``, ``status``, ``error``; ``bytes``,
        ``width_px``, ``height_px``, ``format``;
        ``content_hash`` (SHA-256), ``perceptual_hash`` (64 bits) and the groups ``duplicate_group`` and
        ``near_duplicate_group``; ``has_exif``, ``has_gps``, ``has_serial``, ``has_name``; ``mean_red``, ``mean_green``,
        ``mean_blue`` (0 to 255); ``contrast`` (standard deviation of grey levels) and ``sharpness`` (variance of their
        Laplacian) at the size of comparison; ``distance_to_mean``, the mean squared difference from the mean image of
        the class.
    classes : pandas.DataFrame
        One row per class, its label the index: counts, bytes, median sizes, colours, ``mean_squared_difference`` over
        all pairs of its images with ``standard_error`` and quantiles over pairs, the ``most_typical`` and
        ``least_typical`` image.
    thumbnail_rows : numpy.ndarray
        Rows of ``images`` that have a thumbnail, ascending, int64.
    thumbnails : numpy.ndarray
        Their thumbnails, shape (n, px, px, 3), uint8.
    means : numpy.ndarray
        The mean image of each class, shape (n_classes, px, px, 3), uint8.
    summary : dict[str, Any]
        Scale, input size, counts and seconds.
    """

    images: pd.DataFrame = field(repr=False)
    classes: pd.DataFrame = field(repr=False)
    thumbnail_rows: npt.NDArray[np.int64] = field(repr=False)
    thumbnails: npt.NDArray[np.uint8] = field(repr=False)
    means: npt.NDArray[np.uint8] = field(repr=False)
    summary: dict[str, Any]

    def _repr_html_(self) -> str:
        """Show the classes in a notebook."""
        shown = ["n_ok", "width_px_median", "height_px_median", "mean_squared_difference", "n_duplicates", "n_gps"]
        return (
            f"<p><b>exploration</b>: {self.summary['n_images']:,} images of {len(self.classes)} classes, "
            f"{self.summary['n_ok']:,} of them readable</p>{self.classes[shown].to_html(float_format='{:,.4g}'.format)}"
        )


def write_exploration(output: Location, exploration: Exploration) -> None:
    """Write the findings of an exploration; its manifest, written last, says that it is complete."""
    digests: dict[str, str] = {}
    for name, table in ((EXPLORED_IMAGES, exploration.images), (EXPLORED_CLASSES, exploration.classes.reset_index())):
        write_table(output.child(f"{name}.parquet"), table)
        delete_result(output, f"{name}.csv")
        if len(table) <= _MAX_CSV_ROWS:
            digests |= write_digested(output, f"{name}.csv", format_csv(table).encode())
    arrays = {name: (getattr(exploration, name), dimensions) for name, dimensions in _DIMENSIONS.items()}
    write_arrays(output.child(EXPLORED_ARRAYS), arrays, {"class_names": list(exploration.classes.index)})
    write_manifest(
        output, ExplorationManifest.model_validate(exploration.summary | {"status": "complete", "digests": digests})
    )


def read_exploration(output: Location) -> Exploration | None:
    """Read the findings of a complete exploration; None without one."""
    manifest = read_exploration_manifest(output)
    if manifest is None or not manifest.is_complete:
        return None
    images = read_table(output, f"{EXPLORED_IMAGES}.parquet")
    classes = read_table(output, f"{EXPLORED_CLASSES}.parquet").set_index("label")
    arrays = read_arrays(output.child(EXPLORED_ARRAYS))
    missing = sorted(set(_DIMENSIONS) - set(arrays))
    if missing:
        raise DamageError(
            f"{output.child(EXPLORED_ARRAYS).url} is damaged ({missing[0]} is missing); {advise_repair(output)}"
        )
    return Exploration(images, classes, summary=manifest.dump(), **arrays)


def check_exploration(output: Location, manifest: ExplorationManifest, catalog: pd.DataFrame | None) -> Iterator[Fault]:
    """Check the stored findings of an exploration."""
    images, faults = _check_table(output, EXPLORED_IMAGES)
    classes, more = _check_table(output, EXPLORED_CLASSES)
    yield from faults + more
    if images is not None and (
        len(images) != manifest.n_images or (catalog is not None and not _has_same_images(images, catalog))
    ):
        yield _fault(f"{EXPLORED_IMAGES}.parquet", "its rows are not those of the catalog")
    if images is not None and classes is not None:
        counts = images["label"].astype(str).value_counts().to_dict()
        if counts != dict(zip(classes["label"].astype(str), classes["n_images"], strict=True)):
            yield _fault(f"{EXPLORED_CLASSES}.parquet", f"it does not count the images of {EXPLORED_IMAGES}.parquet")
    names = [f"{name}.csv" for name in (EXPLORED_IMAGES, EXPLORED_CLASSES)]
    yield from check_digests(output, manifest.digests, names, "explore")
    yield from check_arrays(output, EXPLORED_ARRAYS, _DIMENSIONS, "explore")


def _has_same_images(images: pd.DataFrame, catalog: pd.DataFrame) -> bool:
    """Whether rows are exactly the images of a catalog that are not missing, in any order."""
    rows = find_rows(images["path"], catalog["path"])
    if (rows < 0).any() or not images["path"].is_unique:
        return False
    is_expected = (catalog["bytes"] != VANISHED_BYTES).to_numpy(copy=True)
    is_expected[rows] = False
    labels = catalog["label"].iloc[rows].astype(str).to_numpy()
    return not is_expected.any() and np.array_equal(labels, images["label"].astype(str).to_numpy())


def _check_table(output: Location, name: str) -> tuple[pd.DataFrame | None, list[Fault]]:
    """Read a table, or say what is wrong with it."""
    where = f"{name}.parquet"
    if not exists(output.child(where)):
        return None, [_fault(where, "it is missing")]
    try:
        return read_table(output, where), []
    except DamageError as error:
        return None, [_fault(where, describe_damage(error))]


def _fault(where: str, what: str) -> Fault:
    """Return a fault of an exploration."""
    return Fault(where, what, "explore")
