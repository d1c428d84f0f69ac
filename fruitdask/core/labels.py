"""The user's table of labels: read it in the forms that programs write, and match it with the listed files."""

import codecs
import csv
import glob
import gzip
import io
import os
import posixpath
import re
import stat
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from fruitdask.core.config import InputConfig
from fruitdask.core.escaping import unquote_formula
from fruitdask.core.listing import GROUPINGS, compile_rule, digest_version, find_rows
from fruitdask.core.storage import Location, explained
from fruitdask.errors import CatalogError, ConfigError

_GZIP, _PARQUET, _ZIP = b"\x1f\x8b", b"PAR1", b"PK\3\4"
_COLUMNS = ("path", "label", *GROUPINGS)
_DELIMITERS = ",;\t|"
#: The line before a header in which Excel names the delimiter.
_SEPARATOR_LINE = re.compile(rb"\"?sep=.\"?\r?\n", re.IGNORECASE)
#: A step to the parent folder, which could lead outside the input.
_LEADS_OUT = r"(?:^|/)\.\.(?:/|$)"
#: A path from the root of a disk, or a URL.
_ABSOLUTE = re.compile(r"/|\\\\|[A-Za-z]:[\\/]|[A-Za-z][A-Za-z0-9+.-]+://")


def label_files(table: pd.DataFrame, files: pd.DataFrame, root: Location, config: InputConfig) -> pd.DataFrame:
    """Join a table of labels with the listed files."""
    relate = _make_relative(root)
    places = _find_files(table["path"], files["path"], relate)
    is_listed = places >= 0
    paths = table["path"].where(~is_listed, files["path"].reindex(places).array)
    paths = paths.where(is_listed, paths.map(relate))
    duplicated = paths[paths.duplicated()]
    if len(duplicated):
        raise ConfigError(
            f"{config.manifest}: expected each path once in input.manifest, found {duplicated.iloc[0]!r} twice; "
            "remove one"
        )
    for name in ("bytes", "version"):
        table[name] = np.append(files[name], np.int64(0))[places]
    table["path"] = paths
    _describe_unlisted(table, is_listed, root)
    _check_unlisted(table, files, root, config)
    for name in config.rules.keys() & set(GROUPINGS):
        table[name] = [compile_rule(config.rules[name])(path) or "" for path in paths]
    named = [name for name in ("label", *GROUPINGS) if name in table]
    return table.astype(dict.fromkeys(named, "category")).sort_values("path", ignore_index=True)


def normalize_unique(names: Iterable[str]) -> dict[str, str]:
    """Map Unicode's composed form (NFC) of names to the names, where it is unique."""
    found: dict[str, str | None] = {}
    for name in names:
        key = unicodedata.normalize("NFC", name)
        found[key] = None if key in found else name
    return {key: name for key, name in found.items() if name is not None}


def _find_files(paths: pd.Series, files: pd.Series, relate: Callable[[str], str]) -> npt.NDArray[np.int64]:
    """Find files by paths as given, as normalized, in another Unicode form, and as in CSV of fruitdask; -1 if none."""
    places = find_rows(paths, files)
    for rewrite in (relate, _compose(files, relate), unquote_formula):
        left = np.flatnonzero(places < 0)
        if len(left):
            places[left] = find_rows(paths.iloc[left].map(rewrite).astype("str"), files)
    return places


def _make_relative(root: Location) -> Callable[[str], str]:
    """Make a function that normalizes a path as in a listing: relative to the input if inside, without empty steps."""
    folders = {root.url.rstrip("/"), root.path}
    if root.is_local:
        folders |= {os.path.realpath(root.path), f"file://{root.path}"}
    tops = tuple(f"{folder}/" for folder in folders if folder)

    def relate(path: str) -> str:
        inner = next((path[len(top) :] for top in tops if path.startswith(top)), path)
        return inner if _ABSOLUTE.match(inner) else "/".join(part for part in inner.split("/") if part not in ("", "."))

    return relate


