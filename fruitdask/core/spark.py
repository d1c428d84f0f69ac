"""Parquet folders that Spark wrote: which files and columns they have, and their vectors as arrays, batch by batch."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fruitdask.core.storage import Location, explained
from fruitdask.errors import CatalogError, ConfigError

#: Column names that are tried in this order where none is given.
PATH_COLUMNS = ("path", "image_path", "file", "filename", "origin")
FEATURE_COLUMNS = ("features", "feature", "embedding", "embeddings", "features_vec", "vector")
SCORE_COLUMNS = ("pcaFeatures", "pca_features", "pca", "features_pca", "scores")
#: Rows of a batch while paths are read.
_PATHS_AT_ONCE = 65_536
#: Rows of a batch while a width is looked for.
_WIDTHS_AT_ONCE = 256
_REMEDY = "let the Spark job write it again"

_Converted = TypeVar("_Converted")


@dataclass(frozen=True)
class SparkFolder:
    """The Parquet files of a Spark job, and the columns to read."""

    location: Location
    #: Paths in the file system, sorted, which is the order of rows.
    files: tuple[str, ...]
    path_column: str
    feature_column: str | None
    score_column: str | None

    def read_paths(self) -> list[str | None]:
        """Read the paths of all rows."""
        return [path for paths in self._read(self.path_column, _PATHS_AT_ONCE, _decode_paths) for path in paths]

    def read_vectors(self, column: str, width: int, n_at_once: int) -> Iterator[npt.NDArray[np.float64]]:
        """Read vectors (n, width), float64, batch by batch; NaN rows where one is null or has another width."""
        return self._read(column, n_at_once, lambda batch: decode_vectors(batch, width))

    def find_width(self, column: str) -> int:
        """Find the usual width of the vectors in the first batch that has any; 0 if there is none."""
        for found in self._read(column, _WIDTHS_AT_ONCE, measure_vectors):
            if widths := Counter(found[found > 0].tolist()):
                return int(widths.most_common(1)[0][0])
        return 0

    def _read(self, column: str, n_at_once: int, convert: Callable[[Any], _Converted]) -> Iterator[_Converted]:
        """Read and convert a column, batch by batch; of each file, only what a batch needs is in memory."""
        for path in self.files:
            with _opened(self.location, path) as parquet:
                for batch in parquet.iter_batches(n_at_once, columns=[column]):
                    yield convert(batch.column(column))


def open_spark(
    location: Location,
    *,
    path_column: str | None = None,
    features_column: str | None = None,
    scores_column: str | None = None,
) -> SparkFolder:
    """Open a folder, or a single file, of Parquet, and find its columns."""
    files = _list_files(location)
    with _opened(location, files[0]) as parquet:
        schema = parquet.schema_arrow
    path = _choose_column(location, schema.names, path_column, PATH_COLUMNS, "path")
    features = _choose_column(location, schema.names, features_column, FEATURE_COLUMNS, "features", is_optional=True)
    scores = _choose_column(location, schema.names, scores_column, SCORE_COLUMNS, "scores", is_optional=True)
    if path is None or (features is None and scores is None):
        raise ConfigError(
            f"{location.url}: expected a column of features ({', '.join(FEATURE_COLUMNS)}) or of scores "
            f"({', '.join(SCORE_COLUMNS)}), found {', '.join(schema.names)}; name one with --features-column or "
            "--scores-column"
        )
    for name in (features, scores):
        if name is not None and not _is_vector(schema.field(name).type):
            raise ConfigError(
                f"{location.url}: expected an array of numbers or a Spark ML vector in the column {name}, found "
                f"{schema.field(name).type}; name another column"
            )
    return SparkFolder(location, tuple(files), path, features, scores)


def _decode_paths(column: Any) -> list[str | None]:
    """Decode paths; None for null."""
    paths: list[str | None] = column.cast(pa.string()).to_pylist()
    return paths


def measure_vectors(column: Any) -> npt.NDArray[np.int64]:
    """Measure the widths of vectors (n,), int64; -1 for null."""
    if not pa.types.is_struct(column.type):
        return np.asarray(pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False), np.int64)
    dense = measure_vectors(pc.struct_field(column, "values"))
    size = pc.fill_null(pc.struct_field(column, "size"), -1).to_numpy(zero_copy_only=False)
    return np.where(_find_sparse(column), size, dense).astype(np.int64)


def decode_vectors(column: Any, width: int) -> npt.NDArray[np.float64]:
    """Decode arrays of numbers or Spark ML vectors to (n, width), float64; NaN rows for null and other widths.

    >>> sparse = {"type": 0, "size": 3, "indices": [1], "values": [5.0]}
    >>> dense = {"type": 1, "size": None, "indices": None, "values": [1.0, 2.0, 3.0]}
    >>> decode_vectors(pa.array([sparse, dense]), 3).tolist()
    [[0.0, 5.0, 0.0], [1.0, 2.0, 3.0]]
    """
    rows = np.full((len(column), width), np.nan)
    is_fit = measure_vectors(column) == width
    if not pa.types.is_struct(column.type):
        rows[is_fit] = _flatten(column, is_fit)[1].reshape(-1, width)
        return rows
    is_sparse, values = _find_sparse(column), pc.struct_field(column, "values")
    rows[is_fit & ~is_sparse] = _flatten(values, is_fit & ~is_sparse)[1].reshape(-1, width)
    rows[is_fit & is_sparse] = 0
    places, numbers = _flatten(values, is_fit & is_sparse)
    rows[places, _flatten(pc.struct_field(column, "indices"), is_fit & is_sparse)[1].astype(np.int64)] = numbers
    return rows


def _flatten(column: Any, chosen: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Flatten the chosen lists of a column to the row of each number, and the numbers."""
    lengths = np.maximum(measure_vectors(column), 0)
    places = np.repeat(np.arange(len(lengths)), lengths)
    numbers = np.asarray(column.flatten().to_numpy(zero_copy_only=False), np.float64)
    return places[chosen[places]], numbers[chosen[places]]


