"""Inventories: tables that name all files of the input, such as those of S3 Inventory, so that nothing is listed."""

import csv
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import Any, BinaryIO
from urllib.parse import unquote_plus

import pyarrow as pa
import pyarrow.compute as pc

from fruitdask.core.prefixes import Row
from fruitdask.core.storage import Location, describe_cause, explained
from fruitdask.errors import CatalogError, ConfigError, DamageError, FruitdaskError

#: Columns that are read: their types, and their names in lower case without separators, the first of which counts.
#: Those of S3 Inventory: https://docs.aws.amazon.com/AmazonS3/latest/userguide/storage-inventory.html
_COLUMNS: Mapping[str, tuple[pa.DataType, tuple[str, ...]]] = {
    "path": (pa.string(), ("path", "key")),
    "bytes": (pa.int64(), ("bytes", "size")),
    "version": (pa.string(), ("version", "etag")),
    "is_latest": (pa.bool_(), ("islatest",)),
    "is_deleted": (pa.bool_(), ("isdeletemarker",)),
}
_EXPECTED = "expected manifest.json of an S3 Inventory, or a CSV, Parquet or ORC table, in input.inventory"
_ROWS_AT_ONCE, _BLOCK_BYTES = 65_536, 8 << 20
_LEADS_OUT = re.compile(r"(?:^|/)\.\.(?:/|$)")

#: Makes a path relative to the input; None if it is elsewhere.
_Relate = Callable[[str], str | None]


def list_inventory(root: Location, location: Location) -> Iterator[Row]:
    """List the files below a folder that an inventory names."""
    is_report = location.url.lower().endswith(".json")
    relate = _make_relative(root, location)
    rows = _list_report(root, location) if is_report else _list_part(location, relate, ("path", "bytes"))
    first, is_empty = None, True
    for path, row in rows:
        first = first or path
        if row is not None:
            is_empty = False
            yield row
    if is_empty:
        found = f"none; the first path is {first!r}; correct input.url or input.inventory" if first else "no row"
        raise CatalogError(
            f"{location.url}: expected files below input.url {root.url} in input.inventory, found {found}"
        )


def check_unique(paths: Any, location: Location) -> None:
    """Refuse an inventory that names a file twice; paths are sorted."""
    names = pa.array(paths)
    place = pc.index(pc.equal(names[1:], names[:-1]), True).as_py()
    if place >= 0:
        raise ConfigError(
            f"{location.url}: expected each path once in input.inventory, found {names[place].as_py()!r} twice; remove "
            "one"
        )


def _list_report(root: Location, location: Location) -> Iterator[tuple[str, Row | None]]:
    """List the files that a report of S3 Inventory names: each key as written, and its row."""
    with explained(location, "read"):
        data = location.fs.cat_file(location.path)
    try:
        report = json.loads(data)
        source, target = (report[name].rpartition(":")[2] for name in ("sourceBucket", "destinationBucket"))
        names = report["fileSchema"].split(",") if report["fileFormat"] == "CSV" else None
        parts = [(f"s3://{target}/{part['key']}", part["MD5checksum"]) for part in report["files"]]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        cause = describe_cause(error)
        raise ConfigError(
            f"{location.url}: {_EXPECTED}, found other JSON ({cause}); correct input.inventory"
        ) from error
    for what, place, wanted in (("input.url", root, source), ("input.inventory", location, target)):
        if not place.is_s3 or place.path.partition("/")[0] != wanted:
            raise ConfigError(
                f"{location.url}: expected {what} in s3://{wanted}, as this inventory says, found {place.url}; correct "
                f"{what}"
            )
    folder = root.path.partition("/")[2]
    top = f"{folder}/" if folder else ""

    def relate(key: str) -> str | None:
        # A name that ends in a slash marks a folder.
        return key[len(top) :] if key.startswith(top) and key[-1] != "/" else None

    for url, md5 in parts:
        part = Location(url, location.storage_options)
        yield from _list_part(part, relate, ("path", "bytes", "version"), names=names, md5=md5)


def _make_relative(root: Location, location: Location) -> _Relate:
    """Make a function that makes a path of the user's table relative to the input."""
    top = f"{root.url.rstrip('/')}/"

    def relate(path: str) -> str | None:
        if ".." in path and _LEADS_OUT.search(path):
            raise ConfigError(f"{location.url}: expected paths inside input.url, found {path!r}; write it without ..")
        inner = path.removeprefix(top).removeprefix("./")
        return None if "://" in inner or inner[:1] in ("", "/") or inner[-1] == "/" else inner

    return relate


