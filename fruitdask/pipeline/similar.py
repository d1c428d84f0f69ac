"""Finds the images of a run that are most similar to given photographs, by their features."""

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask import store
from fruitdask.core.config import Config
from fruitdask.core.listing import find_rows
from fruitdask.core.storage import Location
from fruitdask.errors import ConfigError, FruitdaskError, ImageError
from fruitdask.pipeline.embed import describe_source, embed_photographs, list_photographs, locate_photograph
from fruitdask.pipeline.inputs import restore_config
from fruitdask.pipeline.plan import LOCAL_REDUCE_BYTES
from fruitdask.pipeline.results import RunResult, open_features, read_images
from fruitdask.report.similar import render_matches
from fruitdask.report.thumbnails import Thumbnails
from fruitdask.store.exploration import open_exploration
from fruitdask.worker.fetch import Photograph, read_photographs

#: Features are searched in blocks of about this size, where the overhead of a block is small.
_BLOCK_BYTES = 32 * 1024**2
#: Side of the pictures on a page, twice the size at which they are shown; and Base64 characters of all of them.
_PICTURE_PX, _PICTURES_BYTES = 192, 12_000_000


@dataclass(frozen=True, eq=False)
class Queries:
    """Photographs to search for."""

    names: list[str]
    #: Features (n, n_features), float32.
    features: npt.NDArray[np.float32]
    #: Row of each in the run, int64; -1 for photographs outside the run.
    rows: npt.NDArray[np.int64]
    #: The photographs as they were given.
    photographs: list[Any]


