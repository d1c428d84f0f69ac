"""The catalog: which images there are. Nothing is decoded here."""

import fnmatch
import hashlib
import io
import json
import posixpath
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask.core.config import InputConfig
from fruitdask.core.labels import label_files, normalize_unique, read_labels, read_paths
from fruitdask.core.listing import GROUPINGS, Listing, find_rows, format_left_out, list_files
from fruitdask.core.partition import VANISHED_BYTES, Partition
from fruitdask.core.storage import Location, exists, explained, write_file
from fruitdask.errors import CatalogError
from fruitdask.store.layout import CATALOG
from fruitdask.store.tables import read_table

COLUMNS = ("path", "label", "bytes", "version")
#: Rows hashed at once: pandas makes a Python object of each text.
_ROWS_AT_ONCE = 65_536
#: Endings of files that are taken for a folder of images, and how such a folder is written.
_ARCHIVE_ENDINGS = {".zip": "zip", ".tar": "tar", ".tar.gz": "tar", ".tgz": "tar", ".tar.bz2": "tar", ".tar.xz": "tar"}
#: What is said of the endings that are taken by default.
_SHOWN_ENDINGS = (".jpg", ".png", ".webp", ".tif", ".bmp", ".gif", ".avif", ".jp2 ...")
_WILDCARDS = re.compile(r"[*?\[]")

#: Where ``featurize.images_per_partition`` is not given: about this many partitions, so that a few workers finish
#: together ...
_PARTITIONS_WANTED = 16
#: ... but a chunk neither so small that tasks and files cost more than the work, nor so large that an interruption
#: loses minutes.
_IMAGES_PER_PARTITION_RANGE = (32, 512)


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
        One row an image, sorted by ``path``, with the columns ``path`` (str, relative to the input URL), ``label``
        (category, the folder that ``input.label_from`` chooses, or the word in the table of labels), ``bytes`` (int64),
        ``version`` (int64, a hash of an object store's ETag, of a checksum in an archive, else of the time of
        modification), and where they are configured ``split`` and
        ``group`` (category).

    Raises
    ------
    CatalogError
        If there is no such folder, no image in it, or no image of a class that was asked for.
    ConfigError
        If the table of labels is no table of paths and labels, or a pattern does not match a path.
    StorageError
        If the input cannot be listed.
    """
    return list_input(config).files


def list_input(config: InputConfig) -> Listing:
    """List the images of an input, and say what was left out."""
    root = Location(config.url, config.storage_options)
    _check_folder(root, config)
    table = read_labels(config) if config.manifest is not None else None
    has_table = table is not None
    listing = list_files(
        root,
        ("",) if has_table else config.extensions,
        takes_hidden=has_table or config.hidden,
        rules=config.rules,
    )
    if listing.files.empty:
        raise CatalogError(_explain_empty(root, config, listing))
    catalog = _narrow(listing.files if table is None else label_files(table, listing.files, root, config), config)
    is_said = has_table or config.split_from is not None or "label_from" in config.model_fields_set
    names = [name for name in (*COLUMNS, *GROUPINGS) if name in catalog]
    return Listing(catalog[names], {} if has_table else listing.left_out, () if is_said else listing.notes)


def _narrow(catalog: pd.DataFrame, config: InputConfig) -> pd.DataFrame:
    """Keep the classes, as many images and the paths that the configuration asks for."""
    if config.classes is not None:
        catalog = _keep_classes(catalog, config)
    if config.limit is not None:
        catalog = catalog.iloc[sample_evenly(catalog, config.limit)].reset_index(drop=True)
    patterns = config.exclude
    if config.exclude_from is not None:
        patterns += read_paths(config.exclude_from, "input.exclude_from")
    if patterns:
        # Last, so that an image that is left out changes nothing about which others are in.
        catalog = catalog[~match_paths(catalog["path"], patterns)].reset_index(drop=True)
        if catalog.empty:
            name = "input.exclude" if config.exclude else "input.exclude_from"
            raise CatalogError(f"{config.url}: expected images besides those that {name} names, found none")
    return catalog


def match_paths(paths: pd.Series, patterns: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Return a mask of the paths that match any of some patterns.

    >>> match_paths(pd.Series(["pear_1/a.jpg", "pear_2/a.jpg", "Pear_1/a.jpg"]), ["pear_1/*"])
    array([ True, False, False])
    """
    match = re.compile("|".join(map(fnmatch.translate, patterns))).match
    return np.array([match(path) is not None for path in paths], bool)


