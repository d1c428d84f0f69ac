"""The working files of an exploration: rows, sums and thumbnails of each partition, and mean images of classes.

The rows of a partition are written last and are its commit mark. The folder of the files is named after the
exploration, so that explorations do not mix, even if a straggler still writes. Numbers are records of one size, each
with a checksum, so that a reader fetches only the ones that it needs.
"""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask.core.storage import Location, explained, write_file
from fruitdask.errors import DamageError
from fruitdask.store.layout import EXPLORING, name_working
from fruitdask.store.manifests import delete_result
from fruitdask.store.outcomes import list_marks
from fruitdask.store.tables import decode_table, write_table

#: Partitions whose rows are read at once.
_PARTITIONS_AT_ONCE = 64
#: Bytes of records that are read at once.
_BYTES_AT_ONCE = 32 << 20

#: Part of a working file: its index, and its first record and the one after its last.
Piece = tuple[int, int, int]


@dataclass(frozen=True)
class Workspace:
    """The working files of an exploration in an output folder; picklable and small."""

    output: Location
    #: Identifies the exploration.
    name: str
    thumbnail_px: int
    #: Side at which the images of a class are compared.
    compared_px: int
    n_colours: int

    @property
    def sums_type(self) -> np.dtype[Any]:
        """The sums over the images of one class in one partition; 32 bits are enough for 16 million images."""
        shapes = {"pixels": self.compared_px, "thumbnails": self.thumbnail_px}
        sums = [(name, "<u4", (px, px, 3)) for name, px in shapes.items()]
        return np.dtype([("n_images", "<i8"), ("squares", "<i8"), *sums, ("colours", "<u4", (self.n_colours,))])

    @property
    def thumbnail_type(self) -> np.dtype[Any]:
        """The thumbnail of a readable image."""
        return np.dtype([("is_readable", "?"), ("pixels", "u1", (self.thumbnail_px, self.thumbnail_px, 3))])

    @property
    def mean_type(self) -> np.dtype[Any]:
        """The mean thumbnail of a class."""
        return np.dtype([("pixels", "<f8", (self.thumbnail_px, self.thumbnail_px, 3))])

    def locate(self, kind: str, index: int) -> Location:
        """Locate a working file."""
        return self.output.child(name_working(self.name, kind, index))

    def list_committed(self) -> set[int]:
        """List the partitions that are explored."""
        return list_marks(self.output.child(EXPLORING, self.name, "rows"))

    def delete_others(self) -> None:
        """Delete the working files of other explorations."""
        folder = self.output.child(EXPLORING)
        with explained(folder, "list"):
            folder.fs.invalidate_cache()
            paths = folder.fs.find(folder.path)
        for name in {path[len(folder.path) + 1 :].split("/")[0] for path in paths} - {self.name}:
            delete_result(self.output, f"{EXPLORING}/{name}")

    def write_partition(
        self, index: int, rows: pd.DataFrame, *, sums: npt.NDArray[np.void], thumbnails: npt.NDArray[np.void]
    ) -> None:
        """Write what was found in a partition; `sums` are in the order of the names of its classes."""
        for kind, records in (("sums", sums), ("thumbnails", thumbnails)):
            _write_records(self.locate(kind, index), records)
        write_table(self.locate("rows", index), rows)

    def write_mean(self, code: int, mean: npt.NDArray[np.float64]) -> None:
        """Write the mean thumbnail of a class."""
        record = np.zeros(1, self.mean_type)
        record["pixels"] = mean
        _write_records(self.locate("means", code), record)

    def read_rows(self, indices: Sequence[int], columns: Sequence[str] | None = None) -> Iterator[Any]:
        """Read rows of partitions as Arrow tables, some partitions at a time, in their order."""
        import pyarrow

        for start in range(0, len(indices), _PARTITIONS_AT_ONCE):
            chosen = indices[start : start + _PARTITIONS_AT_ONCE]
            files = self._fetch("rows", [(index, None, None) for index in chosen])
            yield pyarrow.concat_tables(
                [self._decode_rows(index, data, columns) for index, data in zip(chosen, files, strict=True)]
            )

    def read_sums(self, pieces: Sequence[Piece]) -> Iterator[npt.NDArray[np.void]]:
        """Read the sums of some classes of partitions, each piece by itself."""
        for group in _group_pieces(pieces, self.sums_type.itemsize):
            yield from self._read_records("sums", group, self.sums_type)

    def read_thumbnails(self, pieces: Sequence[Piece]) -> npt.NDArray[np.void]:
        """Read thumbnails, which all have to fit into memory."""
        found = self._read_records("thumbnails", pieces, self.thumbnail_type)
        return np.concatenate([np.empty(0, self.thumbnail_type), *found])

    def read_mean(self, code: int) -> npt.NDArray[np.float64]:
        """Read the mean thumbnail of a class, which has readable images."""
        (records,) = self._read_records("means", [(code, 0, 1)], self.mean_type)
        return np.asarray(records[0]["pixels"])

    def _read_records(
        self, kind: str, pieces: Sequence[Piece], described: np.dtype[Any]
    ) -> Iterator[npt.NDArray[np.void]]:
        """Read records of several files at once, and compare their checksums."""
        stored = _add_checksum(described)
        size = stored.itemsize
        fetched = self._fetch(kind, [(index, start * size, stop * size) for index, start, stop in pieces])
        for (index, start, stop), data in zip(pieces, fetched, strict=True):
            is_whole = len(data) == (stop - start) * size
            records = np.frombuffer(data if is_whole else b"", stored)
            if not is_whole or any(_checksum(record["value"]) != record["checksum"] for record in records):
                raise self._reject(kind, index, "its checksum does not match its content")
            yield records["value"]

    def _fetch(self, kind: str, pieces: Sequence[tuple[int, int | None, int | None]]) -> list[bytes]:
        """Fetch parts of files, many at once."""
        if not pieces:
            return []
        files = [self.locate(kind, index) for index, *_ in pieces]
        starts, stops = ([piece[place] for piece in pieces] for place in (1, 2))
        folder = self.output.child(EXPLORING)
        with explained(folder, "read"):
            found = folder.fs.cat_ranges([file.path for file in files], starts, stops, on_error="return")
            for (index, *_), data in zip(pieces, found, strict=True):
                if isinstance(data, FileNotFoundError):
                    raise self._reject(kind, index, "it is missing")
                if isinstance(data, Exception):
                    raise data
        return list(found)

    def _decode_rows(self, index: int, data: bytes, columns: Sequence[str] | None) -> Any:
        """Decode the rows of a partition; their types are known, so the metadata of pandas are dropped."""
        try:
            return decode_table(data, columns).replace_schema_metadata(None)
        except Exception as error:
            raise self._reject("rows", index, "it cannot be decoded") from error

    def _reject(self, kind: str, index: int, what: str) -> DamageError:
        """Delete the commit mark of a partition with a damaged file; returns the error to raise."""
        if kind != "means":
            delete_result(self.output, name_working(self.name, "rows", index))
        location = self.locate(kind, index)
        return DamageError(f"{location.url} is damaged ({what}); run again, which explores this part again")


def delete_exploring(output: Location) -> None:
    """Delete all working files."""
    delete_result(output, EXPLORING)


def _add_checksum(described: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type of records as they are stored."""
    return np.dtype([("value", described), ("checksum", "<u4")])


def _checksum(record: Any) -> int:
    """Compute the checksum of a record."""
    return zlib.crc32(record.tobytes())


def _write_records(location: Location, records: npt.NDArray[np.void]) -> None:
    """Write records with their checksums."""
    stored = np.empty(len(records), _add_checksum(records.dtype))
    stored["value"], stored["checksum"] = records, [_checksum(record) for record in records]
    write_file(location, stored.tobytes())


def _group_pieces(pieces: Iterable[Piece], record_bytes: int) -> Iterator[list[Piece]]:
    """Group pieces of files so that each group fits into memory."""
    group, n_bytes = list[Piece](), 0
    for piece in pieces:
        more = (piece[2] - piece[1]) * record_bytes
        if group and n_bytes + more > _BYTES_AT_ONCE:
            yield group
            group, n_bytes = [], 0
        group.append(piece)
        n_bytes += more
    if group:
        yield group