def _list_part(
    location: Location,
    relate: _Relate,
    required: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    md5: str | None = None,
) -> Iterator[tuple[str, Row | None]]:
    """List the files that a table names: each path, and its row; `names` are the columns of CSV without a header."""
    with _fetch(location, md5) as file, _decoded(location):
        for columns in _read_columns(file, names, required):
            paths, sizes = columns["path"], columns["bytes"]
            versions = columns.get("version") or [""] * len(paths)
            for path, size, version in zip(paths, sizes, versions, strict=True):
                if not path or size is None or size < 0:
                    raise ConfigError(
                        f"{location.url}: expected a path and its size in each row of input.inventory, found {path!r} "
                        f"of {'unknown size' if size is None else f'{size} bytes'}; correct or remove that row"
                    )
                # S3 Inventory encodes names in CSV, and spaces as plus signs.
                path = unquote_plus(path, errors="surrogateescape") if names else path
                inner = relate(path)
                yield path, None if inner is None else (inner, size, (version or "").strip('"'))


@contextmanager
def _fetch(location: Location, md5: str | None) -> Iterator[BinaryIO]:
    """Open a temporary copy of a file, whose checksum is compared: no table is held in memory."""
    digest = hashlib.md5(usedforsecurity=False)
    with TemporaryFile(prefix="fruitdask-") as file:
        with explained(location, "read"), location.fs.open(location.path, "rb", block_size=_BLOCK_BYTES) as source:
            while block := source.read(_BLOCK_BYTES):
                digest.update(block)
                file.write(block)
        if md5 not in (None, digest.hexdigest()):
            raise DamageError(
                f"{location.url}: expected the MD5 {md5} of the inventory's manifest, found {digest.hexdigest()}; name "
                "the manifest.json of another report in input.inventory"
            )
        file.seek(0)
        yield file


@contextmanager
def _decoded(location: Location) -> Iterator[None]:
    """Turn errors of a table into one sentence."""
    try:
        yield
    except FruitdaskError:
        raise
    except (ValueError, OSError, EOFError, zlib.error, pa.ArrowException) as error:
        cause = " ".join(str(error).split())[:300]
        raise ConfigError(f"{location.url}: {_EXPECTED}, found {cause}; correct it or write it again") from error


def _read_columns(
    file: BinaryIO, names: Sequence[str] | None, required: Sequence[str]
) -> Iterator[Mapping[str, list[Any]]]:
    """Read the columns of a table in blocks of rows, without old versions and deleted files."""
    for batch in _read_batches(file, names, required):
        is_kept = pa.repeat(True, len(batch))
        for name, wanted in (("is_latest", True), ("is_deleted", False)):
            if name in batch.column_names:
                is_kept = pc.and_(is_kept, pc.equal(batch[name].fill_null(wanted), wanted))
        yield batch.filter(is_kept).to_pydict()


def _read_batches(file: BinaryIO, names: Sequence[str] | None, required: Sequence[str]) -> Iterator[pa.Table]:
    """Read the columns of a table in blocks of rows; `names` are those of CSV without a header."""
    batches: Iterable[Any]
    head = file.read(4)
    file.seek(0)
    if head == b"PAR1":
        import pyarrow.parquet

        parquet = pyarrow.parquet.ParquetFile(file, pre_buffer=False)
        found = _find_columns(parquet.schema_arrow.names, required)
        batches = parquet.iter_batches(_ROWS_AT_ONCE, columns=list(found), use_threads=False)
    elif head[:3] == b"ORC":
        import pyarrow.orc

        orc = pyarrow.orc.ORCFile(file)
        found = _find_columns(orc.schema.names, required)
        batches = (orc.read_stripe(number, list(found)) for number in range(orc.nstripes))
    else:
        stream = gzip.GzipFile(fileobj=file) if head[:2] == b"\x1f\x8b" else file
        found, batches = _open_csv(stream, names, required)
    for batch in batches:
        yield pa.table({ours: batch.column(name).cast(_COLUMNS[ours][0]) for name, ours in found.items()})


def _open_csv(
    stream: Any, names: Sequence[str] | None, required: Sequence[str]
) -> tuple[dict[str, str], Iterable[pa.RecordBatch]]:
    """Open CSV: the columns that are read, and blocks of rows."""
    import pyarrow.csv

    delimiter = ","
    if names is None:
        header = stream.readline().decode("utf-8-sig").rstrip("\r\n")
        delimiter = max(",;\t", key=header.count)
        names = next(csv.reader([header], delimiter=delimiter), [])
    found = _find_columns(names, required)
    if not stream.peek(1):
        return found, ()
    types = {name: _COLUMNS[ours][0] for name, ours in found.items()}
    return found, pyarrow.csv.open_csv(
        stream,
        read_options=pyarrow.csv.ReadOptions(column_names=names, use_threads=False),
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(include_columns=list(types), column_types=types),
    )


def _find_columns(names: Sequence[str], required: Sequence[str]) -> dict[str, str]:
    """Find the columns that are read, as they are called in the table, and how they are called here."""
    given = {re.sub(r"[\W_]", "", name.lower()): name for name in reversed(names)}
    found = {
        given[spelling]: ours
        for ours, (_, spellings) in _COLUMNS.items()
        if (spelling := next((each for each in spellings if each in given), None))
    }
    if missing := [name for name in required if name not in found.values()]:
        given_names = ", ".join(name.strip() for name in names) or "none"
        raise ValueError(f"the columns {given_names} without {' and '.join(missing)}")
    return found
