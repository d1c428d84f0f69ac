"""The catalog: which images there are. Nothing is decoded here."""

import fnmatch
import glob
import hashlib
import json
import posixpath
import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from fruitdask.core.config import InputConfig
from fruitdask.core.labels import label_files, locate_table, normalize_unique, read_labels, read_paths
from fruitdask.core.listing import GROUPINGS, Listing, find_rows, format_left_out, list_files
from fruitdask.core.partition import VANISHED_BYTES, Partition
from fruitdask.core.storage import Location, exists, explained
from fruitdask.errors import CatalogError
from fruitdask.store.catalog_file import ROWS_IN_MEMORY
from fruitdask.store.paths import ROWS_AT_ONCE, hash_rows

COLUMNS = ("path", "label", "bytes", "version")
#: A block of a catalog shares the memory of a listing if it consists of at most this many runs of the listing's rows:
#: more would be slow.
_MAX_RUNS = 256
#: Why groups should not span classes, or splits.
_ACROSS_CLASSES = (
    "images of a group count as one object, so if they show different ones, let input.group_from name the class too, "
    "such as (.*/[^/_]+)_"
)
_ACROSS_SPLITS = "images in one split do not test what was learned of the same object in another"
#: Endings of archives, and the protocols that read a folder in them.
_ARCHIVE_ENDINGS = {".zip": "zip", ".tar": "tar", ".tar.gz": "tar", ".tgz": "tar", ".tar.bz2": "tar", ".tar.xz": "tar"}
#: The default endings, as messages show them.
_SHOWN_ENDINGS = (".jpg", ".png", ".webp", ".tif", ".bmp", ".gif", ".avif", ".jp2 ...")
_WILDCARDS = re.compile(r"[*?\[]")

