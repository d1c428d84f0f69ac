"""What an exploration leaves in the output folder."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask import store
from fruitdask.errors import StorageError
from fruitdask.storage import Location, write_file

#: A spreadsheet holds no more rows than about a million (Excel: 1,048,576).
_MAX_CSV_ROWS = 1_000_000
_IMAGES, _CLASSES, _ARRAYS = "explore", "explore_classes", "explore.zarr"


@dataclass(frozen=True, eq=False)
class Exploration:
    """
    What an exploration found.

    Parameters
    ----------
    images : pandas.DataFrame
        One row an image, in the order of the catalog: ``path``, ``label``, ``status``, ``error``; ``bytes``, ``width_px``, ``height_px``,
        ``format``;
        ``content_hash`` (SHA-256), ``perceptual_hash`` (64 bits) and the groups ``duplicate_group`` and ``near_duplicate_group``;
        ``has_exif``, ``has_gps``, ``has_serial``, ``has_name``; ``mean_red``, ``mean_green``, ``mean_blue`` (0 to 255);
        ``distance_to_mean``, the mean squared difference from the mean image of the class.
    classes : pandas.DataFrame
        One row a class, its label the index: counts, bytes, median sizes, colours, ``mean_squared_difference`` over all pairs of its
        images with ``standard_error`` and quantiles over pairs, the ``most_typical`` and ``least_typical`` image.
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
    """
    Write what an exploration found; its summary, written last, says that it is complete.

    Parameters
    ----------
    output : Location
        The output folder.
    exploration : Exploration
        What was found.

    Raises
    ------
    StorageError
        If something cannot be written.
    """
    for name, table in ((_IMAGES, exploration.images), (_CLASSES, exploration.classes.reset_index())):
        store.write_table(output.child(f"{name}.parquet"), table)
        store.delete_result(output, f"{name}.csv")
        if len(table) <= _MAX_CSV_ROWS:
            write_file(output.child(f"{name}.csv"), table.to_csv(index=False, lineterminator="\n").encode())
    arrays: dict[str, tuple[npt.NDArray[Any], list[str]]] = {
        "thumbnail_rows": (exploration.thumbnail_rows, ["thumbnail"]),
        "thumbnails": (exploration.thumbnails, ["thumbnail", "y", "x", "channel"]),
        "means": (exploration.means, ["class", "y", "x", "channel"]),
    }
    store.write_arrays(output.child(_ARRAYS), arrays, {"class_names": list(exploration.classes.index)})
    store.write_manifest(output, exploration.summary | {"status": "complete"}, name=store.EXPLORATION)


def read_exploration(output: Location) -> Exploration | None:
    """
    Read what an exploration found.

    Parameters
    ----------
    output : Location
        The output folder.

    Returns
    -------
    Exploration or None
        What was found; None where no exploration was completed.

    Raises
    ------
    StorageError
        If something cannot be read.
    """
    summary = store.read_manifest(output, name=store.EXPLORATION)
    if summary is None or summary["status"] != "complete":
        return None
    images = store.read_table(output, f"{_IMAGES}.parquet")
    classes = store.read_table(output, f"{_CLASSES}.parquet").set_index("label")
    arrays = store.read_arrays(output.child(_ARRAYS))
    missing = sorted({"thumbnail_rows", "thumbnails", "means"} - set(arrays))
    if missing:
        raise StorageError(
            f"{output.child(_ARRAYS).url}: expected the arrays of an exploration, {missing[0]} is missing; delete it and explore again"
        )
    return Exploration(images, classes, summary=summary, **arrays)