def choose_partition_size(n_images: int) -> int:
    """Choose how many images a partition holds.

    >>> [choose_partition_size(n) for n in (10, 846, 1_000_000)]
    [32, 53, 512]
    """
    smallest, largest = _IMAGES_PER_PARTITION_RANGE
    return max(smallest, min(largest, -(-n_images // _PARTITIONS_WANTED)))


def split_catalog(catalog: pd.DataFrame, images_per_partition: int) -> Iterator[Partition]:
    """Split a catalog into partitions, one at a time."""
    for index, start in enumerate(range(0, len(catalog), images_per_partition)):
        rows = catalog.iloc[start : start + images_per_partition]
        paths, labels, sizes, versions = (tuple(rows[column]) for column in COLUMNS)
        yield Partition(index, start, paths, labels, sizes, versions)


def sample_evenly(catalog: pd.DataFrame, limit: int) -> npt.NDArray[np.int64]:
    """Choose at most ``limit`` rows, the same number of each class as far as it has them.

    Rows are taken class by class in turn, within a class by a hash of the path: the choice is reproducible, looks
    random, and a larger limit keeps what a smaller one chose.

    Returns the positions of the chosen rows, ascending, int64.

    >>> sample_evenly(pd.DataFrame({"path": ["a/1", "a/2", "a/3", "b/4"], "label": ["a", "a", "a", "b"]}), 2)[-1]
    np.int64(3)
    """
    order = np.concatenate([np.empty(0, np.uint64), *_hash_rows(catalog["path"])])
    turn = pd.Series(order).groupby(catalog["label"].array, observed=True).rank(method="first")
    return np.sort(np.lexsort((order, turn.to_numpy()))[:limit])


def hash_catalog(catalog: pd.DataFrame) -> str:
    """Hash what a catalog says."""
    digest = hashlib.sha256(json.dumps([len(catalog), *COLUMNS]).encode())
    for column in COLUMNS:
        for hashes in _hash_rows(catalog[column]):
            digest.update(hashes.tobytes())
    return digest.hexdigest()


def hash_groupings(catalog: pd.DataFrame) -> dict[str, str]:
    """Hash the splits and groups of a catalog, on which tables of results depend, and features do not."""
    hashed = {}
    for name in (name for name in GROUPINGS if name in catalog):
        digest = hashlib.sha256()
        for hashes in _hash_rows(catalog[name]):
            digest.update(hashes.tobytes())
        hashed[name] = digest.hexdigest()
    return hashed


def merge_listing(stored: pd.DataFrame, listing: pd.DataFrame) -> pd.DataFrame:
    """Bring the catalog of a store up to date with the input as it is now."""
    if stored["path"].equals(listing["path"]):
        return listing
    places = find_rows(stored["path"], listing["path"])
    is_listed, is_new = places >= 0, np.ones(len(listing), bool)
    is_new[places[is_listed]] = False
    merged: dict[str, Any] = {"path": pd.concat([stored["path"], listing.loc[is_new, "path"]], ignore_index=True)}
    for name in ("label", *GROUPINGS):
        if name in listing:
            merged[name] = _merge_words(stored.get(name), listing[name], places, is_new)
    for name, absent in (("bytes", VANISHED_BYTES), ("version", 0)):
        kept = np.append(listing[name], np.int64(absent))[places]
        merged[name] = np.concatenate([kept, listing[name].to_numpy()[is_new]])
    return pd.DataFrame({name: merged[name] for name in (*COLUMNS, *GROUPINGS) if name in merged})


def take_listing(stored: pd.DataFrame) -> pd.DataFrame:
    """Take from the catalog of a store the listing of the input that it was made of."""
    return stored[stored["bytes"] != VANISHED_BYTES].sort_values("path", ignore_index=True)


def _hash_rows(column: pd.Series) -> Iterator[npt.NDArray[np.integer]]:
    """Hash each row, some at a time: pandas makes a Python object of each text."""
    for start in range(0, len(column), _ROWS_AT_ONCE):
        yield pd.util.hash_pandas_object(column.iloc[start : start + _ROWS_AT_ONCE], index=False).to_numpy()


def _merge_words(
    stored: pd.Series | None, listed: pd.Series, places: npt.NDArray[np.int64], is_new: npt.NDArray[np.bool_]
) -> pd.Categorical:
    """Take words from the listing; those of images that it does not have stay as they were, and are empty where there
    were none.
    """
    if stored is None:
        stored = pd.Series([""] * len(places), dtype="str")
    words = pd.api.types.union_categoricals([each.astype("category") for each in (stored, listed)])
    known, codes = np.split(words.codes, [len(stored)])
    kept = np.where(places >= 0, codes[places], known)
    return pd.Categorical.from_codes(np.concatenate([kept, codes[is_new]]), words.categories).remove_unused_categories()


def _keep_classes(catalog: pd.DataFrame, config: InputConfig) -> pd.DataFrame:
    """Keep the classes that the configuration names, in whichever form of Unicode."""
    existing = set(catalog["label"].unique())
    composed = normalize_unique(existing)
    wanted = {
        name if name in existing else composed.get(unicodedata.normalize("NFC", name), name)
        for name in config.classes or ()
    }
    absent = sorted(wanted - existing)
    if absent:
        names = ", ".join(sorted(existing)[:30]) + (" ..." if len(existing) > 30 else "")
        raise CatalogError(
            f"{config.url}: input.classes names {', '.join(absent)}, which is not there; the classes are: {names}"
        )
    return catalog[catalog["label"].isin(wanted)].reset_index(drop=True)


def _check_folder(root: Location, config: InputConfig) -> None:
    """Refuse a file on a disk, which cannot be walked through."""
    if root.is_local and root.fs.isfile(root.path):
        raise CatalogError(_explain_file(config.url))


def _explain_file(url: str) -> str:
    """Describe what to write instead of a file."""
    if "::" in url:
        return f"{url}: expected a folder in the archive in input.url, found a file; write the folder that it is in"
    kind = next((kind for ending, kind in _ARCHIVE_ENDINGS.items() if url.lower().endswith(ending)), None)
    if kind is not None:
        return f"{url}: expected a folder of images in input.url, found an archive; write {kind}://::{url}"
    folder = posixpath.dirname(url) or "."
    return f"{url}: expected a folder of images in input.url, found a file; write the folder that it is in: {folder}"


def _explain_empty(root: Location, config: InputConfig, listing: Listing) -> str:
    """Explain why nothing was found."""
    with explained(root, "read"):
        if not exists(root):
            if _WILDCARDS.search(config.url) and not root.is_archive:
                folder = _WILDCARDS.split(config.url)[0].rpartition("/")[0]
                return (
                    f"{config.url}: expected a folder in input.url, found a pattern; write {folder or '.'}, all of "
                    "which is searched, "
                    "and choose among files by input.extensions, input.classes and input.exclude"
                )
            return f"{config.url}: there is no such folder; check input.url"
        if root.fs.isfile(root.path):
            return _explain_file(config.url)
    if config.manifest is not None:
        return f"{config.url}: expected the files that input.manifest names, found none; check input.url"
    left_out = format_left_out(listing.left_out, is_default=config.extensions is None)
    found = f"none but {left_out}" if left_out else "none"
    hidden = ", or take what is hidden by input.hidden: true" if "hidden" in listing.left_out else ""
    endings = ", ".join(config.extensions or _SHOWN_ENDINGS)
    return f"{config.url}: expected images ({endings}), found {found}; check input.url and input.extensions{hidden}"


def read_catalog(output: Location) -> pd.DataFrame | None:
    """Read the catalog of a store."""
    return read_table(output, CATALOG) if exists(output.child(CATALOG)) else None


def write_catalog(output: Location, catalog: pd.DataFrame) -> None:
    """Write the catalog of a store, all of it or none."""
    buffer = io.BytesIO()
    # Categories would keep the names of classes of which no image is left, and a dictionary of paths would hold each of
    # them.
    words = [name for name in ("label", *GROUPINGS) if name in catalog]
    table = catalog.astype(dict.fromkeys(words, "str"))
    table.to_parquet(buffer, index=False, compression="zstd", use_dictionary=words, write_page_checksum=True)
    write_file(output.child(CATALOG), buffer.getvalue())