#: If ``featurize.images_per_partition`` is not set: about this many partitions, so that a few workers finish
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
        One row per image, sorted by ``path``, with the columns ``path`` (str, relative to the input URL), ``label``
        (category, the folder that ``input.label_from`` chooses, or the word in the table of labels), ``bytes`` (int64),
        ``version`` (int64, a hash of an object store's ETag, of a checksum in an archive, else of the time of
        modification), and if configured ``split`` and ``group`` (category).

    Raises
    ------
    CatalogError
        If there is no such folder, no image in it, or no image of a class that was asked for.
    ConfigError
        If the table of labels lacks paths or labels, or a pattern does not match a path.
    StorageError
        If the input cannot be listed.
    """
    return list_input(config).files


def list_input(config: InputConfig, *, on_listed: Callable[[int], None] = lambda n_files: None) -> Listing:
    """List the images of an input, and count skipped files; `on_listed` is called with the number found so far."""
    root = Location(config.url, config.storage_options)
    _check_folder(root, config)
    table = read_labels(config) if config.manifest is not None else None
    has_table = table is not None
    listing = list_files(
        root,
        ("",) if has_table else config.extensions,
        takes_hidden=has_table or config.hidden,
        rules=config.rules,
        inventory=locate_table(config, config.inventory) if config.inventory is not None else None,
        on_listed=on_listed,
    )
    if listing.files.empty:
        raise CatalogError(_explain_empty(root, config, listing))
    catalog = _narrow(listing.files if table is None else label_files(table, listing.files, root, config), config)
    is_said = has_table or config.split_from is not None or "label_from" in config.model_fields_set
    names = [name for name in (*COLUMNS, *GROUPINGS) if name in catalog]
    notes = _describe_alike(catalog["label"].unique()) + (() if is_said else listing.notes)
    notes += () if has_table else _describe_backslashes(catalog["path"])
    notes += _describe_shared(catalog)
    return Listing(catalog[names], {} if has_table else listing.left_out, notes)


def _describe_backslashes(paths: pd.Series) -> tuple[str, ...]:
    """Warn of backslashes, which old Windows programs write into archives: such paths have no folder, so no class."""
    odd = paths[paths.str.contains("\\", regex=False)]
    if odd.empty:
        return ()
    names = f"{len(odd):,} paths have a backslash" if len(odd) > 1 else "one path has a backslash"
    return (
        f"{names}, such as {odd.iloc[0]!r}, which counts as part of a name; if it separates folders, pack the archive "
        "again with forward slashes",
    )


def _describe_shared(catalog: pd.DataFrame) -> tuple[str, ...]:
    """Describe groups across classes, where a number that restarts in each class names no object; or across splits."""
    if "group" not in catalog:
        return ()
    notes = []
    for column, parts, advice in (("label", "classes", _ACROSS_CLASSES), ("split", "splits", _ACROSS_SPLITS)):
        pairs = catalog.filter(["group", column]).drop_duplicates().astype("str")
        shared = pairs[(pairs["group"] != "") & pairs["group"].duplicated(keep=False)]
        if len(shared):
            name, n_groups = shared["group"].iloc[0], shared["group"].nunique()
            first, second = sorted(shared.loc[shared["group"] == name, column])[:2]
            groups = f"{n_groups:,} groups span" if n_groups > 1 else "one group spans"
            notes.append(f"{groups} several {parts}, such as {name!r} in {first!r} and {second!r}; {advice}")
    return tuple(notes)


def _describe_alike(classes: Iterable[str]) -> tuple[str, ...]:
    """Describe classes whose names look the same to a person."""
    firsts, pairs = dict[str, str](), list[str]()
    for name in sorted(classes):
        key = re.sub(r"[\s_]+", " ", unicodedata.normalize("NFKC", name).casefold()).strip()
        if firsts.setdefault(key, name) != name:
            pairs.append(f"{firsts[key]!r} and {name!r}")
    if not pairs:
        return ()
    more = f", and {len(pairs) - 1:,} more," * (len(pairs) > 1)
    return (f"the classes {pairs[0]}{more} differ only in case, spaces or form of Unicode; if they are one, rename it",)


def _narrow(catalog: pd.DataFrame, config: InputConfig) -> pd.DataFrame:
    """Keep the classes, the number of images and the paths that are configured."""
    if config.classes is not None:
        catalog = _keep_classes(catalog, config)
    if config.limit is not None:
        catalog = catalog.iloc[sample_evenly(catalog, config.limit)].reset_index(drop=True)
    patterns = escape_paths(config.exclude, catalog["path"])
    if config.exclude_from is not None:
        patterns += read_paths(config.exclude_from, "input.exclude_from")
    if patterns:
        # Last, so that excluding an image does not change the choice of the others.
        catalog = _keep_rows(catalog, ~match_paths(catalog["path"], patterns))
        if catalog.empty:
            name = "input.exclude" if config.exclude else "input.exclude_from"
            raise CatalogError(f"{config.url}: expected images other than those that {name} names, found none")
    return catalog


def _keep_rows(catalog: pd.DataFrame, is_kept: npt.NDArray[np.bool_]) -> pd.DataFrame:
    """Keep some rows; pandas would also make an index of them and another copy, which is 18 bytes per image."""
    return pd.DataFrame({name: catalog[name].array[is_kept] for name in catalog}, copy=False)


def match_paths(paths: pd.Series, patterns: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Return a mask of the paths that match any of some patterns.

    >>> match_paths(pd.Series(["pear_1/a.jpg", "pear_2/a.jpg", "Pear_1/a.jpg"]), ["pear_1/*"])
    array([ True, False, False])
    """
    match = re.compile("|".join(map(fnmatch.translate, patterns))).match
    return np.fromiter((match(path) is not None for path in paths), bool, len(paths))


def escape_paths(patterns: Sequence[str], paths: pd.Series) -> tuple[str, ...]:
    """Escape the patterns that are one of some paths, so that they match only it.

    >>> escape_paths(["a[1].jpg", "b[1].jpg"], pd.Series(["a1.jpg", "a[1].jpg"]))
    ('a[[]1].jpg', 'b[1].jpg')
    """
    known = set(paths[paths.isin([pattern for pattern in patterns if _WILDCARDS.search(pattern)])])
    return tuple(glob.escape(pattern) if pattern in known else pattern for pattern in patterns)


