"""The catalog: which images there are. Nothing is decoded here."""

import fnmatch
import hashlib
import io
import json
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from fruitdask.config import InputConfig
from fruitdask.errors import CatalogError, ConfigError
from fruitdask.storage import Location, exists, explained

COLUMNS = ("path", "label", "bytes", "version")
#: What the catalog of a store says in ``bytes`` of an image that is not in the input any more.
VANISHED_BYTES = -1

#: A step to the folder above, by which a manifest would read what is not in the input.
_LEADS_OUT = r"(?:^|/)\.\.(?:/|$)"
#: A file while it is listed: path, bytes, and what changes when the file does.
_Row = tuple[str, int, str]
#: Rows hashed at once: pandas makes a Python object of each text.
_ROWS_AT_ONCE = 65_536

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
    bytes, versions : tuple[int, ...]
        What the catalog says of their files. Those that have vanished are not read.
    rows : tuple[int, ...], optional
        Places, from 0, of the images that are to be computed, where the others are in the store already; all by default.
    avoided : frozenset[int]
        Places of images that are not to be opened: they kill the process that does.
    """

    index: int
    start: int
    paths: tuple[str, ...]
    labels: tuple[str, ...]
    bytes: tuple[int, ...] = ()
    versions: tuple[int, ...] = ()
    rows: tuple[int, ...] | None = None
    avoided: frozenset[int] = frozenset()

    @property
    def places_to_read(self) -> tuple[int, ...]:
        """Places of the images that are to be computed and have not vanished."""
        places = range(len(self.paths)) if self.rows is None else self.rows
        return tuple(place for place in places if not self.bytes or self.bytes[place] != VANISHED_BYTES)

    def select(self, places: Sequence[int]) -> "Partition":
        """
        Select some of the images.

        Parameters
        ----------
        places : Sequence[int]
            Their places.

        Returns
        -------
        Partition
            Itself, where these are all; else one of these alone, for reading them.
        """
        if len(places) == len(self.paths):
            return self
        columns = {name: getattr(self, name) for name in ("paths", "labels", "bytes", "versions")}
        chosen: dict[str, Any] = {
            name: tuple(column[place] for place in places) for name, column in columns.items() if column
        }
        avoided = frozenset(row for row, place in enumerate(places) if place in self.avoided)
        return replace(self, **chosen, rows=None, avoided=avoided)


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
        One row an image, sorted by ``path``, with the columns ``path`` (str, relative to the input URL), ``label`` (category, the parent
        folder or the manifest's word), ``bytes`` (int64) and ``version`` (int64, a hash of an object store's ETag, else of the time of
        modification).

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
    if config.manifest is None:
        catalog = _list_files(root, config.extensions)
    else:
        catalog = _join_manifest(_list_files(root, ("",)), config)
    if catalog.empty:
        raise CatalogError(_explain_empty(root, config))
    if config.classes is not None:
        catalog = _keep_classes(catalog, config)
    if config.limit is not None:
        catalog = catalog.iloc[sample_evenly(catalog, config.limit)].reset_index(drop=True)
    if config.exclude:
        # Last, so that an image that is left out changes nothing about which others are in.
        catalog = catalog[~match_paths(catalog["path"], config.exclude)].reset_index(drop=True)
        if catalog.empty:
            raise CatalogError(f"{config.url}: expected images besides those that input.exclude names, found none")
    return catalog[list(COLUMNS)]


def match_paths(paths: pd.Series, patterns: Sequence[str]) -> npt.NDArray[np.bool_]:
    """
    Tell which paths match any of some patterns.

    Parameters
    ----------
    paths : pandas.Series
        Paths relative to the input.
    patterns : Sequence[str]
        Patterns as of Python's ``fnmatch.fnmatchcase``: ``*`` stands for slashes too.

    Returns
    -------
    numpy.ndarray
        One bool a path.

    Examples
    --------
    >>> match_paths(pd.Series(["pear_1/a.jpg", "pear_2/a.jpg", "Pear_1/a.jpg"]), ["pear_1/*"])
    array([ True, False, False])
    """
    match = re.compile("|".join(map(fnmatch.translate, patterns))).match
    return np.array([match(path) is not None for path in paths], bool)


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
        paths, labels, sizes, versions = (tuple(rows[column]) for column in COLUMNS)
        yield Partition(index, start, paths, labels, sizes, versions)


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
    order = np.concatenate([np.empty(0, np.uint64), *_hash_rows(catalog["path"])])
    turn = pd.Series(order).groupby(catalog["label"].array, observed=True).rank(method="first")
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
        for hashes in _hash_rows(catalog[column]):
            digest.update(hashes.tobytes())
    return digest.hexdigest()


def merge_listing(stored: pd.DataFrame, listing: pd.DataFrame) -> pd.DataFrame:
    """
    Bring the catalog of a store up to date with the input as it is now.

    Parameters
    ----------
    stored : pandas.DataFrame
        The catalog of the store, in the order of its rows.
    listing : pandas.DataFrame
        The images of the input, from `list_images`.

    Returns
    -------
    pandas.DataFrame
        The images of the store at their rows, as the listing has them, or marked as vanished where it does not; then, in the order of
        their paths, those that the store does not have.
    """
    if stored["path"].equals(listing["path"]):
        return listing
    places = find_rows(stored["path"], listing["path"])
    is_listed, is_new = places >= 0, np.ones(len(listing), bool)
    is_new[places[is_listed]] = False
    labels = pd.api.types.union_categoricals([each["label"].astype("category") for each in (stored, listing)])
    known, listed = np.split(labels.codes, [len(stored)])
    columns = {"label": (np.where(is_listed, listed[places], known), listed)}
    for name, absent in (("bytes", VANISHED_BYTES), ("version", 0)):
        columns[name] = np.append(listing[name], np.int64(absent))[places], listing[name].to_numpy()
    merged = {name: np.concatenate([kept, values[is_new]]) for name, (kept, values) in columns.items()}
    classes = pd.Categorical.from_codes(merged.pop("label"), labels.categories).remove_unused_categories()
    paths = pd.concat([stored["path"], listing.loc[is_new, "path"]], ignore_index=True)
    return pd.DataFrame({"path": paths, "label": classes} | merged)


def take_listing(stored: pd.DataFrame) -> pd.DataFrame:
    """
    Take from the catalog of a store the listing of the input that it was made of.

    Parameters
    ----------
    stored : pandas.DataFrame
        The catalog of the store.

    Returns
    -------
    pandas.DataFrame
        The images that have not vanished, in the order of their paths.
    """
    return stored[stored["bytes"] != VANISHED_BYTES].sort_values("path", ignore_index=True)


def find_rows(paths: pd.Series, among: pd.Series) -> npt.NDArray[np.int64]:
    """
    Find paths among others.

    Parameters
    ----------
    paths : pandas.Series
        What to find.
    among : pandas.Series
        Where to find it; each path once.

    Returns
    -------
    numpy.ndarray
        Positions in ``among``, int64; -1 where it is not there.

    Examples
    --------
    >>> find_rows(pd.Series(["b", "x"]), pd.Series(["a", "b"]))
    array([ 1, -1])
    """
    found = pc.index_in(pa.array(paths), value_set=pa.array(among)).fill_null(-1)
    return np.asarray(found.to_numpy(), np.int64)


def _hash_rows(column: pd.Series) -> Iterator[npt.NDArray[np.integer]]:
    """Hash each row, some at a time: pandas makes a Python object of each text."""
    for start in range(0, len(column), _ROWS_AT_ONCE):
        yield pd.util.hash_pandas_object(column.iloc[start : start + _ROWS_AT_ONCE], index=False).to_numpy()


def _list_files(root: Location, extensions: tuple[str, ...]) -> pd.DataFrame:
    """List the files below a location that end so, sorted by path."""
    rows = _walk_folder(root.path) if root.is_local else _list_objects(root) if root.is_s3 else _find_files(root)
    columns = _Columns(PurePosixPath(root.path).name)
    with explained(root, "list"):
        for path, size, version in rows:
            if path.lower().endswith(extensions):
                _check_name(path, root)
                columns.append(path, size, version)
    return columns.to_frame()


class _Columns:
    """Files as columns that grow: as Python objects they would take ten times the memory."""

    def __init__(self, top: str) -> None:
        self._top = top
        self._paths, self._ends = bytearray(), array("q", [0])
        self._labels: dict[str, int] = {}
        self._codes, self._sizes, self._versions = array("i"), array("q"), array("q")
        self._last, self._is_sorted = b"", True

    def append(self, path: str, size: int, version: str) -> None:
        """Append a file."""
        encoded = path.encode()
        self._is_sorted &= self._last <= encoded
        self._last = encoded
        self._paths += encoded
        self._ends.append(len(self._paths))
        self._codes.append(self._labels.setdefault(_take_folder(path) or self._top, len(self._labels)))
        self._sizes.append(size)
        digest = hashlib.blake2b(version.encode(), digest_size=8).digest()
        self._versions.append(int.from_bytes(digest, "little", signed=True))

    def to_frame(self) -> pd.DataFrame:
        """Make a table of the columns, of the same memory."""
        n_files, buffers = len(self._sizes), [None, pa.py_buffer(self._ends), pa.py_buffer(self._paths)]
        columns = {
            "path": pa.Array.from_buffers(pa.large_string(), n_files, buffers).to_pandas(),
            "label": pd.Categorical.from_codes(
                np.frombuffer(self._codes, np.int32), pd.Index(list(self._labels), dtype="str")
            ),
            "bytes": np.frombuffer(self._sizes, np.int64),
            "version": np.frombuffer(self._versions, np.int64),
        }
        table = pd.DataFrame(columns, copy=False)
        # Disks and S3 list in the order of paths; directory buckets and other stores need not.
        return table if self._is_sorted else table.sort_values("path", ignore_index=True)


def _check_name(path: str, root: Location) -> None:
    """Refuse a name that cannot be stored or read back."""
    # Python carries bytes that are not UTF-8 as lone surrogates.
    if not path.isascii() and any("\ud800" <= character <= "\udfff" for character in path):
        raise CatalogError(f"{root.url}: found the file name {path!r}, expected names in UTF-8; rename that file")
    # s3fs takes the rest for the version of an object.
    if root.is_s3 and "?versionId=" in path:
        raise CatalogError(f"{root.url}: found the object {path!r}, expected names without ?versionId=; rename it")


def _list_objects(root: Location) -> Iterator[_Row]:
    """List the objects below a prefix on S3, page by page: s3fs would keep a dictionary for each of them."""
    bucket, key, _ = root.fs.split_path(root.path)
    request = {"Bucket": bucket, "Prefix": f"{key}/" if key else ""}
    skip = len(request["Prefix"])
    while True:
        page = root.fs.call_s3("list_objects_v2", **request)
        for entry in page.get("Contents", ()):
            # A name that ends in a slash marks a folder for people.
            if not entry["Key"].endswith("/"):
                yield entry["Key"][skip:], entry["Size"], entry.get("ETag", "").strip('"')
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def _find_files(root: Location) -> Iterator[_Row]:
    """List the files below a folder of any other file system."""
    root.fs.invalidate_cache()
    skip = len(root.path) + 1
    for path, info in root.fs.find(root.path, detail=True).items():
        if info["type"] == "file":
            yield path[skip:], int(info.get("size") or 0), _read_version(info)


def _walk_folder(top: str) -> Iterator[_Row]:
    """List the files below a local folder in the order of their paths, through links, but no folder twice: links may run in circles."""
    skip = len(top) + 1
    visited = {os.path.realpath(top or os.sep)}
    # The next one is the last one.
    waiting = _scan_folder(top or os.sep)
    while waiting:
        entry = waiting.pop()
        with suppress(FileNotFoundError):
            if entry.is_dir():
                real = os.path.realpath(entry.path)
                if real not in visited:
                    visited.add(real)
                    waiting += _scan_folder(entry.path)
            elif entry.is_file():
                status = entry.stat()
                yield entry.path[skip:].replace(os.sep, "/"), status.st_size, str(status.st_mtime_ns)


def _scan_folder(folder: str) -> list[os.DirEntry[str]]:
    """List a folder from behind, in the order of the paths of what is in it; that there is no top folder is said elsewhere."""
    try:
        with os.scandir(folder) as entries:
            # Links may also lead nowhere.
            found = [entry for entry in entries if not entry.is_symlink() or os.path.exists(entry.path)]
            return sorted(found, key=lambda entry: entry.name + "/" * entry.is_dir(), reverse=True)
    except FileNotFoundError:
        return []


def _read_version(info: dict[str, object]) -> str:
    """Read what changes when a file does: the ETag where there is one, else the time of modification."""
    for key in ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "created"):
        if info.get(key) is not None:
            return str(info[key]).strip('"')
    return ""


def _take_folder(path: str) -> str:
    """Take the name of the folder that a file lies in; empty at the top."""
    return path.rpartition("/")[0].rstrip("/").rpartition("/")[2]


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
    leading_out = manifest["path"][manifest["path"].str.contains(_LEADS_OUT)]
    if len(leading_out):
        raise ConfigError(
            f"{config.manifest}: expected paths inside input.url in input.manifest, found {leading_out.iloc[0]!r}; write it without .."
        )
    duplicated = manifest["path"][manifest["path"].duplicated()]
    if len(duplicated):
        raise ConfigError(
            f"{config.manifest}: expected each path once in input.manifest, found {duplicated.iloc[0]!r} twice; remove one"
        )
    places = find_rows(manifest["path"], files["path"])
    for name in ("bytes", "version"):
        manifest[name] = np.append(files[name], np.int64(0))[places]
    return manifest.astype({"label": "category"}).sort_values("path", ignore_index=True)


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
    wanted, existing = set(config.classes or ()), set(catalog["label"].unique())
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
