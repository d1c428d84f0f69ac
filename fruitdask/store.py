"""The output folder: manifest, features, outcomes. What is written last marks what is done."""

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import zarr

from fruitdask.errors import OutputError, StorageError, StoreMismatchError
from fruitdask.storage import Location, exists, explained, write_file

#: What can become of an image; the position is its code in the store. ``pending`` is an image whose partition is not committed yet.
STATUSES = ("pending", "ok", "unreadable", "too_large", "missing", "unreachable", "not_finite")
OUTCOME_COLUMNS = ("path", "label", "status", "error", "attempts")

#: The two manifests: each is written first and says whose the other files are, and when it says "complete" they are.
MANIFEST, EXPLORATION = "manifest.json", "explore.json"
QUALITY = "quality.json"
_FEATURES = "features.zarr"
_PARTITIONS = "partitions"
_COMMIT_MARK = re.compile(r"(\d{5,})\.parquet")
_THUMBNAILS = "thumbnails.zarr"
FIGURES = "figures"
FIGURE_NAMES = (
    "classes",
    "sizes",
    "examples",
    "colours",
    "differences",
    "pca",
    "tsne",
    "explained_variance",
    "silhouettes",
    "neighbors",
)
#: All that a run or an exploration may write into its output folder, and therefore all that it may delete there.
#: Commit marks go before what they vouch for, a manifest last: it says that the others are fruitdask's.
_RUN_NAMES = (
    _PARTITIONS,
    _FEATURES,
    "pca.zarr",
    QUALITY,
    "results.parquet",
    "results.csv",
    "failures.csv",
    MANIFEST,
)
_EXPLORATION_NAMES = (
    _THUMBNAILS,
    "explore.zarr",
    "explore.parquet",
    "explore.csv",
    "explore_classes.parquet",
    "explore_classes.csv",
    *(f"{FIGURES}/{name}.png" for name in FIGURE_NAMES),
    "report.html",
    EXPLORATION,
)


def check_output(output: Location, fingerprint: Mapping[str, str], *, overwrite: bool) -> dict[str, Any] | None:
    """
    Decide whether a run may use an output folder.

    Parameters
    ----------
    output : Location
        The output folder; it need not exist.
    fingerprint : Mapping[str, str]
        What determines the features: hashes by name.
    overwrite : bool
        Whether an earlier run's results may be deleted.

    Returns
    -------
    dict or None
        The manifest of the earlier run to go on with, or None for a fresh start.

    Raises
    ------
    OutputError
        If the folder holds files with the names of results that no fruitdask run wrote.
    StoreMismatchError
        If it holds the results of a run or an exploration of other images, or of a run with another network.
    """
    manifest, exploration = read_manifest(output), read_manifest(output, name=EXPLORATION)
    if manifest is None:
        names = _EXPLORATION_NAMES + _RUN_NAMES if exploration is None else _RUN_NAMES
        foreign = [name for name in names if exists(output.child(name))]
        if foreign:
            raise OutputError(
                f"{output.url}: expected an empty or new folder for the results, found {foreign[0]}, which no fruitdask run wrote; "
                "choose another output.url"
            )
    if overwrite:
        return None
    found = manifest or exploration or {"fingerprint": {}}
    for name in set(fingerprint) & set(found["fingerprint"]):
        theirs, ours = found["fingerprint"][name], fingerprint[name]
        if theirs != ours:
            raise StoreMismatchError(
                f"{output.url} belongs to another run: its {name} has the fingerprint {_shorten(theirs)}, this run's is {_shorten(ours)}; "
                "choose another output.url, or --overwrite to delete those results"
            )
    return manifest


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
    location = output.child(_FEATURES)
    with explained(location, "write"):
        for name in _RUN_NAMES[:-1]:
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
    location = output.child(_FEATURES)
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
    location = output.child(_FEATURES)
    rows = slice(start, start + len(features))
    with explained(location, "write"):
        group: Any = zarr.open_group(**_zarr_arguments(location), mode="r+")
        group["features"][rows] = features
        group["status"][rows] = outcomes["status"].map(STATUSES.index).to_numpy(np.uint8)
    buffer = io.BytesIO()
    outcomes.to_parquet(buffer, index=False)
    write_file(output.child(_PARTITIONS, f"{index:05d}.parquet"), buffer.getvalue())


def list_committed(output: Location) -> set[int]:
    """
    List the partitions that are done.

    Parameters
    ----------
    output : Location
        The output folder.

    Returns
    -------
    set[int]
        Indices of partitions with a commit mark.

    Raises
    ------
    StorageError
        If the folder cannot be listed.
    """
    folder = output.child(_PARTITIONS)
    with explained(folder, "list"):
        folder.fs.invalidate_cache()
        names = [path.rsplit("/", 1)[-1] for path in folder.fs.find(folder.path)]
    return {int(match[1]) for name in names if (match := _COMMIT_MARK.fullmatch(name))}


