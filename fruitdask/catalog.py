"""The catalog: which images there are. Nothing is decoded here."""

import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask.config import InputConfig
from fruitdask.errors import CatalogError, ConfigError
from fruitdask.storage import Location, exists, explained

COLUMNS = ("path", "label", "bytes", "version")

#: Where ``featurize.images_per_partition`` is not given: about this many partitions, so that a few workers finish together ...
_PARTITIONS_WANTED = 16
#: ... but a chunk neither so small that tasks and files cost more than the work, nor so large that an interruption loses minutes.
_IMAGES_PER_PARTITION_RANGE = (32, 512)


@dataclass(frozen=True)
class Partition:
    """
    A contiguous range of catalog rows: the unit of scheduling, storage, commit and retry.

    Parameters
    ----------
    index : int
        Which chunk of the store this is, from 0.
    start : int
        The catalog row of its first image.
    paths : tuple[str, ...]
        Paths of its images relative to the input URL.
    labels : tuple[str, ...]
        Their classes.
    """

    index: int
    start: int
    paths: tuple[str, ...]
    labels: tuple[str, ...]


def list_images(config: InputConfig) -> pd.DataFrame:
    """
    List the images of an input.

    Parameters
    ----------
    config : InputConfig
        Where to look and what to keep.

    Returns
    -------
    pandas.DataFrame
        One row an image, sorted by ``path``, with the columns ``path`` (str, relative to the input URL), ``label`` (str, the parent folder
        or the manifest's word), ``bytes`` (int64) and ``version`` (str: an object store's ETag, else the time of modification).

    Raises
    ------
    CatalogError
        If there is no such folder, no image in it, or no image of a class that was asked for.
    ConfigError
        If the manifest is not a table of paths and labels.
    StorageError
        If the input cannot be listed.
    """
    root = Location(config.url, config.storage_options)
    catalog = _list_files(root)
    if config.manifest is None:
        catalog = catalog[catalog["path"].str.lower().str.endswith(config.extensions)]
        catalog["label"] = _label_by_folder(catalog["path"], root)
    else:
        catalog = _join_manifest(catalog, config)
    if catalog.empty:
        raise CatalogError(_explain_empty(root, config))
    catalog = catalog.sort_values("path", ignore_index=True)
    if config.classes is not None:
        catalog = _keep_classes(catalog, config)
    if config.limit is not None:
        catalog = catalog.iloc[sample_evenly(catalog, config.limit)].reset_index(drop=True)
    return catalog[list(COLUMNS)]


