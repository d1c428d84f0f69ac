"""Results in the formats of other programs, written block by block: one block is in memory."""

import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask.core.escaping import escape_controls
from fruitdask.core.storage import Location, exists, explained
from fruitdask.errors import FruitdaskError

_COORDINATES = r"^(pca|tsne)_\d+$"
#: Columns with few distinct texts, which Parquet stores as a dictionary.
_REPEATED = ("label", "status", "split", "group")
#: The file that the projector of TensorBoard reads first.
_PROJECTOR = """embeddings {
  tensor_name: "features"
  tensor_path: "features.tsv"
  metadata_path: "metadata.tsv"
}
"""


@dataclass(frozen=True, eq=False)
class Block:
    """Some images and their results."""

    #: ``path``, ``label``, ``status``, ``split`` and ``group`` if configured, ``pca_1``, ``pca_2`` ... ``tsne_2``.
    table: pd.DataFrame
    #: (n, n_features), float32; NaN for images without features.
    features: npt.NDArray[np.float32]
    #: The absolute local path of each image, or its URL.
    files: list[str]
    #: The columns of the map's coordinates, if there is a map.
    axes: tuple[str, str] | None

    @property
    def is_ok(self) -> npt.NDArray[np.bool_]:
        """Mask of images with features."""
        return (self.table["status"] == "ok").to_numpy(bool)

    @property
    def texts(self) -> list[str]:
        """The columns that are not coordinates."""
        return [str(name) for name in self.table if name not in self.table.filter(regex=_COORDINATES)]

    def select(self, mask: npt.NDArray[np.bool_]) -> "Block":
        """Return some of the images."""
        files = [self.files[row] for row in np.flatnonzero(mask)]
        return replace(self, table=self.table[mask], features=self.features[mask], files=files)


@dataclass(frozen=True)
class Format:
    """An export format: how to write it, and which images it holds."""

    write: Callable[[Iterable[Block], Location], None]
    #: Patterns of all names in its folder; a format without them is one file.
    names: tuple[str, ...] = ()
    #: Images that it holds: all, those with features, or those on the map.
    rows: Literal["all", "features", "map"] = "all"
    takes_urls: bool = False

    def choose_rows(self, block: Block) -> Block:
        """Return the images that the format holds."""
        if self.rows == "all":
            return block
        columns = block.axes if self.rows == "map" else None
        on_map = np.isfinite(block.table[list(columns)].to_numpy()).all(axis=1) if columns is not None else True
        return block.select(block.is_ok & on_map)


@contextmanager
def staged(target: Location) -> Iterator[Location]:
    """Yield a place to write to, which becomes `target` at the end; after an error, nothing of it remains.

    On a disk, an earlier target is replaced at the end; elsewhere it is deleted first.
    """
    is_local, fs = target.is_local, target.fs
    staging = Location(f"{target.path}.{uuid.uuid4().hex}.part") if is_local else target
    with explained(target, "write"):
        if is_local:
            os.makedirs(os.path.dirname(os.path.abspath(target.path)), exist_ok=True)
        elif exists(target):
            fs.rm(target.path, recursive=True)
        try:
            yield staging
            if is_local and os.path.isdir(target.path):
                fs.rm(target.path, recursive=True)
            if is_local:
                os.replace(staging.path, target.path)
        except BaseException:
            with suppress(Exception):
                fs.rm(staging.path, recursive=True)
            raise


def write_parquet(blocks: Iterable[Block], target: Location) -> None:
    """Write one Parquet file, a row group per block; features are null where an image has none."""
    _write_parquet_file(map(_build_table, blocks), target)


def write_embedding_atlas(blocks: Iterable[Block], target: Location) -> None:
    """Write a Parquet file of images on the map: also ``projection_x``, ``projection_y``, and ``image``, the file."""
    import pyarrow as pa

    def build_table(block: Block) -> Any:
        table = _build_table(block)
        for name, column in zip(("projection_x", "projection_y"), block.axes or (), strict=True):
            table = table.append_column(name, table[column])
        return table.append_column("image", pa.array(block.files, pa.string()))

    _write_parquet_file(map(build_table, blocks), target)


def write_spark(blocks: Iterable[Block], target: Location) -> None:
    """Write a folder of Parquet files with the columns and types of a Spark job: path, label, features, pcaFeatures."""
    import pyarrow as pa

    job = uuid.uuid4()
    if target.is_local:
        os.mkdir(target.path)
    for number, block in enumerate(blocks):
        columns = {name: _build_texts(block, name) for name in ("path", "label")}
        columns["features"] = pa.array(_list_rows(block, block.features), pa.list_(pa.float32()))
        pca = block.table.filter(regex=r"^pca_\d+$").to_numpy(np.float64)
        if pca.shape[1]:
            columns["pcaFeatures"] = pa.array(_list_rows(block, pca), pa.list_(pa.float64()))
        part = target.child(f"part-{number:05d}-{job}-c000.snappy.parquet")
        _write_parquet_file(iter([pa.table(columns)]), part)
    target.fs.pipe_file(target.child("_SUCCESS").path, b"")