def _find_sparse(column: Any) -> npt.NDArray[np.bool_]:
    """Find the sparse vectors: Spark ML's type 0."""
    kinds = pc.fill_null(pc.struct_field(column, "type"), -1).to_numpy(zero_copy_only=False)
    return np.asarray(kinds == 0)


def _is_vector(kind: Any) -> bool:
    """Whether a type of Arrow is a list of numbers or a Spark ML vector."""
    if pa.types.is_struct(kind):
        return {"type", "size", "indices", "values"} <= {field.name for field in kind}
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(is_list and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)))


def _list_files(location: Location) -> list[str]:
    """List the Parquet files of a folder, without Spark's own such as _SUCCESS."""
    with explained(location, "list"):
        root, found = location.path, sorted(location.fs.find(location.path))
    # A single file is found as itself.
    names = {path: path[len(root) :].strip("/") or path.rsplit("/", 1)[-1] for path in found}
    data = {path: name for path, name in names.items() if not any(part[0] in "._" for part in name.split("/") if part)}
    files = [path for path, name in data.items() if name.endswith((".parquet", ".parq"))]
    if not files:
        others = f"only {', '.join(list(names.values())[:3])}" if names else "no file"
        raise CatalogError(
            f"{location.url}: expected Parquet files, such as part-00000-....snappy.parquet, found {others}; check the "
            "folder, and that the Spark job has ended"
        )
    return files


@contextmanager
def _opened(location: Location, path: str) -> Iterator[Any]:
    """Open a Parquet file; its errors are one sentence that names it."""
    folder = location.path
    file = location if path == folder else location.child(path[len(folder) :].strip("/"))
    with explained(file, "read"), file.fs.open(path, "rb") as opened:
        with explained(file, "read", remedy=_REMEDY):
            # pyarrow raises OSError too, but not where the file system does.
            try:
                yield pq.ParquetFile(opened)
            except OSError as error:
                if type(error) is OSError and error.errno is None:
                    raise ValueError(str(error)) from error
                raise


def _choose_column(
    location: Location,
    names: Sequence[str],
    given: str | None,
    usual: Sequence[str],
    what: str,
    *,
    is_optional: bool = False,
) -> str | None:
    """Choose the given column, or the first usual one that exists."""
    found = next((name for name in ([given] if given else usual) if name in names), None)
    if found is None and (given or not is_optional):
        raise ConfigError(
            f"{location.url}: expected the column {given or ' or '.join(usual)}, found {', '.join(names)}; name one "
            f"with --{what}-column"
        )
    return found