def choose_partition_size(n_images: int) -> int:
    """Choose how many images a partition holds.

    >>> [choose_partition_size(n) for n in (10, 846, 1_000_000)]
    [32, 53, 512]
    """
    smallest, largest = _IMAGES_PER_PARTITION_RANGE
    return max(smallest, min(largest, -(-n_images // _PARTITIONS_WANTED)))


def split_catalog(
    catalog: pd.DataFrame, images_per_partition: int, *, among: Container[int] | None = None
) -> Iterator[Partition]:
    """Split a catalog into partitions, or into those with certain indices, one at a time."""
    for index, start in enumerate(range(0, len(catalog), images_per_partition)):
        if among is None or index in among:
            rows = slice(start, start + images_per_partition)
            paths, labels, sizes, versions = (tuple(catalog[column].iloc[rows].tolist()) for column in COLUMNS)
            yield Partition(index, start, paths, labels, sizes, versions)


def take_rows(catalog: pd.DataFrame, rows: npt.NDArray[np.int64]) -> pd.DataFrame:
    """Take rows in ascending order, block by block: pandas would first copy all paths if they are in several pieces."""
    starts = range(0, len(catalog), ROWS_IN_MEMORY)
    pieces = np.split(rows, np.searchsorted(rows, starts[1:]))
    blocks = (catalog.iloc[start : start + ROWS_IN_MEMORY] for start in starts)
    return pd.concat([block.iloc[piece - start] for block, piece, start in zip(blocks, pieces, starts, strict=True)])


def sample_evenly(
    catalog: pd.DataFrame, limit: int, *, among: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.int64]:
    """Choose at most ``limit`` rows, of all or of ``among``, the same number of each class if there are enough.

    Rows are taken class by class in turn, within a class by a hash of the path: the choice is reproducible, looks
    random, and a larger limit keeps what a smaller one chose.

    Returns the positions of the chosen rows, ascending, int64.

    >>> sample_evenly(pd.DataFrame({"path": ["a/1", "a/2", "a/3", "b/4"], "label": ["a", "a", "a", "b"]}), 2)[-1]
    np.int64(3)
    """
    codes = np.asarray(catalog["label"].astype("category").cat.codes)
    rows, hashes, start = np.empty(0, np.int64), np.empty(0, np.uint64), 0
    # A row that is chosen from all is also chosen from any subset that contains it, so blocks can be merged.
    for block in hash_rows(catalog["path"], n_rows=max(limit, ROWS_AT_ONCE)):
        here = slice(start, start := start + len(block))
        places = np.arange(len(block)) if among is None else np.flatnonzero(among[here])
        rows, hashes = np.append(rows, here.start + places), np.append(hashes, block.view(np.uint64)[places])
        chosen = _deal(codes[rows], hashes)[:limit]
        rows, hashes = rows[chosen], hashes[chosen]
    return np.sort(rows)


def _deal(codes: npt.NDArray[np.integer], order: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Return the places of rows class by class in turn, within a class in an order; ties stay as they are."""
    places = np.lexsort((order, codes))
    firsts = np.flatnonzero(np.diff(codes[places], prepend=-1))
    turns = np.empty(len(places), np.int64)
    turns[places] = np.arange(len(places)) - np.repeat(firsts, np.diff(firsts, append=len(places)))
    return np.lexsort((order, turns))


def hash_catalog(catalog: pd.DataFrame) -> str:
    """Hash the content of a catalog."""
    return _hash_columns(len(catalog), (hash_rows(catalog[column]) for column in COLUMNS))


def hash_listing(stored: Iterable[pd.DataFrame]) -> str:
    """Hash the listing that the catalog of a store was made from, read in blocks, as `hash_catalog` does."""
    paths, hashes = list[pa.Array](), {column: list[npt.NDArray[np.integer]]() for column in COLUMNS}
    for block in stored:
        listed = block[block["bytes"] != VANISHED_BYTES]
        found = pa.table({"path": listed["path"]}).column("path").cast(pa.large_string())
        # This copies: an array that Arrow has filtered may take twice the memory of its content.
        paths.append(pa.concat_arrays([*found.chunks, pa.array([], pa.large_string())]))
        for column in COLUMNS:
            hashes[column] += hash_rows(listed[column])
    order = pc.array_sort_indices(pa.chunked_array(paths, pa.large_string())).to_numpy()
    return _hash_columns(len(order), ([np.concatenate(hashes.pop(column))[order]] for column in COLUMNS))


def _hash_columns(n_rows: int, columns: Iterable[Iterable[npt.NDArray[np.integer]]]) -> str:
    """Hash the hashes of the rows of each column."""
    digest = hashlib.sha256(json.dumps([n_rows, *COLUMNS]).encode())
    for hashes in chain.from_iterable(columns):
        digest.update(hashes.tobytes())
    return digest.hexdigest()


def hash_groupings(catalog: pd.DataFrame) -> dict[str, str]:
    """Hash the splits and groups of a catalog, on which tables of results depend, and features do not."""
    hashed = {}
    for name in (name for name in GROUPINGS if name in catalog):
        digest = hashlib.sha256()
        for hashes in hash_rows(catalog[name]):
            digest.update(hashes.tobytes())
        hashed[name] = digest.hexdigest()
    return hashed


def merge_listing(
    stored: Iterable[pd.DataFrame],
    listing: pd.DataFrame,
    *,
    on_block: Callable[[pd.DataFrame, pd.DataFrame], None] = lambda before, now: None,
) -> pd.DataFrame:
    """Bring the catalog of a store, read in blocks, up to date with the input as it is now.

    `on_block` is called with each block as it was, and with its columns ``label``, ``bytes`` and ``version`` as they
    are now. The result shares the memory of the listing's paths where it can.
    """
    paths, blocks, start = listing["path"], list[dict[str, Any]](), 0
    words = {name: _Words(listing[name]) for name in ("label", *GROUPINGS) if name in listing}
    is_new, is_same = np.ones(len(listing), bool), True
    for block in stored:
        places = _find_block(block["path"], paths, start)
        is_new[places[places >= 0]] = False
        is_same &= bool(np.array_equal(places, np.arange(start, start := start + len(block))))
        codes = {name: each.merge(block.get(name), places) for name, each in words.items()}
        on_block(block, pd.DataFrame(_take_versions(listing, places) | {"label": words["label"].name(codes["label"])}))
        blocks.append({"path": _share_paths(block["path"], paths, places), "place": places.astype(np.int32), **codes})
    if is_same and start == len(listing):
        return listing
    added = np.flatnonzero(is_new)
    blocks.append(
        {"path": paths.iloc[added], "place": added} | {name: each.codes[added] for name, each in words.items()}
    )
    merged: dict[str, Any] = {"path": pd.concat([each.pop("path") for each in blocks], ignore_index=True)}
    for name, each in words.items():
        # One column at a time, whose pieces are then no longer needed.
        column = np.concatenate([block.pop(name) for block in blocks])
        merged[name] = each.name(column).remove_unused_categories()
    merged |= _take_versions(listing, np.concatenate([block.pop("place") for block in blocks]))
    return pd.DataFrame({name: merged[name] for name in (*COLUMNS, *GROUPINGS) if name in merged}, copy=False)


class _Words:
    """The words of a column, coded as in a listing; words of images that it lacks get new codes."""

    def __init__(self, listed: pd.Series) -> None:
        self._listed = listed.astype("category").cat
        self._numbers = {word: number for number, word in enumerate(self._listed.categories)}

    @property
    def codes(self) -> npt.NDArray[np.int32]:
        """The codes of the listing."""
        return np.asarray(self._listed.codes, np.int32)

    def merge(self, stored: pd.Series | None, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Take the codes at some places of the listing; vanished images keep their stored word, or an empty one."""
        codes, is_gone = _take(self._listed.codes, places, 0).astype(np.int32), places < 0
        if is_gone.any():
            words = [""] * int(is_gone.sum()) if stored is None else stored[is_gone].tolist()
            codes[is_gone] = [self._numbers.setdefault(word, len(self._numbers)) for word in words]
        return codes

    def name(self, codes: npt.NDArray[np.int32]) -> pd.Categorical:
        """Convert codes to words."""
        return pd.Categorical.from_codes(codes, pd.Index(list(self._numbers), dtype="str"))


def _take_versions(listing: pd.DataFrame, places: npt.NDArray[np.integer]) -> dict[str, npt.NDArray[Any]]:
    """Take the versions of the files at some places of a listing, and those of a vanished file where a place is -1."""
    return {
        "bytes": _take(listing["bytes"], places, VANISHED_BYTES),
        "version": _take(listing["version"], places, 0),
    }


def _take(column: pd.Series, places: npt.NDArray[np.integer], absent: int) -> npt.NDArray[Any]:
    """Take the values at some places, and another value where a place is -1."""
    if column.empty:
        return np.full(len(places), absent, np.int64)
    return np.where(places < 0, column.dtype.type(absent), column.to_numpy()[places])


def _find_block(block: pd.Series, paths: pd.Series, start: int) -> npt.NDArray[np.int64]:
    """Find the positions of the paths of a block among sorted paths; -1 for missing ones.

    Most blocks are at or near their old place. This saves a table of all paths, which would take much memory.
    """
    if paths.iloc[start : start + len(block)].array.equals(block.array):
        return np.arange(start, start + len(block))
    known, ends = pa.array(paths), pc.min_max(pa.array(block))
    first = bisect_left(known, ends["min"].as_py(), key=str)
    last = bisect_right(known, ends["max"].as_py(), first, key=str)
    places = find_rows(paths.iloc[first:last], block)
    rows, found = np.flatnonzero(places >= 0), np.full(len(block), -1, np.int64)
    found[places[rows]] = first + rows
    return found


def _share_paths(block: pd.Series, paths: pd.Series, places: npt.NDArray[np.int64]) -> pd.Series:
    """Return the paths of a block, as views of the sorted paths if a few runs of these make up the block."""
    firsts = np.flatnonzero(np.diff(places, prepend=-2) != 1)
    if (places < 0).any() or not 0 < len(firsts) <= _MAX_RUNS:
        return block
    lasts = places[np.append(firsts[1:], len(places)) - 1]
    runs = [paths.iloc[first : last + 1] for first, last in zip(places[firsts], lasts, strict=True)]
    shared: pd.Series = pd.concat(runs)
    return shared


def _keep_classes(catalog: pd.DataFrame, config: InputConfig) -> pd.DataFrame:
    """Keep the classes that the configuration names, in any Unicode form."""
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
    return _keep_rows(catalog, catalog["label"].isin(wanted).to_numpy())


def _check_folder(root: Location, config: InputConfig) -> None:
    """Refuse a local file in place of a folder."""
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
    """Explain why no image was found."""
    with explained(root, "read"):
        # An inventory without files below the input was refused before.
        if config.inventory is None and not exists(root):
            if _WILDCARDS.search(config.url) and not root.is_archive:
                folder = _WILDCARDS.split(config.url)[0].rpartition("/")[0]
                return (
                    f"{config.url}: expected a folder in input.url, found a pattern; write {folder or '.'}, which is "
                    "searched at all levels, and choose files with input.extensions, input.classes and input.exclude"
                )
            return f"{config.url}: there is no such folder; check input.url"
        if root.fs.isfile(root.path):
            return _explain_file(config.url)
    if config.manifest is not None:
        return f"{config.url}: expected the files that input.manifest names, found none; check input.url"
    left_out = format_left_out(listing.left_out, is_default=config.extensions is None)
    found = f"only {left_out}" if left_out else "none"
    hidden = ", or include hidden files with input.hidden: true" if "hidden" in listing.left_out else ""
    endings = ", ".join(config.extensions or _SHOWN_ENDINGS)
    return f"{config.url}: expected images ({endings}), found {found}; check input.url and input.extensions{hidden}"
