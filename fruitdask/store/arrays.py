"""Arrays, in Zarr: features and statuses of a run, thumbnails of an exploration, small ones such as components."""

import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import zarr
from zarr.storage import FsspecStore

from fruitdask.errors import StorageError
from fruitdask.storage import Location, exists, explained, write_file
from fruitdask.store.manifests import delete_result
from fruitdask.store.names import FEATURES, PARTITIONS, RUN_NAMES, STATUSES, THUMBNAILS


def create_store(
    output: Location, *, n_images: int, n_features: int, images_per_partition: int, attributes: Mapping[str, Any]
) -> None:
    """
    Create the empty arrays of a run, one chunk a partition.

    Parameters
    ----------
    output : Location
        The output folder.
    n_images : int
        Rows.
    n_features : int
        Columns.
    images_per_partition : int
        Rows a chunk.
    attributes : Mapping[str, Any]
        What a reader of the features needs to know; JSON.

    Raises
    ------
    StorageError
        If the store cannot be written.

    Notes
    -----
    ``status`` follows the CF conventions, section 3.5: its attributes ``flag_values`` and ``flag_meanings`` name the codes.
    """
    location = output.child(FEATURES)
    with explained(location, "write"):
        for name in RUN_NAMES[:-1]:
            delete_result(output, name)
        group = zarr.open_group(**_zarr_arguments(location), mode="w", attributes=dict(attributes))
        group.create_array(
            "features",
            shape=(n_images, n_features),
            chunks=(images_per_partition, n_features),
            dtype=np.float32,
            fill_value=np.nan,
            dimension_names=("image", "feature"),
        )
        group.create_array(
            "status",
            shape=(n_images,),
            chunks=(images_per_partition,),
            dtype=np.uint8,
            fill_value=0,
            dimension_names=("image",),
            attributes={"flag_values": list(range(len(STATUSES))), "flag_meanings": " ".join(STATUSES)},
        )


def open_store(output: Location) -> zarr.Group | None:
    """
    Open the arrays of a run for reading.

    Parameters
    ----------
    output : Location
        The output folder.

    Returns
    -------
    zarr.Group or None
        The group with ``features`` (image, feature) float32 and ``status`` (image) uint8; None where it was not created to the end.

    Raises
    ------
    StorageError
        If the store cannot be read.
    """
    location = output.child(FEATURES)
    with explained(location, "read"):
        if not exists(location.child("status", "zarr.json")):
            return None
        try:
            return zarr.open_group(**_zarr_arguments(location), mode="r")
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{location.url}: the store is damaged ({error}); use --overwrite to begin again"
            ) from error


def write_partition(
    output: Location, *, index: int, start: int, features: npt.NDArray[np.float32], outcomes: pd.DataFrame
) -> None:
    """
    Store what became of a partition: features, then statuses, then the outcome file, which commits it.

    Parameters
    ----------
    output : Location
        The output folder.
    index : int
        Which partition.
    start : int
        Its first row.
    features : numpy.ndarray
        Features of shape (n, n_features), float32; NaN where an image failed.
    outcomes : pandas.DataFrame
        One row an image with the columns ``OUTCOME_COLUMNS``.

    Raises
    ------
    StorageError
        If something cannot be written; the partition is then not committed.
    """
    location = output.child(FEATURES)
    rows = slice(start, start + len(features))
    with explained(location, "write"):
        group: Any = zarr.open_group(**_zarr_arguments(location), mode="r+")
        group["features"][rows] = features
        group["status"][rows] = outcomes["status"].map(STATUSES.index).to_numpy(np.uint8)
    buffer = io.BytesIO()
    outcomes.to_parquet(buffer, index=False)
    write_file(output.child(PARTITIONS, f"{index:05d}.parquet"), buffer.getvalue())


def create_thumbnails(output: Location, *, n_images: int, thumbnail_px: int, images_per_partition: int) -> None:
    """
    Create the array that holds the thumbnails of all images while they are explored, one chunk a partition.

    One of the same shape is taken again: all of it will be written anew, and a straggling task of an earlier run may still write to it.

    Parameters
    ----------
    output : Location
        The output folder; an array of another shape that is there is replaced.
    n_images : int
        Images.
    thumbnail_px : int
        Side of a thumbnail, in pixels.
    images_per_partition : int
        Images a chunk.

    Raises
    ------
    StorageError
        If it cannot be written.
    """
    location, image = output.child(THUMBNAILS), (thumbnail_px, thumbnail_px, 3)
    shape, chunks = (n_images, *image), (images_per_partition, *image)
    with explained(location, "write"):
        if exists(location.child("zarr.json")):
            found = open_thumbnails(output, mode="r")
            if (found.shape, found.chunks) == (shape, chunks):
                return
        delete_result(output, THUMBNAILS)
        zarr.create_array(
            **_zarr_arguments(location),
            shape=shape,
            chunks=chunks,
            dtype=np.uint8,
            fill_value=0,
            dimension_names=("image", "y", "x", "channel"),
        )


def open_thumbnails(output: Location, *, mode: Literal["r", "r+"]) -> Any:
    """
    Open the array of thumbnails.

    Parameters
    ----------
    output : Location
        The output folder.
    mode : str
        ``r`` to read, ``r+`` to write.

    Returns
    -------
    zarr.Array
        Thumbnails (image, y, x, channel), uint8.
    """
    return zarr.open_array(**_zarr_arguments(output.child(THUMBNAILS)), mode=mode)


def delete_thumbnails(output: Location) -> None:
    """
    Delete the array of thumbnails, of which only a sample is kept elsewhere.

    Parameters
    ----------
    output : Location
        The output folder.

    Raises
    ------
    StorageError
        If it cannot be deleted.
    """
    delete_result(output, THUMBNAILS)


def write_arrays(
    location: Location, arrays: Mapping[str, tuple[npt.NDArray[Any], Sequence[str]]], attributes: Mapping[str, Any]
) -> None:
    """
    Write small arrays as a Zarr group of their own.

    Parameters
    ----------
    location : Location
        Where the group goes; one that is there is replaced.
    arrays : Mapping[str, tuple[numpy.ndarray, Sequence[str]]]
        Arrays and the names of their dimensions.
    attributes : Mapping[str, Any]
        JSON.

    Raises
    ------
    StorageError
        If they cannot be written.
    """
    with explained(location, "write"):
        group = zarr.open_group(**_zarr_arguments(location), mode="w", attributes=dict(attributes))
        for name, (values, dimensions) in arrays.items():
            group.create_array(name, data=np.asarray(values), dimension_names=tuple(dimensions))


def read_arrays(location: Location) -> dict[str, npt.NDArray[Any]]:
    """
    Read a group of small arrays.

    Parameters
    ----------
    location : Location
        Where the group is.

    Returns
    -------
    dict[str, numpy.ndarray]
        Its arrays by name.

    Raises
    ------
    StorageError
        If they cannot be read.
    """
    with explained(location, "read"):
        group = zarr.open_group(**_zarr_arguments(location), mode="r")
        return {name: np.asarray(array[...]) for name, array in group.arrays()}


def _zarr_arguments(location: Location) -> dict[str, Any]:
    """Name a Zarr store; Zarr takes no storage options for a local path."""
    if location.is_local:
        return {"store": location.path}
    if location.is_s3:
        # Zarr would take s3fs's file system, which has retries of its own.
        fs = type(location.fs)(asynchronous=True, **location.options)
        return {"store": FsspecStore(fs, path=location.path)}
    return {"store": location.url, "storage_options": location.options}
