"""Exports results in the formats of other programs."""

import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from typing import Any

from fruitdask import report, store
from fruitdask.core.config import ReduceConfig
from fruitdask.core.storage import Location, exists, explained
from fruitdask.errors import ConfigError, OutputError
from fruitdask.pipeline.open import open as open_result
from fruitdask.pipeline.reduce import BLOCK_BYTES
from fruitdask.pipeline.results import RunResult, open_features
from fruitdask.report.exports import FORMATS, Block, Format, staged


def export(
    results: "str | RunResult",
    target: "str | os.PathLike[str]",
    to: str = "parquet",
    *,
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    target_options: Mapping[str, Any] | None = None,
) -> int:
    """
    Write the results of a finished run in the format of another program.

    Parameters
    ----------
    results : str or RunResult
        The finished run, or the folder or URL of its results.
    target : str or PathLike
        The file or folder to write; also a URL for ``parquet`` and ``spark``.
    to : str
        ``parquet``: one file of all images; ``embedding-atlas``: one Parquet file of the images on the map;
        ``tensorboard``: a log folder for its projector; ``fiftyone``: the folder of a FiftyOneDataset; ``lance``: a
        Lance dataset (needs pylance); ``spark``: a Parquet folder as Spark writes it.
    overwrite : bool
        Whether to replace an earlier export.
    storage_options : Mapping[str, Any], optional
        Options of the fsspec file system of ``results``.
    target_options : Mapping[str, Any], optional
        Options of the fsspec file system of ``target``.

    Returns
    -------
    int
        Number of images written.

    Raises
    ------
    ConfigError
        If there is no such format, or the target cannot hold it.
    OutputError
        If the target exists, or the results lack what the format needs.
    DamageError
        If the results are damaged.
    FruitdaskError
        If pylance is not installed.

    Notes
    -----
    About 20 MiB of features are in memory at a time. A failed export leaves nothing behind. Features are null
    where an image has none; ``embedding-atlas`` and ``tensorboard`` leave such images out. The map is t-SNE if that was
    computed for all images, else the first two principal components.

    Examples
    --------
    >>> import fruitdask
    >>> fruitdask.export("results", "fruits.xls", "excel")
    Traceback (most recent call last):
    fruitdask.errors.ConfigError: to: expected parquet, embedding-atlas, tensorboard, fiftyone, lance or spark, found
    excel
    """
    if to not in FORMATS:
        *names, last = FORMATS
        raise ConfigError(f"to: expected {', '.join(names)} or {last}, found {to}")
    written, location = FORMATS[to], Location(os.fspath(target).rstrip("/") or "/", target_options or {})
    result = results if isinstance(results, RunResult) else open_result(str(results), storage_options)
    _check_place(location, to, result.output)
    _check_earlier(location, written, overwrite=overwrite)
    axes = _choose_axes(result)
    if written.rows == "map" and axes is None:
        raise OutputError(
            f"{result.output.url}: expected at least two principal components for a map, found fewer; run it with "
            "reduce.enabled=true"
        )
    n_written = 0

    def count(block: Block) -> Block:
        nonlocal n_written
        n_written += len(block.table)
        return block

    with staged(location) as staging:
        chosen = map(written.choose_rows, read_blocks(result, axes))
        written.write((count(block) for block in chosen if len(block.table)), staging)
    return n_written


def read_blocks(result: RunResult, axes: tuple[str, str] | None) -> Iterator[Block]:
    """Read the table and the features of a run, some partitions at a time."""
    output, start = result.output, 0
    features = open_features(output, block_bytes=BLOCK_BYTES)[0]
    n_rows, folder = int(features.chunksize[0]), _locate_input(result)
    for part in report.read_parts(output):
        for first in range(0, len(part), n_rows):
            table = part.iloc[first : first + n_rows].reset_index(drop=True)
            rows = features[start : start + len(table)].compute(scheduler="threads")
            start += len(table)
            if len(rows) == len(table):
                yield Block(table, rows, [folder.child(path).url for path in table["path"]], axes)


def _locate_input(result: RunResult) -> Location:
    """Locate the folder of the images, absolute on a disk; secrets are not in the manifest."""
    url = result.manifest["config"]["input"]["url"].removeprefix("file://")
    return Location(url if "://" in url else os.path.abspath(url))


def _choose_axes(result: RunResult) -> tuple[str, str] | None:
    """Choose the columns of the map: t-SNE of all images, else components, of which there may be too few."""
    manifest = store.RunManifest.model_validate(result.manifest)
    n_ok = manifest.counts.by_status.get("ok", 0) if manifest.counts is not None else 0
    if not n_ok:
        raise OutputError(f"{result.output.url}: expected images with features, found none; see failures.csv there")
    if manifest.pca is None or manifest.pca.n_components < 2:
        return None
    tsne = manifest.read_settings("reduce", ReduceConfig).tsne
    return ("tsne_1", "tsne_2") if tsne.enabled and n_ok <= tsne.max_rows else ("pca_1", "pca_2")


def _check_place(target: Location, to: str, output: Location) -> None:
    """Refuse a place that the format cannot be written to, or that belongs to the results."""
    if target.is_archive or not (target.is_local or FORMATS[to].takes_urls):
        raise ConfigError(
            f"{target.url}: expected a local path for {to}, found another place; copy it there afterwards"
        )
    inner, outer = (os.path.realpath(place.path) if place.is_local else place.path for place in (target, output))
    if f"{inner}/".startswith(f"{outer}/") and type(target.fs) is type(output.fs):
        raise ConfigError(f"{target.url} lies inside the results {output.url}; choose a place outside of them")


def _check_earlier(target: Location, written: Format, *, overwrite: bool) -> None:
    """Refuse a target that exists, or with `overwrite` one that is not an earlier export of this format."""
    if not exists(target):
        return
    if not overwrite:
        raise OutputError(
            f"{target.url}: expected a new place, found one that exists; choose another, or replace "
            "an earlier export with --overwrite"
        )
    with explained(target, "read"):
        is_folder = bool(target.fs.isdir(target.path))
        paths = target.fs.ls(target.path, detail=False) if is_folder else []
    names = sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in paths)
    foreign = [name for name in names if not any(fnmatch(name, pattern) for pattern in written.names)]
    if foreign or is_folder != bool(written.names):
        found = foreign[0] if foreign else "a folder" if is_folder else "a file"
        raise OutputError(
            f"{target.url}: expected an earlier export of this format, found {found}; choose another, or delete it"
        )