def _compose(files: pd.Series, relate: Callable[[str], str]) -> Callable[[str], str]:
    """Make a function that gives a path the Unicode form of the listed file, where it is unique."""
    known: dict[str, str] = {}

    def rewrite(path: str) -> str:
        if path.isascii():
            return path
        if not known:
            known.update(normalize_unique(name for name in files if not name.isascii()))
        key = unicodedata.normalize("NFC", relate(path))
        return known.get(key, path)

    return rewrite


def _describe_unlisted(table: pd.DataFrame, is_listed: npt.NDArray[np.bool_], root: Location) -> None:
    """Find files on a disk that the listing has under another name only, because of a link."""
    if not root.is_local:
        return
    for row in np.flatnonzero(~is_listed):
        path = table["path"].iloc[row]
        with suppress(OSError, ValueError):
            status = os.stat(root.locate(path))
            # Below the input, /a.jpg would name a.jpg a second time.
            if stat.S_ISREG(status.st_mode) and not _ABSOLUTE.match(path):
                table.loc[row, ["bytes", "version"]] = status.st_size, digest_version(str(status.st_mtime_ns))


def _check_unlisted(table: pd.DataFrame, files: pd.DataFrame, root: Location, config: InputConfig) -> None:
    """Refuse a table whose paths are in another form than those of the files, rather than report missing images."""
    unlisted = table.loc[(table["bytes"] == 0) & (table["version"] == 0), "path"]
    if unlisted.empty:
        return
    where = f"{config.manifest}: expected paths of input.manifest relative to input.url {root.url}, "
    outside = next((path for path in unlisted if _ABSOLUTE.match(path)), None)
    if outside is not None:
        raise ConfigError(f"{where}found {outside!r}, which is not inside it; write it like {files['path'].iloc[0]!r}")
    for advice, candidates, among in _list_mistakes(unlisted, files["path"], root):
        places = find_rows(candidates, among)
        if (places >= 0).any():
            row = int((places >= 0).argmax())
            raise ConfigError(f"{where}found {unlisted.iloc[row]!r} for {files['path'].iloc[places[row]]!r}; {advice}")
    if len(unlisted) == len(table):
        raise CatalogError(
            f"{where}but none of its {len(table):,} exists: the first path in the table is {unlisted.iloc[0]!r}, the "
            f"first file is {files['path'].iloc[0]!r}"
        )


def _list_mistakes(unlisted: pd.Series, files: pd.Series, root: Location) -> Iterable[tuple[str, pd.Series, pd.Series]]:
    """List common mistakes in paths: the advice, the corrected paths, and the file names in the same form."""
    yield "write / between folders", unlisted.str.replace("\\", "/").str.removeprefix("./"), files
    top = posixpath.basename(root.path)
    yield "leave out the name of the input's own folder", unlisted.str.removeprefix(f"{top}/"), files
    yield "add the file's extension", unlisted, files.str.replace(r"\.\w+$", "", regex=True).drop_duplicates()
    yield "use the upper and lower case of the file", unlisted.str.lower(), files.str.lower().drop_duplicates()


def read_labels(config: InputConfig) -> pd.DataFrame:
    """Read the table of labels."""
    return _read_table(locate_table(config, str(config.manifest)), "input.manifest")


def locate_table(config: InputConfig, url: str) -> Location:
    """Locate a table of the input, which is read with the options of the images unless it is on this machine."""
    return Location(url, config.storage_options if "://" in url else {})


def read_paths(url: str, setting: str) -> tuple[str, ...]:
    """Read the paths of a table, such as one from the page, as patterns that match nothing else.

    >>> path = getfixture("tmp_path") / "selected.csv"
    >>> _ = path.write_text("path,label\\npear/a[1].jpg,pear\\n./=1.jpg,x\\n'=2.jpg,x\\n")
    >>> read_paths(str(path), "--paths")
    ('pear/a[[]1].jpg', '=1.jpg', '=2.jpg')
    """
    paths = _read_table(Location(url), setting)["path"]
    # Undo how `format_csv` and the page keep spreadsheets from reading a path as a formula.
    paths = paths.map(unquote_formula).str.removeprefix("./")
    return tuple(paths.map(glob.escape))


