"""Searching for similar images: seconds and memory, compared with one matrix product of NumPy over the same features.

    python tests/benchmarks/search.py [--images 200000] [--features 1280] [--queries 1 16] [--folder FOLDER]

Draws features with 512 rows per chunk into a Zarr store like that of a run (5 GB for 1,000,000 images of 1280
features), and removes it; beyond 65,536 images, files of chunks are repeated. Each search runs in its own process,
whose peak memory is measured. The baseline reads the same store in blocks of the same size and multiplies them with the
queries, without finding anything: what any exact search has to do. In memory, it multiplies the whole matrix at once.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import dask
import dask.array as da
import numpy as np
from measuring import measure, print_table

from fruitdask import store
from fruitdask.analysis.search import METRICS, find_nearest
from fruitdask.core.storage import Location
from fruitdask.pipeline.results import open_features
from fruitdask.pipeline.similar import _BLOCK_BYTES

CHUNK_ROWS, K = 512, 20
#: Chunks that are drawn; others are copies of their files.
DRAWN_CHUNKS = 128
#: Directions in which images differ most, as in features of photographs, and the size of the rest.
N_STRONG, NOISE = 50, 0.3


def draw_features(output: Location, *, n_images: int, n_features: int) -> None:
    """Draw features chunk by chunk."""
    store.create_store(output, n_images=n_images, n_features=n_features, images_per_partition=CHUNK_ROWS, attributes={})
    import zarr

    group = zarr.open_group(f"{output.url}/{store.FEATURES}", mode="r+")
    random = np.random.default_rng(0)
    directions = random.standard_normal((N_STRONG, n_features), np.float32)
    for start in range(0, min(n_images, DRAWN_CHUNKS * CHUNK_ROWS), CHUNK_ROWS):
        n_rows = min(CHUNK_ROWS, n_images - start)
        rows = random.standard_normal((n_rows, N_STRONG), np.float32) @ directions
        rows += NOISE * random.standard_normal((n_rows, n_features), np.float32) + 10
        group["features"][start : start + n_rows] = rows
    for index in range(DRAWN_CHUNKS, -(-n_images // CHUNK_ROWS)):
        source, target = (
            output.child(store.FEATURES, "features", "c", f"{part}") for part in (index % DRAWN_CHUNKS, index)
        )
        shutil.copytree(source.path, target.path)
    group["status"][:] = store.STATUSES.index("ok")


def time_best(work: Callable[[], object], repeats: int) -> float:
    """Return the seconds of the fastest of some repetitions."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure_here(folder: str, method: str, n_queries: int, repeats: int) -> float:
    """Measure one method in this process; returns seconds."""
    place, name = method.split(" ")
    features, _ = open_features(Location(folder), block_bytes=_BLOCK_BYTES)
    queries = features[:n_queries].compute() + np.float32(0.1)
    if place == "memory":
        array = features.compute()
        features = da.from_array(array, chunks=features.chunks, name=False)
    with dask.config.set(scheduler="threads"):
        if name != "product":
            return time_best(lambda: find_nearest(features, queries, k=K, metric=name), repeats)
        if place == "memory":
            return time_best(lambda: queries @ array.T, repeats)
        multiply = dask.delayed(lambda block: np.asarray(queries @ block.T).max())
        return time_best(lambda: dask.compute(*map(multiply, features.to_delayed().ravel())), repeats)


def main() -> None:
    """Draw the features, measure all methods and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--features", type=int, default=1280)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--places", nargs="+", default=["memory", "disk"])
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        folder, method, n_queries = arguments.one
        print(json.dumps(measure_here(folder, method, int(n_queries), arguments.repeats)))
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        draw_features(Location(folder), n_images=arguments.images, n_features=arguments.features)
        for place in arguments.places:
            for n_queries in arguments.queries:
                baseline = 0.0
                for name in ("product", *METRICS):
                    one = ["--one", folder, f"{place} {name}", f"{n_queries}", "--repeats", f"{arguments.repeats}"]
                    command = [sys.executable, str(Path(__file__)), *one]
                    measured = measure(command)
                    seconds = json.loads(measured.output.strip().splitlines()[-1])
                    baseline = baseline or seconds
                    rows.append(
                        [place, f"{n_queries}", name, f"{seconds:.2f}", f"{seconds / n_queries:.3f}"]
                        + [f"{seconds / baseline:.1f}", f"{measured.tree_bytes / 1e6:,.0f}"]
                    )
    print(f"{arguments.images:,} images of {arguments.features:,} features, the {K} nearest")
    print_table(["features", "queries", "method", "seconds", "seconds a query", "ratio", "MB"], rows)


if __name__ == "__main__":
    main()