def list_queries(
    result: RunResult,
    photographs: Any,
    *,
    storage_options: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> Queries:
    """Find photographs in a run, and compute the features of the others."""
    given, images = list_photographs(photographs), read_images(result.output)
    rows = _find_given(given, images, result)
    outside = np.flatnonzero(rows < 0)
    inside = rows[rows >= 0]
    failed = inside[(images["status"].iloc[inside] != "ok").to_numpy()]
    if len(failed):
        image = images.iloc[failed[0]]
        raise ImageError(
            f"{image['path']}: this image of the run has no features ({image['status']}), see failures.csv"
        )
    array = open_features(result.output)[0]
    features = np.empty((len(given), array.shape[1]), np.float32)
    if len(inside):
        features[rows >= 0] = array[inside].compute(scheduler="threads")
    names = images["path"].iloc[rows].tolist() if len(images) else []
    if len(outside):
        features[outside], table = embed_photographs(
            result.output,
            store.RunManifest.model_validate(result.manifest),
            [given[place] for place in outside],
            storage_options=storage_options,
            overrides=overrides,
        )
        bad = table[table["status"] != "ok"]
        if len(bad):
            raise ImageError(_explain_bad(bad.iloc[0], result))
        for place, name in zip(outside, table["path"], strict=True):
            names[place] = name
    return Queries(names, features, rows, given)


def find_similar(result: RunResult, queries: Queries, *, k: int, metric: str, client: Any = None) -> pd.DataFrame:
    """Find the images of a run that are nearest to some queries."""
    from fruitdask.analysis.search import METRICS, find_nearest

    if metric not in METRICS:
        raise ConfigError(f"metric: expected {' or '.join(METRICS)}, found {metric}")
    if k < 1:
        raise ConfigError(f"k: expected at least 1 image to find, found {k}")
    features, _ = open_features(result.output, block_bytes=_BLOCK_BYTES)
    with _choose_scheduler(int(features.nbytes), client):
        # The memory of the search grows with k.
        k = min(k, len(features))
        rows, distances = find_nearest(features, queries.features, k=k, metric=metric, own=queries.rows)
    n_queries, k = rows.shape
    found = read_images(result.output).drop(columns="status").iloc[rows.ravel()].reset_index(drop=True)
    found.insert(0, "query", np.repeat(np.asarray(queries.names, object), k))
    found.insert(1, "rank", np.tile(np.arange(1, k + 1), n_queries))
    return found.assign(distance=distances.ravel())[rows.ravel() >= 0].reset_index(drop=True)


def render_similar(result: RunResult, queries: Queries, table: pd.DataFrame, *, overrides: Sequence[str] = ()) -> str:
    """Render queries and results side by side as one HTML file; pictures come from the input, else from thumbnails."""
    thumbnails = Thumbnails(None, max_bytes=_PICTURES_BYTES)
    places = {
        name: locate_photograph(given, 0)[1]
        for name, given, row in zip(queries.names, queries.photographs, queries.rows, strict=True)
        if row < 0
    }
    config = restore_config(store.RunManifest.model_validate(result.manifest), overrides=overrides)
    source = Location(config.input.url, config.input.storage_options, attempts=1)
    shown = dict.fromkeys([*(name for name in queries.names if name not in places), *table["path"]])
    pixels = _read_pixels(places | {path: source.child(path) for path in shown}, config)
    stored = open_exploration(result.output) if len(pixels) < len(places) + len(shown) else None
    if stored is not None:
        kept = {path: place for place, path in enumerate(stored.images["path"].iloc[stored.thumbnail_rows])}
        pixels = {path: stored.thumbnails[kept[path]] for path in shown if path in kept} | pixels
    pictures = {name: thumbnails.encode_pixels(each, max_px=_PICTURE_PX) for name, each in pixels.items()}
    return render_matches(table, title=result.output.url, pictures=pictures)


def _find_given(given: list[Any], images: pd.DataFrame, result: RunResult) -> npt.NDArray[np.int64]:
    """Find the rows of given photographs: of row numbers and paths of the run; -1 for others."""
    rows, n_images = np.full(len(given), -1, np.int64), len(images)
    folder = f"{result.manifest['config']['input']['url'].rstrip('/')}/"
    paths = {
        place: str(each) for place, each in enumerate(given) if isinstance(each, str) or hasattr(each, "__fspath__")
    }
    for rewrite in (
        str,
        lambda path: path.removeprefix(folder),
        lambda path: os.path.abspath(path).removeprefix(folder),
    ):
        left = [place for place in paths if rows[place] < 0]
        wanted = pd.Series([rewrite(paths[place]) for place in left], dtype="str")
        # An index of the few, not of the many.
        found = find_rows(images["path"], wanted)
        there = np.flatnonzero(found >= 0)
        rows_of = dict(zip(wanted.iloc[found[there]], there.tolist(), strict=True))
        rows[left] = [rows_of.get(path, -1) for path in wanted]
    for place, each in enumerate(given):
        if isinstance(each, int | np.integer):
            if not 0 <= each < n_images:
                raise ConfigError(f"expected a row of the run from 0 to {n_images - 1:,}, found {each}")
            rows[place] = each
    return rows


def _explain_bad(row: Any, result: RunResult) -> str:
    """Explain why a photograph cannot be searched for."""
    if row["status"] == "missing":
        example = result.table["path"].iloc[0]
        return (
            f"{row['path']}: expected an image of the run, such as {example}, or a file or URL of a photograph, found "
            "neither"
        )
    return f"{row['path']}: expected a photograph, found one that cannot be used ({row['status']}): {row['error']}"


def _choose_scheduler(n_bytes: int, client: Any) -> AbstractContextManager[Any]:
    """Choose where to search: few features on threads of this process, many on a cluster that was given."""
    import dask

    if client is None or n_bytes <= LOCAL_REDUCE_BYTES:
        return dask.config.set(scheduler="threads")
    return client.as_current()  # type: ignore[no-any-return]


def _read_pixels(places: Mapping[str, Photograph], config: Config) -> dict[str, npt.NDArray[np.uint8]]:
    """Read photographs as small squares, without those that cannot be read."""
    source = replace(describe_source(config), decode="fast")
    pixels: dict[str, npt.NDArray[np.uint8]] = {}
    with suppress(FruitdaskError):
        for batch in read_photographs(list(places.items()), source, input_px=_PICTURE_PX):
            paths = [batch.outcomes[row].path for row in batch.rows]
            pixels |= dict(zip(paths, batch.pixels, strict=True))
    return pixels