def choose_partition_size(n_images: int) -> int:
    """
    Choose how many images a partition holds.

    Parameters
    ----------
    n_images : int
        Images in the catalog.

    Returns
    -------
    int
        Images a partition; it depends on nothing but the number of images.

    Examples
    --------
    >>> [choose_partition_size(n) for n in (10, 846, 1_000_000)]
    [32, 53, 512]
    """
    smallest, largest = _IMAGES_PER_PARTITION_RANGE
    return max(smallest, min(largest, -(-n_images // _PARTITIONS_WANTED)))


def split_catalog(catalog: pd.DataFrame, images_per_partition: int) -> Iterator[Partition]:
    """
    Split a catalog into partitions, one at a time.

    Parameters
    ----------
    catalog : pandas.DataFrame
        The catalog.
    images_per_partition : int
        Images a partition; the last one may hold fewer.

    Yields
    ------
    Partition
        The next range of rows.
    """
    for index, start in enumerate(range(0, len(catalog), images_per_partition)):
        rows = catalog.iloc[start : start + images_per_partition]
        yield Partition(index, start, tuple(rows["path"]), tuple(rows["label"]))


def sample_evenly(catalog: pd.DataFrame, limit: int) -> npt.NDArray[np.int64]:
    """
    Choose at most ``limit`` rows, the same number of each class as far as it has them.

    Rows are taken class by class in turn, within a class by a hash of the path: the choice is reproducible, looks random, and a larger
    limit keeps what a smaller one chose.

    Parameters
    ----------
    catalog : pandas.DataFrame
        Rows with ``path`` and ``label``.
    limit : int
        How many at most.

    Returns
    -------
    numpy.ndarray
        Positions of the chosen rows, ascending, int64.

    Examples
    --------
    >>> sample_evenly(pd.DataFrame({"path": ["a/1", "a/2", "a/3", "b/4"], "label": ["a", "a", "a", "b"]}), 2)[-1]
    np.int64(3)
    """
    order = pd.util.hash_pandas_object(catalog["path"], index=False).to_numpy()
    turn = pd.Series(order).groupby(catalog["label"].to_numpy()).rank(method="first")
    return np.sort(np.lexsort((order, turn.to_numpy()))[:limit])


def hash_catalog(catalog: pd.DataFrame) -> str:
    """
    Hash what a catalog says.

    Parameters
    ----------
    catalog : pandas.DataFrame
        The catalog.

    Returns
    -------
    str
        A SHA-256 in hexadecimal digits that changes with any path, label, size or version, or their order.
    """
    digest = hashlib.sha256(json.dumps([len(catalog), *COLUMNS]).encode())
    for column in COLUMNS:
        digest.update(pd.util.hash_pandas_object(catalog[column], index=False).to_numpy().tobytes())
    return digest.hexdigest()


def _list_files(root: Location) -> pd.DataFrame:
    """List every file below a location with its size and version."""
    with explained(root, "list"):
        rows = list(_walk_folder(root.path) if root.is_local else _find_objects(root))
    unreadable = next((path for path, *_ in rows if _is_broken(path)), None)
    if unreadable is not None:
        raise CatalogError(f"{root.url}: found the file name {unreadable!r}, expected names in UTF-8; rename that file")
    return pd.DataFrame(rows, columns=["path", "bytes", "version"]).astype(
        {"path": str, "bytes": np.int64, "version": str}
    )


def _find_objects(root: Location) -> Iterator[tuple[str, int, str]]:
    """List the objects below a prefix."""
    root.fs.invalidate_cache()
    skip = len(root.path) + 1
    for path, info in root.fs.find(root.path, detail=True).items():
        if info["type"] == "file":
            yield path[skip:], int(info.get("size") or 0), _read_version(info)


def _walk_folder(top: str) -> Iterator[tuple[str, int, str]]:
    """List the files below a local folder, through links, but no folder twice: links may run in circles."""
    visited = set()
    for folder, subfolders, names in os.walk(top, followlinks=True, onerror=_refuse):
        if os.path.realpath(folder) in visited:
            subfolders.clear()
            continue
        visited.add(os.path.realpath(folder))
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                status = os.stat(path)
                yield os.path.relpath(path, top).replace(os.sep, "/"), status.st_size, str(status.st_mtime)


def _refuse(error: OSError) -> None:
    """End a listing at a folder that cannot be read, where os.walk would pass it over; that there is no top folder is said elsewhere."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _is_broken(path: str) -> bool:
    """Tell whether a name holds bytes that are not UTF-8, which Python carries as lone surrogates."""
    return any("\ud800" <= character <= "\udfff" for character in path)


def _read_version(info: dict[str, object]) -> str:
    """Read what changes when a file does: the ETag where there is one, else the time of modification."""
    for key in ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "created"):
        if info.get(key) is not None:
            return str(info[key]).strip('"')
    return ""


def _label_by_folder(paths: pd.Series, root: Location) -> pd.Series:
    """Take the parent folder of each path; for a file at the top, the input's own folder."""
    top = PurePosixPath(root.path).name
    return paths.map(lambda path: PurePosixPath(path).parent.name or top).astype(str)


def _join_manifest(files: pd.DataFrame, config: InputConfig) -> pd.DataFrame:
    """Take paths and labels from the manifest; a path that is not there stays in, and its outcome will say so."""
    manifest = _read_manifest(config)
    missing = {"path", "label"} - set(manifest.columns)
    if missing:
        raise ConfigError(
            f"{config.manifest}: expected the columns path and label in input.manifest, found {', '.join(map(str, manifest.columns))}"
        )
    manifest = manifest[["path", "label"]].fillna("").astype(str)
    empty = (manifest == "").any(axis=1)
    if empty.any():
        row = int(empty.argmax()) + 1
        raise ConfigError(
            f"{config.manifest}: expected a path and a label in each row of input.manifest, row {row} lacks one"
        )
    duplicated = manifest["path"][manifest["path"].duplicated()]
    if len(duplicated):
        raise ConfigError(
            f"{config.manifest}: expected each path once in input.manifest, found {duplicated.iloc[0]!r} twice; remove one"
        )
    joined = manifest.merge(files, on="path", how="left")
    return joined.fillna({"bytes": 0, "version": ""}).astype({"bytes": np.int64})


def _read_manifest(config: InputConfig) -> pd.DataFrame:
    """Read a CSV or Parquet manifest."""
    location = Location(str(config.manifest), config.storage_options if "://" in str(config.manifest) else {})
    with explained(location, "read"):
        data = io.BytesIO(location.fs.cat_file(location.path))
    try:
        return (
            pd.read_parquet(data)
            if location.path.endswith((".parquet", ".pq"))
            else pd.read_csv(data, dtype=str, keep_default_na=False)
        )
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"{config.manifest}: expected a CSV or Parquet table in input.manifest, found {error}"
        ) from error


def _keep_classes(catalog: pd.DataFrame, config: InputConfig) -> pd.DataFrame:
    """Keep the classes that the configuration names."""
    wanted, existing = set(config.classes or ()), set(catalog["label"])
    absent = sorted(wanted - existing)
    if absent:
        names = ", ".join(sorted(existing)[:30]) + (" ..." if len(existing) > 30 else "")
        raise CatalogError(
            f"{config.url}: input.classes names {', '.join(absent)}, which is not there; the classes are: {names}"
        )
    return catalog[catalog["label"].isin(wanted)].reset_index(drop=True)


def _explain_empty(root: Location, config: InputConfig) -> str:
    """Say why a catalog is empty."""
    if config.manifest is not None:
        return f"{config.manifest}: expected images in input.manifest, found no row"
    if not exists(root):
        return f"{config.url}: there is no such folder; check input.url"
    return f"{config.url}: expected images ({', '.join(config.extensions)}), found none; check input.url and input.extensions"