def read_outcomes(output: Location, indices: Sequence[int], *, partitions_at_once: int = 256) -> Iterator[pd.DataFrame]:
    """
    Read outcome rows in the order of the catalog.

    Parameters
    ----------
    output : Location
        The output folder.
    indices : Sequence[int]
        Partitions to read, ascending.
    partitions_at_once : int
        How many outcome files make one table: memory grows with it, the number of tables shrinks.

    Yields
    ------
    pandas.DataFrame
        Outcomes of the next partitions.
    """
    import pyarrow.dataset

    folder = output.child(_PARTITIONS)
    for first in range(0, len(indices), partitions_at_once):
        paths = [f"{folder.path}/{index:05d}.parquet" for index in indices[first : first + partitions_at_once]]
        with explained(folder, "read"):
            try:
                table = pyarrow.dataset.dataset(paths, filesystem=folder.fs, format="parquet").to_table()
            except pyarrow.ArrowInvalid as error:
                cause = " ".join(str(error).split())
                raise StorageError(
                    f"{folder.url}: an outcome file is damaged; delete it and run again ({cause})"
                ) from error
        yield table.to_pandas()


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
    location, image = output.child(_THUMBNAILS), (thumbnail_px, thumbnail_px, 3)
    shape, chunks = (n_images, *image), (images_per_partition, *image)
    with explained(location, "write"):
        if exists(location.child("zarr.json")):
            found = open_thumbnails(output, mode="r")
            if (found.shape, found.chunks) == (shape, chunks):
                return
        delete_result(output, _THUMBNAILS)
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
    return zarr.open_array(**_zarr_arguments(output.child(_THUMBNAILS)), mode=mode)


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
    delete_result(output, _THUMBNAILS)


def read_table(location: Location) -> pd.DataFrame:
    """
    Read a Parquet file.

    Parameters
    ----------
    location : Location
        The file.

    Returns
    -------
    pandas.DataFrame
        The table.

    Raises
    ------
    StorageError
        If it cannot be read, or is no table.
    """
    with explained(location, "read"):
        data = location.fs.cat_file(location.path)
    try:
        return pd.read_parquet(io.BytesIO(data))
    except (ValueError, OSError) as error:
        raise StorageError(f"{location.url}: the table is damaged; delete it and run again ({error})") from error


def read_manifest(output: Location, *, name: str = MANIFEST) -> dict[str, Any] | None:
    """
    Read the manifest of a run or of an exploration.

    Parameters
    ----------
    output : Location
        The output folder.
    name : str
        ``MANIFEST`` or ``EXPLORATION``.

    Returns
    -------
    dict or None
        The manifest; None where there is none.

    Raises
    ------
    OutputError
        If there is such a file of something else.
    """
    location = output.child(name)
    try:
        manifest = read_json(location)
        if manifest is None:
            return None
        texts = manifest["fruitdask"], manifest["status"]
        is_ours = all(isinstance(text, str) for text in texts) and isinstance(manifest["fingerprint"], dict)
    except (ValueError, KeyError, TypeError):
        is_ours = False
    if not is_ours:
        raise OutputError(
            f"{location.url}: expected the manifest of a fruitdask run, found something else; choose another output.url"
        )
    return dict(manifest)


def write_manifest(output: Location, manifest: Mapping[str, Any], *, name: str = MANIFEST) -> None:
    """
    Write the manifest of a run or of an exploration.

    Parameters
    ----------
    output : Location
        The output folder.
    manifest : Mapping[str, Any]
        JSON.
    name : str
        ``MANIFEST`` or ``EXPLORATION``.

    Raises
    ------
    StorageError
        If it cannot be written.
    """
    write_json(output.child(name), manifest)


def read_json(location: Location) -> Any:
    """
    Read a JSON file.

    Parameters
    ----------
    location : Location
        The file.

    Returns
    -------
    Any
        What it says; None where there is none.

    Raises
    ------
    ValueError
        If it is not JSON.
    StorageError
        If it cannot be read.
    """
    with explained(location, "read"):
        if not exists(location):
            return None
        return json.loads(location.fs.cat_file(location.path))


def read_quality(output: Location) -> dict[str, Any] | None:
    """
    Read how well the features of a run keep the classes apart.

    Parameters
    ----------
    output : Location
        The output folder.

    Returns
    -------
    dict or None
        What ``fruitdask.neighbors`` has found; None where that was not asked for.

    Raises
    ------
    StorageError
        If it cannot be read, or is damaged.
    """
    location = output.child(QUALITY)
    try:
        quality: dict[str, Any] | None = read_json(location)
    except ValueError as error:
        raise StorageError(f"{location.url}: the file is damaged ({error}); delete it and run again") from error
    return quality


def write_json(location: Location, tree: Mapping[str, Any]) -> None:
    """
    Write a JSON file.

    Parameters
    ----------
    location : Location
        The file.
    tree : Mapping[str, Any]
        What to say; without infinity and NaN, which JSON does not know.

    Raises
    ------
    StorageError
        If it cannot be written.
    """
    write_file(location, json.dumps(tree, indent=2, allow_nan=False).encode() + b"\n")


def clear_output(output: Location) -> None:
    """
    Delete the results of a run and of an exploration, and nothing else that lies in the folder.

    Parameters
    ----------
    output : Location
        The output folder.

    Raises
    ------
    StorageError
        If something cannot be deleted.
    """
    for name in (MANIFEST, EXPLORATION):
        # Should this be interrupted, what is left must not be taken for results.
        manifest = read_manifest(output, name=name)
        if manifest is not None:
            write_manifest(output, manifest | {"status": "deleting"}, name=name)
    for name in _EXPLORATION_NAMES + _RUN_NAMES:
        delete_result(output, name)


def delete_result(output: Location, name: str) -> None:
    """
    Delete one of a run's results if it is there.

    Parameters
    ----------
    output : Location
        The output folder.
    name : str
        A file or folder in it.

    Raises
    ------
    StorageError
        If it cannot be deleted.
    """
    location = output.child(name)
    with explained(location, "delete"):
        if exists(location):
            location.fs.rm(location.path, recursive=True)


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


def _shorten(fingerprint: Any) -> str:
    """Shorten a hash; other fingerprints are words."""
    return fingerprint[:12] if isinstance(fingerprint, str) and len(fingerprint) == 64 else str(fingerprint)


def _zarr_arguments(location: Location) -> dict[str, Any]:
    """Name a Zarr store; Zarr takes no storage options for a local path."""
    if location.is_local:
        return {"store": location.path}
    return {"store": location.url, "storage_options": dict(location.storage_options)}
