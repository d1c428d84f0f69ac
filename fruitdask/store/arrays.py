"""Arrays, in Zarr: features and statuses of a run, and small ones such as components."""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import FsspecStore

from fruitdask.core.storage import Location, exists, explained
from fruitdask.errors import DamageError, StorageError
from fruitdask.store.layout import FEATURES, RUN_NAMES, STATUSES, name_outcomes
from fruitdask.store.manifests import advise_repair, delete_result
from fruitdask.store.schema import check_format, seal
from fruitdask.store.tables import read_table, write_table

#: How chunks are stored: compressed as Zarr does by default, then with a checksum, so that readers in any language
#: find damage.
_COMPRESSORS = (ZstdCodec(), Crc32cCodec())
#: Chunks of an array that stay in memory while it is read by rows.
_CACHE_BYTES = 32 << 20


@dataclass(frozen=True, eq=False)
class StoredArray:
    """An array that reports damage in one sentence, which names the chunk; picklable, for Dask."""

    #: The array; its chunks, along the first dimension, are partitions.
    array: Any
    output: Location

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return self.array.shape  # type: ignore[no-any-return]

    @property
    def chunks(self) -> tuple[int, ...]:
        """The shape of a chunk."""
        return self.array.chunks  # type: ignore[no-any-return]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The data type."""
        return self.array.dtype  # type: ignore[no-any-return]

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def __getitem__(self, selection: Any) -> Any:
        """Read some rows."""
        location = self.output.child(FEATURES, self.array.basename)
        with explained(location, "read", remedy=advise_repair(self.output)):
            try:
                return self.array[selection]
            except Exception:
                self._check_chunks(selection[0] if isinstance(selection, tuple) else selection, location)
                raise

    def _check_chunks(self, rows: Any, location: Location) -> None:
        """Read the chunks of some rows one by one, to find the one that is damaged."""
        size = self.chunks[0]
        for index in np.unique(np.arange(self.shape[0])[rows] // size).tolist():
            place = location.child("c", *(str(part) for part in (index, *[0] * (self.ndim - 1))))
            with explained(place, "read", remedy=f"it is partition {index}: {advise_repair(self.output)}"):
                self.array[index * size : (index + 1) * size]


@dataclass(frozen=True, eq=False)
class FinishedFeatures(StoredArray):
    """Features of a finished run, which reports a missing chunk too: Zarr reads it as NaN."""

    status: StoredArray

    def __getitem__(self, selection: Any) -> Any:
        """Read some rows."""
        found = super().__getitem__(selection)
        is_nan = np.isnan(found[..., :1]).any(axis=-1)
        if is_nan.any():
            codes = self.status[selection[0] if isinstance(selection, tuple) else selection]
            if (is_nan & (codes == STATUSES.index("ok"))).any():
                raise DamageError(f"{_name_features(self.output)} (chunks are missing); {advise_repair(self.output)}")
        return found


@dataclass(frozen=True, eq=False)
class RunArrays:
    """The arrays of a run, whose metadata were read once, and the attributes of their group."""

    arrays: Mapping[str, StoredArray]
    attrs: dict[str, Any]

    def __getitem__(self, name: str) -> StoredArray:
        """Return ``features`` or ``status``."""
        return self.arrays[name]


def create_store(
    output: Location, *, n_images: int, n_features: int, images_per_partition: int, attributes: Mapping[str, Any]
) -> None:
    """Create the empty arrays of a run, one chunk per partition.

    ``status`` follows the CF conventions, section 3.5: its attributes ``flag_values`` and ``flag_meanings`` name the
    codes.
    """
    location = output.child(FEATURES)
    with explained(location, "write"):
        for name in RUN_NAMES[:-1]:
            delete_result(output, name)
        group = zarr.open_group(**name_store(location), mode="w", attributes=seal(attributes))
        group.create_array(
            "features",
            shape=(n_images, n_features),
            chunks=(images_per_partition, n_features),
            dtype=np.float32,
            fill_value=np.nan,
            compressors=_COMPRESSORS,
            dimension_names=("image", "feature"),
        )
        group.create_array(
            "status",
            shape=(n_images,),
            chunks=(images_per_partition,),
            dtype=np.uint8,
            fill_value=0,
            compressors=_COMPRESSORS,
            dimension_names=("image",),
            attributes={"flag_values": list(range(len(STATUSES))), "flag_meanings": " ".join(STATUSES)},
        )
        _consolidate(group)


def open_store(output: Location) -> RunArrays | None:
    """Open the arrays of a run for reading."""
    location = output.child(FEATURES)
    with explained(location, "read", remedy=advise_repair(output)):
        if not exists(location.child("status", "zarr.json")):
            return None
        # The arrays' own metadata, so that damage to them is found.
        group = zarr.open_group(**name_store(location), mode="r", use_consolidated=False, zarr_format=3)
        arrays = {name: StoredArray(group[name], output) for name in ("features", "status")}
    check_format(group.attrs, location.url)
    return RunArrays(arrays, dict(group.attrs))


def open_finished(output: Location) -> tuple[FinishedFeatures, npt.NDArray[np.uint8]] | None:
    """Open the features of a finished run, and read the codes of its statuses."""
    stored = open_store(output)
    if stored is None:
        return None
    codes = np.asarray(stored["status"][:])
    if (codes == STATUSES.index("pending")).any():
        raise DamageError(f"{_name_features(output)} (chunks of status are missing); {advise_repair(output)}")
    return FinishedFeatures(stored["features"].array, output, stored["status"]), codes


def _name_features(output: Location) -> str:
    """Begin a sentence on damage to the arrays."""
    return f"{output.child(FEATURES).url} is damaged"


def resize_store(output: Location, *, n_images: int, attributes: Mapping[str, Any]) -> None:
    """Make room for more images after the existing ones; completes an interrupted resizing."""
    location = output.child(FEATURES)
    with explained(location, "write"):
        # Consolidated metadata are stale as soon as an array is resized: they are left out and written last.
        group: Any = zarr.open_group(**name_store(location), mode="r+", use_consolidated=False, zarr_format=3)
        for array in (group["features"], group["status"]):
            array.resize((n_images, *array.shape[1:]))
        group.attrs.update(seal(dict(group.attrs) | dict(attributes)))
        _consolidate(group)


def _consolidate(group: zarr.Group) -> None:
    """Repeat the metadata of the arrays in that of their group, for xarray and for readers of a single request."""
    with warnings.catch_warnings():
        # Zarr warns that its specification does not have this yet; readers that do not know it skip it.
        warnings.filterwarnings("ignore", "Consolidated metadata", UserWarning)
        zarr.consolidate_metadata(group.store, path=group.path, zarr_format=3)


def read_partition(output: Location, *, index: int, start: int) -> tuple[npt.NDArray[np.float32], pd.DataFrame] | None:
    """Read the features, float32, and the outcomes of a partition; None if it is not committed."""
    if not exists(output.child(name_outcomes(index))):
        return None
    outcomes, stored = read_table(output, name_outcomes(index)), open_store(output)
    if stored is None:
        return None
    return np.asarray(stored["features"][start : start + len(outcomes)]), outcomes


def write_partition(
    output: Location,
    *,
    index: int,
    start: int,
    features: npt.NDArray[np.float32],
    outcomes: pd.DataFrame,
    is_committed: bool = False,
) -> None:
    """Store a partition: features (n, n_features), float32, NaN for failed images; statuses; then the outcome file,
    which commits it.
    """
    location = output.child(FEATURES)
    if is_committed:
        delete_result(output, name_outcomes(index))
    rows = slice(start, start + len(features))
    with explained(location, "write"):
        try:
            group: Any = zarr.open_group(**name_store(location), mode="r+", zarr_format=3)
        except FileNotFoundError as error:
            raise StorageError(
                f"cannot write {location.url}: it no longer exists, so it or its bucket was deleted; "
                "run again to start over"
            ) from error
        group["features"][rows] = features
        group["status"][rows] = outcomes["status"].map(STATUSES.index).to_numpy(np.uint8)
    write_table(output.child(name_outcomes(index)), outcomes)


def write_arrays(
    location: Location, arrays: Mapping[str, tuple[npt.NDArray[Any], Sequence[str]]], attributes: Mapping[str, Any]
) -> None:
    """Write small arrays, each with the names of its dimensions, as a Zarr group."""
    with explained(location, "write"):
        group = zarr.open_group(**name_store(location), mode="w", attributes=seal(attributes))
        for name, (values, dimensions) in arrays.items():
            group.create_array(
                name,
                data=np.asarray(values),
                dimension_names=tuple(dimensions),
                compressors=_COMPRESSORS,
                # Then a missing chunk is an error, instead of zeros.
                config={"write_empty_chunks": True},
            )


def create_arrays(location: Location, attributes: Mapping[str, Any]) -> None:
    """Create an empty group of arrays, in place of an earlier one."""
    with explained(location, "write"):
        zarr.open_group(**name_store(location), mode="w", attributes=seal(attributes))


def add_array(
    location: Location, name: str, *, shape: Sequence[int], n_rows: int, dtype: Any, dimensions: Sequence[str]
) -> Any:
    """Add an array to a group, to be filled by parts; a chunk has `n_rows` rows."""
    with explained(location, "write"):
        group = zarr.open_group(**name_store(location), mode="r+", zarr_format=3)
        return group.create_array(
            name,
            shape=tuple(shape),
            chunks=(n_rows, *(max(1, size) for size in shape[1:])),
            dtype=dtype,
            dimension_names=tuple(dimensions),
            compressors=_COMPRESSORS,
            config={"write_empty_chunks": True},
        )


def open_array(location: Location, name: str) -> Any:
    """Open an array of a group to write parts of it."""
    with explained(location, "write"):
        array = zarr.open_array(**name_store(location.child(name)), mode="r+", zarr_format=3)
        # Then a missing chunk is an error, instead of zeros.
        return array.with_config({"write_empty_chunks": True})


class LazyArray:
    """An array that is read chunk by chunk; the chunks that were used last stay in memory."""

    def __init__(self, array: Any, location: Location, remedy: str) -> None:
        self._array, self._location, self._remedy = array, location, remedy
        self.shape: tuple[int, ...] = array.shape
        self._size: int = array.chunks[0]
        chunk_bytes = self._size * int(np.prod(self.shape[1:])) * array.dtype.itemsize
        self._read = lru_cache(max(1, _CACHE_BYTES // max(1, chunk_bytes)))(self._read_chunk)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.shape[0]

    def __getitem__(self, rows: Any) -> npt.NDArray[Any]:
        """Read a row, or several."""
        if isinstance(rows, int | np.integer):
            return np.asarray(self._read(int(rows) // self._size)[int(rows) % self._size])
        chosen = np.arange(len(self))[rows]
        found = [self[row] for row in chosen]
        return np.stack(found) if found else np.empty((0, *self.shape[1:]), self._array.dtype)

    def _read_chunk(self, number: int) -> npt.NDArray[Any]:
        """Read a chunk."""
        with explained(self._location, "read", remedy=self._remedy):
            return np.asarray(self._array[number * self._size : (number + 1) * self._size])


def open_lazily(location: Location) -> dict[str, LazyArray]:
    """Open the arrays of a group without reading them, after checking that all of their chunks exist."""
    remedy = advise_repair(Location(location.url.rpartition("/")[0], location.storage_options))
    with explained(location, "read", remedy=remedy):
        return {name: LazyArray(array, location, remedy) for name, array in _list_arrays(location).items()}


def check_chunks(location: Location, remedy: str) -> None:
    """Read each chunk of a group of arrays, one at a time."""
    with explained(location, "read", remedy=remedy):
        for array in _list_arrays(location).values():
            size = array.chunks[0] if array.shape else 1
            for start in range(0, array.shape[0] if array.shape else 0, size):
                array[start : start + size]


def _list_arrays(location: Location) -> dict[str, Any]:
    """List the arrays of a group, after checking that all of their chunks exist."""
    group = zarr.open_group(**name_store(location), mode="r", zarr_format=3)
    check_format(group.attrs, location.url)
    arrays: dict[str, Any] = dict(group.arrays())
    for name, array in arrays.items():
        if array.nchunks_initialized < array.nchunks:
            raise ValueError(f"chunks of {name} are missing")
    return arrays


def read_arrays(location: Location) -> dict[str, npt.NDArray[Any]]:
    """Read a group of small arrays, by name."""
    remedy = advise_repair(Location(location.url.rpartition("/")[0], location.storage_options))
    with explained(location, "read", remedy=remedy):
        return {name: np.asarray(array[...]) for name, array in _list_arrays(location).items()}


def copy_arrays(source: Location, target: Location) -> None:
    """Copy a group of small arrays."""
    arrays = read_arrays(source)
    with explained(source, "read"):
        group = zarr.open_group(**name_store(source), mode="r", zarr_format=3)
        arrays_there: dict[str, Any] = dict(group.arrays())
        attributes = dict(group.attrs)
    dimensions = {name: array.metadata.dimension_names for name, array in arrays_there.items()}
    write_arrays(target, {name: (values, dimensions[name]) for name, values in arrays.items()}, attributes)


def hash_arrays(location: Location) -> str:
    """Hash the values of a group of small arrays."""
    digest = hashlib.sha256()
    for name, values in sorted(read_arrays(location).items()):
        digest.update(f"{name} {values.dtype} {values.shape} ".encode() + values.tobytes())
    return digest.hexdigest()


def name_store(location: Location) -> dict[str, Any]:
    """Name a Zarr store."""
    if location.is_local:
        # As text, Zarr would take a::b for a chain of file systems.
        return {"store": Path(location.path)}
    if location.is_s3 or location.is_azure:
        # Zarr would take those of s3fs and adlfs, which have retries of their own.
        fs = type(location.fs)(asynchronous=True, **location.options)
        return {"store": FsspecStore(fs, path=location.path)}
    return {"store": location.url, "storage_options": location.options}