def write_lance(blocks: Iterable[Block], target: Location) -> None:
    """Write a Lance dataset with the columns of `write_parquet`."""
    try:
        import lance
    except ImportError as error:
        raise FruitdaskError("the format lance needs pylance; install it with pip install pylance") from error
    import pyarrow as pa

    tables, failures = map(_build_table, blocks), list[BaseException]()
    first = next(tables)

    def list_batches() -> Iterator[Any]:
        try:
            for table in chain([first], tables):
                yield from table.to_batches()
        except BaseException as error:
            failures.append(error)
            raise

    try:
        lance.write_dataset(pa.RecordBatchReader.from_batches(first.schema, list_batches()), target.path)
    except Exception:
        # Lance wraps an error of its source in its own error, whose message is the whole traceback.
        if failures:
            raise failures[0] from None
        raise


def write_tensorboard(blocks: Iterable[Block], target: Location) -> None:
    """Write a log folder for the projector of TensorBoard: features and metadata as TSV, and its configuration."""
    import pyarrow as pa
    from pyarrow import csv

    options = csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
    os.mkdir(target.path)
    with (
        open(target.child("features.tsv").path, "wb") as features,
        open(target.child("metadata.tsv").path, "w", encoding="utf-8", newline="\n") as metadata,
    ):
        for number, block in enumerate(blocks):
            if not number:
                metadata.write("\t".join(block.texts) + "\n")
            for row in block.table[block.texts].astype(str).itertuples(index=False):
                metadata.write("\t".join(map(escape_controls, row)) + "\n")
            columns = [pa.array(column) for column in block.features.T]
            csv.write_csv(pa.table(columns, [str(place) for place in range(len(columns))]), features, options)
    # The projector looks for this file, so it is written last.
    with open(target.child("projector_config.pbtxt").path, "w", encoding="utf-8") as config:
        config.write(_PROJECTOR)


def write_fiftyone(blocks: Iterable[Block], target: Location) -> None:
    """Write samples.json of a FiftyOneDataset, in the form from which FiftyOne infers the fields."""
    os.mkdir(target.path)
    with open(target.child("samples.json").path, "w", encoding="utf-8") as file:
        file.write('{"samples": [')
        separator = "\n"
        for block in blocks:
            for sample in _describe_samples(block):
                file.write(separator + json.dumps(sample, allow_nan=False))
                separator = ",\n"
        file.write("\n]}\n")


FORMATS = {
    "parquet": Format(write_parquet, takes_urls=True),
    "embedding-atlas": Format(write_embedding_atlas, rows="map"),
    "tensorboard": Format(
        write_tensorboard, names=("projector_config.pbtxt", "features.tsv", "metadata.tsv"), rows="features"
    ),
    "fiftyone": Format(write_fiftyone, names=("samples.json",)),
    "lance": Format(write_lance, names=("data", "_versions", "_transactions", "_indices", "_deletions")),
    "spark": Format(write_spark, names=("_SUCCESS", "part-*.parquet"), takes_urls=True),
}


def _build_texts(block: Block, name: str) -> Any:
    """Build an Arrow array of texts."""
    import pyarrow as pa

    return pa.array(block.table[name].astype(object).tolist(), pa.string())


def _build_table(block: Block) -> Any:
    """Build an Arrow table: texts, features as lists of a fixed size, coordinates."""
    import pyarrow as pa

    values = pa.array(block.features.ravel())
    features = pa.FixedSizeListArray.from_arrays(values, block.features.shape[1], mask=pa.array(~block.is_ok))
    coordinates = block.table.filter(regex=_COORDINATES)
    columns = {name: _build_texts(block, name) for name in block.texts} | {"features": features}
    columns |= {str(name): pa.array(coordinates[name], pa.float32(), from_pandas=True) for name in coordinates}
    return pa.table(columns)


def _write_parquet_file(tables: Iterator[Any], target: Location) -> None:
    """Write tables of one schema to a Parquet file, a row group each."""
    from pyarrow import parquet

    first = next(tables)
    dictionaries = [name for name in _REPEATED if name in first.column_names]
    with (
        target.fs.open(target.path, "wb") as file,
        parquet.ParquetWriter(file, first.schema, compression="snappy", use_dictionary=dictionaries) as writer,
    ):
        for table in chain([first], tables):
            writer.write_table(table)


def _list_rows(block: Block, values: npt.NDArray[np.floating]) -> list[npt.NDArray[np.floating] | None]:
    """List the rows of an array, None for images without features."""
    return [row if is_ok else None for row, is_ok in zip(values, block.is_ok, strict=True)]


def _describe_samples(block: Block) -> Iterator[dict[str, Any]]:
    """Describe images as FiftyOne does; a file that is not on a disk is named by its path in the input."""
    arrays = {
        "features": block.features,
        **{name: block.table.filter(regex=rf"^{name}_\d+$").to_numpy(np.float32) for name in ("pca", "tsne")},
    }
    for row, image in enumerate(block.table[block.texts].to_dict("records")):
        path = block.files[row] if os.path.isabs(block.files[row]) else image["path"]
        sample: dict[str, Any] = {"filepath": path, **{str(name): text for name, text in image.items()}}
        # Its tags name the split by convention.
        sample["tags"] = [split] if (split := sample.pop("split", "")) else []
        if label := sample.pop("label"):
            sample["ground_truth"] = {"_cls": "Classification", "tags": [], "label": label}
        known = {name: values[row] for name, values in arrays.items() if values.shape[1]}
        yield sample | {name: values.tolist() for name, values in known.items() if np.isfinite(values).all()}