def _read_table(location: Location, setting: str) -> pd.DataFrame:
    """Read a table of labels; `setting` is the key that names it."""
    with explained(location, "read"):
        data = bytes(location.fs.cat_file(location.path))
    try:
        columns = _read_columns(data, location.path)
    except (ValueError, OSError, EOFError, zlib.error, NotImplementedError) as error:
        cause = " ".join(str(error).split())[:300]
        raise ConfigError(f"{location.url}: expected a CSV or Parquet table in {setting}, found {cause}") from error
    if {"path", "label"} - columns.keys():
        raise ConfigError(
            f"{location.url}: expected the columns path and label in {setting}, found {', '.join(columns) or 'none'}"
        )
    table = pd.DataFrame({name: columns[name] for name in _COLUMNS if name in columns})
    for name in table.columns.drop("path"):
        # Spaces around a word are slips, and would make another class.
        table[name] = table[name].str.strip()
    _check_rows(table, f"{location.url}: expected", setting)
    return table


def _read_columns(data: bytes, path: str) -> dict[str, Any]:
    """Read the columns of a CSV or Parquet table, which may be compressed."""
    if data.startswith(_GZIP):
        data = gzip.decompress(data)
    if data.startswith(_ZIP):
        raise ValueError("an Excel workbook or another ZIP archive; save the table as CSV")
    is_parquet = data.startswith(_PARQUET) or path.endswith((".parquet", ".pq"))
    return _read_parquet(data) if is_parquet else _read_csv(data)


def _check_rows(table: pd.DataFrame, expected: str, setting: str) -> None:
    """Refuse a table without rows, or with a path that is missing or leads out of the input."""
    if table.empty:
        raise CatalogError(f"{expected} images in {setting}, found no row")
    empty = (table[["path", "label"]] == "").any(axis=1)
    if empty.any():
        row = int(empty.argmax()) + 1
        raise ConfigError(f"{expected} a path and a label in each row of {setting}, but row {row} lacks one")
    leading_out = table["path"][table["path"].str.contains(_LEADS_OUT)]
    if len(leading_out):
        raise ConfigError(
            f"{expected} paths inside input.url in {setting}, found {leading_out.iloc[0]!r}; write it without .."
        )


def _read_parquet(data: bytes) -> dict[str, Any]:
    """Read the columns of a Parquet file, including pandas' index, as text."""
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(io.BytesIO(data)).read()
    names = _name_columns(table.column_names)
    return {
        name: _convert_to_text(table.column(place), name) if name in _COLUMNS else None for name, place in names.items()
    }


