"""Listing of the images below a folder on a disk, on S3 or Azure, in an archive or elsewhere."""

import hashlib
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby, islice, repeat
from operator import le
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from fruitdask.core.inventory import check_unique, list_inventory
from fruitdask.core.prefixes import Row, list_below
from fruitdask.core.storage import Location, explained
from fruitdask.errors import CatalogError, ConfigError

#: Default of ``input.extensions``: the formats that can be decoded, as cameras, browsers and download tools spell them.
IMAGE_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".dib", ".gif", ".avif"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    *(f".{kind}{mark}{end}" for kind in ("jpg", "jpeg", "png") for mark in "_-" for end in ("large", "orig", "small")),
)
HEIC_ENDINGS = (".heic", ".heif", ".hif")

#: Names of files and folders of systems and devices, in any case: macOS, Windows, Synology, QNAP, ext4.
_SYSTEM_NAMES = {
    *("__macosx", "network trash folder", "temporary items", "icon\r"),
    *("$recycle.bin", "recycler", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini"),
    *("@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "lost+found"),
}

#: Optional columns: the part of the data that an image belongs to, and the object that it shows. Features do not depend
#: on them.
GROUPINGS = ("split", "group")

#: Kinds of skipped files, in addition to endings.
HIDDEN, NO_ENDING, OTHER_ENDINGS = "hidden", "without an extension", "with other extensions"
_SAME, _BROKEN = "links to files already listed", "broken links"
#: Maximum of endings that are counted separately, and that are shown.
_MAX_ENDINGS, _MAX_SHOWN = 1_000, 10
_ENDING = re.compile(r"\.[\w+~-]{1,15}")
#: Up to this many folders are searched one by one, each with one or more requests; more of them are searched at once.
_MAX_FOLDERS = 10_000

_SURROGATE = re.compile("[\ud800-\udfff]")
#: Files that are listed and described at once.
_ROWS_AT_ONCE = 8_192

#: Extracts a name from a path; None if there is none.
Rule = Callable[[str], str | None]


@dataclass(frozen=True, eq=False)
class Listing:
    """The files that were found, and counts of those that were skipped."""

    #: ``path``, ``label``, ``bytes``, ``version`` and optionally ``split`` and ``group``, sorted by path.
    files: pd.DataFrame
    #: Number of skipped files and folders by kind: an ending, or words such as ``hidden``.
    left_out: Mapping[str, int]
    #: Messages for the user.
    notes: tuple[str, ...] = ()


class _Selection:
    """Selects files by name, and counts the skipped ones by kind."""

    def __init__(self, extensions: tuple[str, ...], *, takes_hidden: bool) -> None:
        self._takes_hidden = takes_hidden
        # A set is faster than a comparison with each ending.
        self._endings = frozenset(ending for ending in extensions if ending.rfind(".") == 0)
        # Names with these endings need no other check unless they begin with a dot.
        self._plain = self._endings - {name[name.rfind(".") :] for name in _SYSTEM_NAMES}
        self._longer = tuple(ending for ending in extensions if ending not in self._endings)
        self.left_out = Counter[str]()
        self._folder, self._is_hidden = "", False

    def hides(self, name: str) -> bool:
        """Whether the name of a file or folder is hidden; names such as "..." are not."""
        return not self._takes_hidden and (name[:1] == "." != name[1:2] or name.lower() in _SYSTEM_NAMES)

    def has_ending(self, name: str) -> bool:
        """Whether a name has the ending of an image."""
        lower = name.lower()
        return lower[lower.rfind(".") :] in self._endings or lower.endswith(self._longer)

    def takes(self, name: str) -> bool:
        """Check the name of a file in a folder that is not hidden, and count it if it is skipped."""
        if name[name.rfind(".") :] in self._plain and name[0] != ".":
            return True
        if self.hides(name):
            self.left_out[HIDDEN] += 1
        elif self.has_ending(name):
            return True
        else:
            self._count_ending(name)
        return False

    def takes_path(self, path: str) -> bool:
        """Check the path of a file, and count it if it is skipped; consecutive files of a hidden folder count once."""
        folder, _, name = path.rpartition("/")
        if folder != self._folder:
            hidden = next((n for n, part in enumerate(folder.split("/"), 1) if self.hides(part)), None)
            # Count the topmost hidden folder, not those below it.
            top = "/".join(folder.split("/")[:hidden]) if hidden else ""
            if hidden and not (self._is_hidden and f"{self._folder}/".startswith(f"{top}/")):
                self.left_out[HIDDEN] += 1
            self._folder, self._is_hidden = folder, hidden is not None
        return not self._is_hidden and self.takes(name)

    def _count_ending(self, name: str) -> None:
        """Count a file by its ending, up to a number of different endings."""
        ending = "." + name.rpartition(".")[2].lower() if "." in name[1:] else NO_ENDING
        is_known = ending in self.left_out or len(self.left_out) < _MAX_ENDINGS
        is_kind = ending == NO_ENDING or (is_known and _ENDING.fullmatch(ending))
        self.left_out[ending if is_kind else OTHER_ENDINGS] += 1


def can_read_heic() -> bool:
    """Whether the package of the extra `heic`, which reads HEIC images, is installed; without importing it."""
    return find_spec("pillow_heif") is not None


def list_files(
    root: Location,
    extensions: tuple[str, ...] | None,
    *,
    takes_hidden: bool,
    rules: Mapping[str, str],
    inventory: Location | None = None,
    on_listed: Callable[[int], None] = lambda n_files: None,
) -> Listing:
    """List the files below a location; `rules` say how label, split and group follow from a path.

    An inventory names the files, in place of the location itself. `on_listed` is called with the number of files found
    so far.
    """
    selection = _Selection(_choose_extensions(extensions), takes_hidden=takes_hidden)
    columns = _Columns(PurePosixPath(root.path).name or PurePosixPath(root.base.path).stem, rules)
    with explained(root, "list"):
        found = _list_rows(root, inventory, selection)
        while rows := list(islice(found, _ROWS_AT_ONCE)):
            _check_names([path for path, _, _ in rows], root)
            columns.extend(rows)
            on_listed(len(columns))
    files = columns.to_frame()
    if inventory is not None:
        check_unique(files["path"], inventory)
    return Listing(files, _sort_kinds(selection.left_out), columns.describe_merged())


def _choose_extensions(extensions: tuple[str, ...] | None) -> tuple[str, ...]:
    """Choose the endings of images, and refuse those that cannot be read here."""
    if extensions is None:
        return IMAGE_ENDINGS + HEIC_ENDINGS * can_read_heic()
    heic = [ending for ending in extensions if ending in HEIC_ENDINGS]
    if heic and not can_read_heic():
        raise ConfigError(
            f"input.extensions names {heic[0]}, which needs a package that is not installed; run pip install "
            "'fruitdask[heic]', here and on the workers"
        )
    return extensions


def _sort_kinds(left_out: Mapping[str, int]) -> dict[str, int]:
    """Sort kinds of skipped files by frequency; combine the least frequent endings."""
    endings = sorted((kind for kind in left_out if kind[0] == "."), key=lambda kind: (-left_out[kind], kind))
    kinds = {kind: left_out[kind] for kind in endings[:_MAX_SHOWN]}
    n_others = left_out.get(OTHER_ENDINGS, 0) + sum(left_out[kind] for kind in endings[_MAX_SHOWN:])
    rest = {OTHER_ENDINGS: n_others} | {kind: left_out.get(kind, 0) for kind in (NO_ENDING, HIDDEN, _SAME, _BROKEN)}
    return kinds | {kind: count for kind, count in rest.items() if count}


def format_left_out(left_out: Mapping[str, int], *, is_default: bool) -> str:
    """Describe the skipped files.

    >>> format_left_out({".heic": 60, ".mov": 2, "hidden": 3}, is_default=True)
    '60 .heic (install fruitdask[heic] to read them), 2 .mov, 3 hidden'
    """
    hint = " (install fruitdask[heic] to read them)" * is_default
    return ", ".join(f"{count:,} {kind}{hint * (kind in HEIC_ENDINGS)}" for kind, count in left_out.items())


def compile_rule(rule: str) -> Rule:
    """Make a function that extracts a name from a path.

    >>> [compile_rule(rule)("train/pear/1.jpg") for rule in ("parent", "first", "^[^/]+/([^/]+)/")]
    ['pear', 'train', 'pear']
    """
    if rule == "parent":
        return lambda path: path.rpartition("/")[0].rstrip("/").rpartition("/")[2]
    if rule == "first":
        return lambda path: path.lstrip("/").partition("/")[0] if "/" in path else ""
    search = re.compile(rule).search
    return lambda path: found[1] or None if (found := search(path)) else None


def digest_version(version: str) -> int:
    """Hash the version of a file to 64 bits."""
    return digest_versions([version])[0]


def digest_versions(versions: Sequence[str]) -> list[int]:
    """Hash the versions of files to 64 bits each."""
    digests = [hashlib.blake2b(version.encode(), digest_size=8).digest() for version in versions]
    return np.frombuffer(b"".join(digests), "<i8").tolist()  # type: ignore[no-any-return]


def find_rows(paths: pd.Series, among: pd.Series) -> npt.NDArray[np.int64]:
    """Find the positions of paths among others, int64; -1 for those that are not there.

    >>> find_rows(pd.Series(["b", "x"]), pd.Series(["a", "b"]))
    array([ 1, -1])
    """
    found = pc.index_in(pa.array(paths), value_set=pa.array(among)).fill_null(-1)
    return np.asarray(found.to_numpy(), np.int64)


class _Columns:
    """Growing columns of files: Python objects would take ten times the memory."""

    def __init__(self, top: str, rules: Mapping[str, str]) -> None:
        self._top, self._rules = top, rules
        self._paths, self._ends = bytearray(), array("q", [0])
        self._choose = {name: compile_rule(rule) for name, rule in self._rules.items()}
        self._names: dict[str, dict[str, int]] = {name: {} for name in self._rules}
        self._codes = {name: array("i") for name in self._rules}
        self._sizes, self._versions = array("q"), array("q")
        self._last, self._is_sorted = b"", True
        # Files of one folder have the same class, unless a pattern depends on their names.
        self._by_folder = {name for name, rule in self._rules.items() if rule in ("parent", "first")}
        # The first folder of each class, and a second one of each class with several.
        self._first, self._other = dict[int, str](), dict[int, str]()

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self._sizes)

    def extend(self, rows: Sequence[Row]) -> None:
        """Append files, many at once, which takes less time."""
        paths = [path for path, _, _ in rows]
        encoded = [path.encode() for path in paths]
        self._is_sorted &= self._last <= encoded[0] and all(map(le, encoded, encoded[1:]))
        self._last = encoded[-1]
        self._paths += b"".join(encoded)
        self._ends.extend((np.cumsum([len(path) for path in encoded]) + self._ends[-1]).tolist())
        self._sizes.extend([size for _, size, _ in rows])
        self._versions.extend(digest_versions([version for _, _, version in rows]))
        for folder, here in groupby(paths, key=_get_folder):
            self._append_names(folder, list(here))

    def _append_names(self, folder: str, paths: list[str]) -> None:
        """Append the classes, splits and groups of consecutive files of a folder."""
        for name, codes in self._codes.items():
            if name in self._by_folder:
                codes.extend(repeat(self._encode(name, paths[0]), len(paths)))
            else:
                codes.extend(self._encode(name, path) for path in paths)
        code = self._codes["label"][-len(paths)]
        if self._first.setdefault(code, folder) != folder:
            self._other.setdefault(code, folder)

    def _encode(self, name: str, path: str) -> int:
        """Extract the class, the split or the group from a path, as a code."""
        chosen = self._choose[name](path)
        if chosen is None:
            raise ConfigError(
                f"input.{name}_from: expected the group of {self._rules[name]} to match a name in each path, found "
                f"none in {path!r}; change the pattern"
            )
        names = self._names[name]
        return names.setdefault(chosen or self._top, len(names))

    def describe_merged(self) -> tuple[str, ...]:
        """Describe the classes that combine several folders."""
        if not self._other:
            return ()
        code, other = next(iter(self._other.items()))
        several = f"{len(self._other):,} classes come" if len(self._other) > 1 else "one class comes"
        example = f"such as {self._first[code] or '.'} and {other or '.'}"
        remedy = "set input.label_from, and if it is the split (train, test), set input.split_from"
        return (f"{several} from several folders of one name, {example}; if another folder is the class, {remedy}",)

    def to_frame(self) -> pd.DataFrame:
        """Make a table that takes over the columns' memory."""
        n_files, ends, paths = len(self._sizes), pa.py_buffer(self._ends), pa.py_buffer(self._paths)
        self._ends, self._paths = array("q", [0]), bytearray()
        named = {
            name: pd.Categorical.from_codes(
                np.frombuffer(self._codes[name], np.int32), pd.Index(list(self._names[name]), dtype="str")
            )
            for name in self._rules
        }
        columns = {
            "path": pa.Array.from_buffers(pa.large_string(), n_files, [None, ends, paths]).to_pandas().array,
            "label": named.pop("label"),
            "bytes": np.frombuffer(self._sizes, np.int64),
            "version": np.frombuffer(self._versions, np.int64),
            **named,
        }
        del ends, paths
        # Disks (except links) and S3 list in the order of paths; directory buckets, inventories and others may not.
        return pd.DataFrame(columns if self._is_sorted else _sort_rows(columns, self._rules), copy=False)


def _sort_rows(columns: dict[str, Any], words: Iterable[str]) -> dict[str, Any]:
    """Sort rows by path, and words by their first row: input.limit takes classes in this order."""
    order = columns["path"].argsort()
    # One column after the other, for the table is as large as it gets.
    for name in columns:
        columns[name] = columns[name].take(order)
    return columns | {name: columns[name].reorder_categories(columns[name].unique().astype("str")) for name in words}


def _get_folder(path: str) -> str:
    """Return the folder of a file."""
    return path.rpartition("/")[0]


def _check_names(paths: Sequence[str], root: Location) -> None:
    """Refuse names that cannot be stored or read back."""
    together = "\n".join(paths)
    # Python represents bytes that are not UTF-8 as lone surrogates.
    if not together.isascii() and (odd := next((path for path in paths if _SURROGATE.search(path)), None)):
        raise CatalogError(f"{root.url}: found the file name {odd!r}, expected names in UTF-8; rename that file")
    # s3fs reads the rest as the version of an object.
    if root.is_s3 and "?versionId=" in together:
        odd = next(path for path in paths if "?versionId=" in path)
        raise CatalogError(f"{root.url}: found the object {odd!r}, expected names without ?versionId=; rename it")


def _list_rows(root: Location, inventory: Location | None, selection: _Selection) -> Iterator[Row]:
    """List the selected files of any file system, or those that an inventory names."""
    if inventory is not None:
        rows = list_inventory(root, inventory)
    elif root.is_local:
        return _Walk(root.path or os.sep, selection).list_rows()
    else:
        rows = (
            list_below(root.fs, root.path) if root.is_s3 else _list_pages(root) if root.is_azure else _find_files(root)
        )
    return (row for row in rows if selection.takes_path(row[0]))


def _list_pages(root: Location) -> Iterator[Row]:
    """List the files below a folder on Azure, page by page: fsspec would keep a dictionary per file."""
    rows, token = root.fs.list_page(root.path)
    yield from rows
    while token:
        rows, token = root.fs.list_page(root.path, token)
        yield from rows


def _find_files(root: Location) -> Iterator[Row]:
    """List the files below a folder of any other file system, whose root may have an empty name or a slash."""
    top, skip = root.path, len(root.path) + 1
    for path, info in _find_by_folder(root.fs, top):
        # Some stores have a file with the name of the folder.
        if info["type"] == "file" and path != top:
            yield path[skip:] if top else path.lstrip("/"), int(info.get("size") or 0), _read_version(info)


def _find_by_folder(fs: Any, top: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Find files in the order of paths, one folder after the other: fsspec keeps a dictionary per file."""
    fs.invalidate_cache()
    entries: list[dict[str, Any]] = []
    with suppress(FileNotFoundError, NotADirectoryError):
        entries = fs.ls(top, detail=True)
    if not 0 < sum(entry["type"] == "directory" for entry in entries) <= _MAX_FOLDERS:
        yield from fs.find(top, detail=True).items()
        return
    for entry in sorted(entries, key=lambda each: each["name"].rstrip("/") + "/" * (each["type"] == "directory")):
        if entry["type"] == "directory" and entry["name"].rstrip("/") != top:
            yield from fs.find(entry["name"], detail=True).items()
            fs.invalidate_cache()
        else:
            yield entry["name"], entry


def _read_version(info: Mapping[str, object]) -> str:
    """Read a text that changes when a file does: its checksum if there is one, else its time of modification."""
    for key in ("version", "ETag", "etag", "md5Hash", "LastModified", "last_modified", "created"):
        if (value := info.get(key)) is not None:
            return str(value).strip('"')
    return ""


class _Walk:
    """A walk over a local folder: first real files, then linked folders, then linked files, each file once.

    Several links to one file outside the folder are several images: git-annex and caches store duplicates like that.
    """

    def __init__(self, top: str, selection: _Selection) -> None:
        self._top, self._skip = top, len(top.rstrip(os.sep)) + 1
        self._selection, self._left_out = selection, selection.left_out
        self._folder_links, self._file_links = list[str](), list[str]()
        # Real paths of folders.
        self._listed = set[str]()

    def list_rows(self) -> Iterator[Row]:
        """List the files; linked ones come last, in the order of the links."""
        yield from self._list_folder(self._top)
        while self._folder_links:
            links, self._folder_links = sorted(self._folder_links), []
            for link in links:
                if os.path.realpath(link) in self._listed:
                    self._left_out[_SAME] += 1
                else:
                    yield from self._list_folder(link)
        for link in sorted(self._file_links):
            with suppress(FileNotFoundError):
                yield from self._follow(link)

    def _list_folder(self, top: str) -> Iterator[Row]:
        """List the real files below a folder in the order of paths, and note links."""
        real, start = os.path.realpath(top), len(top)
        self._listed.add(real)
        # A stack: the next entry is the last one.
        waiting = self._scan(top)
        while waiting:
            entry = waiting.pop()
            with suppress(FileNotFoundError):
                if not entry.is_dir():
                    yield self._describe(entry.path, entry.stat())
                elif (folder := real.rstrip(os.sep) + os.sep + entry.path[start:].lstrip(os.sep)) not in self._listed:
                    self._listed.add(folder)
                    waiting += self._scan(entry.path)

    def _scan(self, folder: str) -> list[os.DirEntry[str]]:
        """Scan a folder, in reverse order of the paths below it; the caller reports a missing top folder."""
        takes, hides, found = self._selection.takes, self._selection.hides, []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        self._note_link(entry)
                    elif entry.is_dir():
                        if hides(entry.name):
                            self._left_out[HIDDEN] += 1
                        else:
                            found.append((entry.name + "/", entry))
                    elif entry.is_file() and takes(entry.name):
                        found.append((entry.name, entry))
        except FileNotFoundError:
            return []
        return [entry for _, entry in sorted(found, key=lambda each: each[0], reverse=True)]

    def _note_link(self, entry: os.DirEntry[str]) -> None:
        """Note a link that is followed later."""
        if self._selection.hides(entry.name):
            self._left_out[HIDDEN] += 1
        elif os.path.isdir(entry.path):
            self._folder_links.append(entry.path)
        elif not os.path.exists(entry.path):
            # Its target is missing, or itself.
            self._left_out[_BROKEN] += 1
        elif os.path.isfile(entry.path) and self._selection.takes(entry.name):
            self._file_links.append(entry.path)

    def _follow(self, link: str) -> Iterator[Row]:
        """List the target of a link, unless it is listed already: in a listed folder, by a name that is selected."""
        folder, name = os.path.split(os.path.realpath(link))
        if folder in self._listed and not self._selection.hides(name) and self._selection.has_ending(name):
            self._left_out[_SAME] += 1
        else:
            yield self._describe(link, os.stat(link))

    def _describe(self, path: str, status: os.stat_result) -> Row:
        """Describe a file by its path below the top."""
        return path[self._skip :].replace(os.sep, "/"), status.st_size, str(status.st_mtime_ns)
