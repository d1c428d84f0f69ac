"""Reads, writes and checks the findings of an exploration."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask.core.escaping import format_csv
from fruitdask.core.partition import VANISHED_BYTES
from fruitdask.core.storage import Location, exists, explained
from fruitdask.errors import DamageError
from fruitdask.store.arrays import add_array, create_arrays, open_array, open_lazily, read_arrays
from fruitdask.store.checks import Fault, check_arrays, check_digests, describe_damage
from fruitdask.store.layout import EXPLORED_ARRAYS, EXPLORED_CLASSES, EXPLORED_IMAGES
from fruitdask.store.manifests import (
    advise_repair,
    delete_result,
    read_exploration_manifest,
    open_digested,
)
from fruitdask.store.paths import PathFinder
from fruitdask.store.schema import ExplorationManifest
from fruitdask.store.tables import read_blocks, read_table, stream_table

#: A spreadsheet holds no more rows than about a million (Excel: 1,048,576).
_MAX_CSV_ROWS = 1_000_000
#: Thumbnails of a chunk, which are read and written together.
_THUMBNAILS_AT_ONCE = 64
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
        Laplacian) at ``input_px``; ``distance_to_mean``, the mean squared difference from the mean image of
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
        Scale, input size, counts and times; ``compared_px``, the side at which images were compared, if it is smaller
        than ``input_px`` because very many classes alternate.
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


def create_means(output: Location, labels: Sequence[str], *, thumbnail_px: int) -> None:
    """Create the array of mean images, which tasks fill, a chunk for each class."""
    location, shape = output.child(EXPLORED_ARRAYS), (len(labels), thumbnail_px, thumbnail_px, 3)
    create_arrays(location, {"class_names": list(labels)})
    add_array(location, "means", shape=shape, n_rows=1, dtype=np.uint8, dimensions=_DIMENSIONS["means"])


def open_means(output: Location) -> Any:
    """Open the array of mean images."""
    return open_array(output.child(EXPLORED_ARRAYS), "means")


def write_thumbnails(
    output: Location,
    rows: npt.NDArray[np.int64],
    read: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.uint8]],
    *,
    thumbnail_px: int,
) -> None:
    """Write the thumbnails of some images, some at a time."""
    location, shape = output.child(EXPLORED_ARRAYS), (len(rows), thumbnail_px, thumbnail_px, 3)
    kinds: dict[str, Any] = {"thumbnail_rows": (shape[:1], np.int64), "thumbnails": (shape, np.uint8)}
    kept, pictures = (
        add_array(location, name, shape=size, n_rows=_THUMBNAILS_AT_ONCE, dtype=dtype, dimensions=_DIMENSIONS[name])
        for name, (size, dtype) in kinds.items()
    )
    for start in range(0, len(rows), _THUMBNAILS_AT_ONCE):
        chosen = rows[start : start + _THUMBNAILS_AT_ONCE]
        thumbnails = read(chosen)
        with explained(location, "write"):
            kept[start : start + len(chosen)] = chosen
            pictures[start : start + len(chosen)] = thumbnails


def write_tables(
    output: Location, images: Iterable[pd.DataFrame], classes: pd.DataFrame, *, n_images: int
) -> dict[str, str]:
    """Write the tables of images, block by block, and of classes; returns the digests of CSV files."""
    digests: dict[str, str] = {}
    for name, blocks, n_rows in (
        (EXPLORED_IMAGES, images, n_images),
        (EXPLORED_CLASSES, [classes.reset_index()], len(classes)),
    ):
        delete_result(output, f"{name}.csv")
        with ExitStack() as stack:
            write = stack.enter_context(stream_table(output.child(f"{name}.parquet")))
            is_small = n_rows <= _MAX_CSV_ROWS
            write_csv = stack.enter_context(open_digested(output, f"{name}.csv", digests)) if is_small else None
            for number, block in enumerate(blocks):
                write(block)
                if write_csv is not None:
                    write_csv(format_csv(block, with_header=number == 0).encode())
    return digests


def read_exploration(output: Location) -> Exploration | None:
    """Read the findings of a complete exploration; None without one."""
    manifest = _read_complete(output)
    if manifest is None:
        return None
    images = read_table(output, f"{EXPLORED_IMAGES}.parquet")
    arrays = read_arrays(output.child(EXPLORED_ARRAYS))
    _check_names(output, arrays)
    return Exploration(images, read_classes(output), summary=manifest.dump(), **arrays)


def open_exploration(output: Location, more_rows: Sequence[int] | npt.NDArray[np.int64] = ()) -> Exploration | None:
    """Open the findings of a complete exploration for a few images; None without one.

    The table has only the images with thumbnails and those of `more_rows`, in the order of the catalog, and
    `thumbnail_rows` refers to its rows. Pictures are read on demand.
    """
    manifest = _read_complete(output)
    if manifest is None:
        return None
    arrays: dict[str, Any] = dict(open_lazily(output.child(EXPLORED_ARRAYS)))
    _check_names(output, arrays)
    pictured = arrays["thumbnail_rows"][:]
    rows = np.union1d(pictured, np.asarray(more_rows, np.int64))
    blocks, start = [], 0
    for block in read_images(output, ("path", "label", "duplicate_group", "near_duplicate_group")):
        first, last = np.searchsorted(rows, (start, start + block.num_rows))
        blocks.append(block.take(rows[first:last] - start))
        start += block.num_rows
    images = _concatenate(blocks)
    arrays["thumbnail_rows"] = np.searchsorted(rows, pictured)
    return Exploration(images, read_classes(output), summary=manifest.dump(), **arrays)


def read_images(output: Location, columns: Sequence[str]) -> Iterator[Any]:
    """Read some columns of the table of images, as Arrow tables, block by block."""
    return read_blocks(output, f"{EXPLORED_IMAGES}.parquet", columns)


def read_groups(output: Location, labels: pd.Index) -> tuple[npt.NDArray[np.int32], ...]:
    """Read the class of each image, as its position in `labels`, and its groups of duplicates and near duplicates; -1
    for none.
    """
    blocks = []
    for block in read_images(output, ("label", "duplicate_group", "near_duplicate_group")):
        codes = labels.get_indexer(block["label"].to_pandas().astype("str"))
        groups = (block[name].fill_null(-1).to_numpy() for name in ("duplicate_group", "near_duplicate_group"))
        blocks.append([np.asarray(column, np.int32) for column in (codes, *groups)])
    return tuple(map(np.concatenate, zip(*blocks, strict=True)))


def read_sizes(output: Location, *, n_images: int, max_images: int) -> pd.DataFrame:
    """Read the sizes of the files of all images, or of every second, third ... one if they are too many."""
    step, start, blocks = -(-n_images // max_images), 0, []
    for block in read_images(output, ("bytes", "width_px", "height_px")):
        blocks.append(block.take(np.arange(-start % step, block.num_rows, step)))
        start += block.num_rows
    return _concatenate(blocks)


def list_unreadable(output: Location) -> pd.DataFrame:
    """List the images that an exploration could not read, like the failures of a run."""
    import pyarrow.compute

    blocks = read_images(output, ("path", "label", "status", "error"))
    return _concatenate([block.filter(pyarrow.compute.not_equal(block["status"], "ok")) for block in blocks])


def _concatenate(blocks: Sequence[Any]) -> pd.DataFrame:
    """Concatenate Arrow tables."""
    import pyarrow

    table: pd.DataFrame = pyarrow.concat_tables(blocks).to_pandas()
    return table


def _read_complete(output: Location) -> ExplorationManifest | None:
    """Read the manifest of a complete exploration."""
    manifest = read_exploration_manifest(output)
    return manifest if manifest is not None and manifest.is_complete else None


def read_classes(output: Location) -> pd.DataFrame:
    """Read the table of classes."""
    return read_table(output, f"{EXPLORED_CLASSES}.parquet").set_index("label")


def _check_names(output: Location, arrays: Mapping[str, Any]) -> None:
    """Refuse arrays of which one is missing."""
    missing = sorted(set(_DIMENSIONS) - set(arrays))
    if missing:
        raise DamageError(
            f"{output.child(EXPLORED_ARRAYS).url} is damaged ({missing[0]} is missing); {advise_repair(output)}"
        )


def check_exploration(output: Location, manifest: ExplorationManifest, catalog: pd.DataFrame | None) -> Iterator[Fault]:
    """Check the stored findings of an exploration, block by block."""
    counts, faults = _check_images(output, manifest, catalog)
    classes, more = _check_table(output, EXPLORED_CLASSES)
    yield from faults + more
    if counts is not None and classes is not None:
        if counts != dict(zip(classes["label"].astype(str), classes["n_images"], strict=True)):
            yield _fault(f"{EXPLORED_CLASSES}.parquet", f"it does not count the images of {EXPLORED_IMAGES}.parquet")
    names = [f"{name}.csv" for name in (EXPLORED_IMAGES, EXPLORED_CLASSES)]
    yield from check_digests(output, manifest.digests, names, "explore")
    yield from check_arrays(output, EXPLORED_ARRAYS, _DIMENSIONS, "explore")


def _check_images(
    output: Location, manifest: ExplorationManifest, catalog: pd.DataFrame | None
) -> tuple[dict[str, int] | None, list[Fault]]:
    """Check the table of images; returns the number of images by class, None where it cannot be read."""
    where = f"{EXPLORED_IMAGES}.parquet"
    if not exists(output.child(where)):
        return None, [_fault(where, "it is missing")]
    expected = catalog
    if catalog is not None and (catalog["bytes"] == VANISHED_BYTES).any():
        expected = catalog[catalog["bytes"] != VANISHED_BYTES]
    counts, n_images = Counter[str](), 0
    is_same = expected is None or len(expected) == manifest.n_images
    finder = None if expected is None else PathFinder(expected["path"])
    is_found = np.zeros(0 if expected is None else len(expected), np.bool_)
    try:
        for block in read_blocks(output, where):
            images = block.select(["path", "label"]).to_pandas().astype("str")
            if is_same and finder is not None and expected is not None:
                rows = finder.find(images["path"])
                labels = expected["label"].iloc[rows].astype("str")
                is_same = bool((rows >= 0).all()) and list(labels) == list(images["label"])
                is_found[rows] = True
            counts.update(images["label"].value_counts().to_dict())
            n_images += len(images)
    except DamageError as error:
        return None, [_fault(where, describe_damage(error))]
    is_same &= n_images == manifest.n_images and bool(is_found.all())
    return dict(counts), [] if is_same else [_fault(where, "its rows are not those of the catalog")]


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