def _convert_to_text(column: Any, name: str) -> pd.Series:
    """Convert a column to text: integers without a decimal point, missing values as empty text."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if pa.types.is_nested(kind):
        raise ValueError(f"the column {name} of type {kind}; expected text")
    if pa.types.is_boolean(kind):
        column = pc.if_else(column, "True", "False")
    elif pa.types.is_floating(kind):
        column = pc.if_else(pc.is_nan(column), None, column)
    elif pa.types.is_decimal(kind):
        # As floats, long numbers would become one class.
        column = pc.replace_substring_regex(column.cast(pa.string()), r"\.0+$|(\.\d*[1-9])0+$", r"\1")
    return column.cast(pa.large_string()).fill_null("").to_pandas()  # type: ignore[no-any-return]


def _read_csv(data: bytes) -> dict[str, Any]:
    """Read the columns of a CSV file as text, with any of the usual delimiters."""
    data = _decode(data)
    data = data[match.end() :] if (match := _SEPARATOR_LINE.match(data)) else data
    header, _, body = data.partition(b"\n")
    delimiter, names = _read_header(header.decode().rstrip("\r"))
    columns = _name_columns(names)
    if not {"path", "label"} <= columns.keys():
        return dict.fromkeys(columns)
    wanted = {name: place for name, place in columns.items() if name in _COLUMNS}
    texts = _parse_csv(body, delimiter, len(names), wanted)
    labels = texts["label"]
    if (is_broken := labels.str.contains("\n", regex=False)).any():
        row = int(is_broken.argmax())
        raise ValueError(
            f"the label {labels[row][:60]!r} of several lines in row {row + 1}; close the quotation mark that begins it"
        )
    if any(name != name.strip() for name in names) or (len(labels) and labels.str.startswith(" ").all()):
        texts = {name: text.str.strip() for name, text in texts.items()}
    for name in texts.keys() - {"path"}:
        is_quoted = texts[name].str.startswith("'")
        # People correct labels in fruitdask's own tables, which have such apostrophes.
        texts[name] = texts[name].mask(is_quoted, texts[name][is_quoted].map(unquote_formula))
    # Spreadsheets write empty rows below a table.
    is_row = (texts["path"] != "") | (texts["label"] != "")
    return {name: text[is_row].reset_index(drop=True) for name, text in texts.items()}


def _decode(data: bytes) -> bytes:
    """Convert text to UTF-8 without a byte order mark, with line feeds."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        data = data.decode("utf-16").encode()
    data = data.removeprefix(codecs.BOM_UTF8)
    if b"\0" in data[:4096]:
        raise ValueError("null bytes, which no text contains")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"text that is not UTF-8 in line {row} (byte 0x{data[error.start]:02x}); save it as CSV UTF-8"
        ) from error
    return data if b"\n" in data else data.replace(b"\r", b"\n")


def _read_header(line: str) -> tuple[str, list[str]]:
    """Read the delimiter and the names of the columns."""
    found = {each: next(csv.reader([line], delimiter=each), []) for each in _DELIMITERS}
    fitting = [each for each, names in found.items() if {"path", "label"} <= _name_columns(names).keys()]
    delimiter = fitting[0] if fitting else max(_DELIMITERS, key=lambda each: len(found[each]))
    return delimiter, found[delimiter]


def _name_columns(names: Sequence[str]) -> dict[str, int]:
    """Find the place of each column by its name; those that are read in any case, with spaces around."""
    places = {name: place for place, name in enumerate(names)}
    given = [name for name in names if name in _COLUMNS]
    if len(given) > len(set(given)):
        raise ValueError(f"the columns {', '.join(names)} with a duplicate; keep one of them")
    for place, name in enumerate(names):
        if name.strip().lower() in _COLUMNS:
            places.setdefault(name.strip().lower(), place)
    return places


def _parse_csv(body: bytes, delimiter: str, n_columns: int, wanted: dict[str, int]) -> dict[str, pd.Series]:
    """Parse the rows of a CSV file, which must have as many columns as the header."""
    import pyarrow.csv

    ragged: list[Any] = []

    def note(row: Any) -> str:
        ragged.append(row)
        return "error"

    if not body.strip():
        return {name: pd.Series([], dtype="str") for name in wanted}
    names = [str(place) for place in range(n_columns)]
    read = pyarrow.csv.ReadOptions(column_names=names, use_threads=False)
    parse = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=note)
    types = dict.fromkeys(names, pa.large_string())
    convert = pyarrow.csv.ConvertOptions(column_types=types, strings_can_be_null=False)
    try:
        table = pyarrow.csv.read_csv(io.BytesIO(body), read_options=read, parse_options=parse, convert_options=convert)
    except pa.ArrowInvalid as error:
        if not ragged:
            raise
        row, text = ragged[0], repr(ragged[0].text[:80])
        raise ValueError(
            f"{row.actual_columns} columns in row {row.number} and {row.expected_columns} in the header: {text}"
        ) from error
    return {name: table.column(place).to_pandas() for name, place in wanted.items()}
