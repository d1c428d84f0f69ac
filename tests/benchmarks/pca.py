"""Principal components of features on disk: seconds, memory and error of each solver.

    python tests/benchmarks/pca.py [--rows 100000 1000000] [--features 1280] [--solvers "dask-ml, full" ...]

Features are drawn once into a Zarr store with 512 rows per chunk: fifty strong directions, a mean far from zero, a
little noise. Each solver runs in its own process, with two Dask workers of one thread, and reads the store in
blocks of 4096 rows. Its seconds are those of the fit alone; its CPU seconds are those of client and workers, which are
more reliable on a shared machine. Its error is the largest distance between one of the first ten components and that of
the covariance in float64.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from measuring import measure

N_COMPONENTS = 10
_ROWS_PER_CHUNK, _ROWS_PER_BLOCK = 512, 4096
#: Number of rows above which solvers that hold all features, or take many minutes, are left out.
_MANY_ROWS = 200_000


def fit_ours(features: Any, store: str, *, svd_solver: str) -> np.ndarray:
    """Run fruitdask's PCA with covariance_eigh, in one pass."""
    from fruitdask import PCA

    return PCA(N_COMPONENTS, svd_solver=svd_solver, random_state=0).fit(features).components_


def fit_small_blocks(features: Any, store: str) -> np.ndarray:
    """Run the same with a block for each chunk of the store."""
    import dask.array as da

    return fit_ours(da.from_zarr(store), store, svd_solver="covariance_eigh")


def fit_dask_covariance(features: Any, store: str) -> np.ndarray:
    """Take Dask's mean, then its product: two passes."""
    mean = features.mean(axis=0, dtype=np.float64).compute()
    centred = features.astype(np.float64) - mean
    return np.linalg.eigh((centred.T @ centred).compute())[1][:, ::-1].T


def fit_dask_svd(features: Any, store: str) -> np.ndarray:
    """Decompose by QR of each block."""
    import dask.array as da

    features = features.astype(np.float64)
    return da.linalg.svd(features - features.mean(axis=0))[2].compute()


def fit_dask_ml(features: Any, store: str, **options: Any) -> np.ndarray:
    """Run dask-ml's own PCA."""
    from dask_ml.decomposition import PCA

    return PCA(N_COMPONENTS, random_state=0, **options).fit(features.astype(np.float64)).components_


def fit_dask_ml_incremental(features: Any, store: str) -> np.ndarray:
    """Run dask-ml's incremental PCA: blocks one after another, each updating the fit so far."""
    from dask_ml.decomposition import IncrementalPCA

    solver = IncrementalPCA(N_COMPONENTS, batch_size=_ROWS_PER_BLOCK, svd_solver="full")
    return solver.fit(features.astype(np.float64)).components_


def fit_sklearn_incremental(features: Any, store: str) -> np.ndarray:
    """Feed scikit-learn's incremental PCA block by block, in one process with all cores."""
    from sklearn.decomposition import IncrementalPCA

    solver, array = IncrementalPCA(N_COMPONENTS), zarr.open_array(store, mode="r")
    for start in range(0, array.shape[0], _ROWS_PER_BLOCK):
        solver.partial_fit(array[start : start + _ROWS_PER_BLOCK].astype(np.float64))
    return solver.components_


def fit_sklearn(features: Any, store: str, *, svd_solver: str) -> np.ndarray:
    """Run scikit-learn's PCA on everything in memory, in one process with all cores."""
    from sklearn.decomposition import PCA

    values = zarr.open_array(store, mode="r")[:].astype(np.float64)
    return PCA(N_COMPONENTS, svd_solver=svd_solver, copy=False).fit(values).components_


#: Each solver, and whether it is run on many rows too.
SOLVERS: dict[str, tuple[Callable[[Any, str], np.ndarray], bool]] = {
    "fruitdask, covariance_eigh": (partial(fit_ours, svd_solver="covariance_eigh"), True),
    "fruitdask, covariance_eigh, blocks of 512 rows": (fit_small_blocks, True),
    "fruitdask, full": (partial(fit_ours, svd_solver="full"), False),
    "fruitdask, randomized": (partial(fit_ours, svd_solver="randomized"), True),
    "dask, mean, then product": (fit_dask_covariance, True),
    "dask, svd (tsqr)": (fit_dask_svd, False),
    "dask-ml, full (tsqr)": (partial(fit_dask_ml, svd_solver="full"), False),
    "dask-ml, randomized, 4 iterations": (partial(fit_dask_ml, svd_solver="randomized", iterated_power=4), False),
    "dask-ml, incremental": (fit_dask_ml_incremental, False),
    "scikit-learn, incremental": (fit_sklearn_incremental, False),
    "scikit-learn, covariance_eigh": (partial(fit_sklearn, svd_solver="covariance_eigh"), False),
    "scikit-learn, full": (partial(fit_sklearn, svd_solver="full"), False),
}


def draw_features(path: Path, n_rows: int, n_features: int) -> np.ndarray:
    """Write features to a store; returns their first components, from a covariance summed about the mean they were
    drawn with.
    """
    rng = np.random.default_rng(0)
    mean = rng.uniform(1, 5, n_features)
    directions = rng.normal(size=(50, n_features)) * np.geomspace(1, 0.05, 50)[:, np.newaxis]
    store = zarr.create_array(path, shape=(n_rows, n_features), chunks=(_ROWS_PER_CHUNK, n_features), dtype=np.float32)
    products, sums = np.zeros((n_features, n_features)), np.zeros(n_features)
    for start in range(0, n_rows, _ROWS_PER_BLOCK):
        n = min(_ROWS_PER_BLOCK, n_rows - start)
        block = (rng.normal(size=(n, 50)) @ directions + mean).astype(np.float32)
        block += 0.05 * rng.standard_normal((n, n_features), np.float32)
        store[start : start + n] = block
        away = block - mean
        products += away.T @ away
        sums += away.sum(axis=0)
    return np.linalg.eigh(products - np.outer(sums, sums) / n_rows)[1][:, : -N_COMPONENTS - 1 : -1].T


def solve(name: str, store: str, result: str) -> None:
    """Run one solver on a cluster and write down what it found and how long it took."""
    import dask.array as da
    from distributed import Client, LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None) as cluster:
        with Client(cluster) as client:

            def read_clocks() -> np.ndarray:
                cpu_seconds = sum(client.run(time.process_time).values()) + time.process_time()
                return np.array([time.perf_counter(), cpu_seconds])

            features = da.from_zarr(store, chunks=(_ROWS_PER_BLOCK, -1))
            start = read_clocks()
            components = SOLVERS[name][0](features, store)
            np.savez(result, components=components[:N_COMPONENTS], clocks=read_clocks() - start)


def compare(names: list[str], n_rows: int, n_features: int) -> None:
    """Run solvers on a number of rows and print a table."""
    with tempfile.TemporaryDirectory() as folder:
        store, result = Path(folder, "features.zarr"), Path(folder, "result.npz")
        if shutil.disk_usage(folder).free < 8 * n_rows * n_features:
            raise SystemExit(f"too little disk space in {folder} for {n_rows:,} x {n_features:,} features")
        expected = draw_features(store, n_rows, n_features)
        lines = {}
        for name in names:
            command = [sys.executable, __file__, "--solve", name, str(store), str(result)]
            measurement = measure(command, PYTHONWARNINGS="ignore")
            found = np.load(result)
            signs = np.sign(np.sum(found["components"] * expected, axis=1, keepdims=True))
            error = np.linalg.norm(found["components"] * signs - expected, axis=1).max()
            memory = (measurement.client_bytes / 1e6, measurement.worker_bytes / 1e6)
            lines[name] = (*found["clocks"].tolist(), *memory, error)
            print(f"{n_rows:,} rows, {name}: {lines[name]}", file=sys.stderr, flush=True)
    fastest = min(seconds for seconds, *_ in lines.values())
    columns = f"{'seconds':>9}{'ratio':>8}{'CPU s':>8}{'client MB':>11}{'worker MB':>11}{'error':>10}"
    print(f"\n{f'{n_rows:,} x {n_features:,}':48}{columns}")
    for name, (seconds, cpu, client, worker, error) in lines.items():
        figures = f"{seconds:9.1f}{seconds / fastest:8.2f}{cpu:8.1f}{client:11.0f}{worker:11.0f}{error:10.1e}"
        print(f"{name:48}{figures}", flush=True)


def main() -> None:
    """Run everything once and print a table for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--features", type=int, default=1280)
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, metavar="SOLVER", help="; ".join(SOLVERS))
    parser.add_argument("--solve", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.solve:
        return solve(*arguments.solve)
    for n_rows in arguments.rows:
        names = arguments.solvers or [name for name, (_, many) in SOLVERS.items() if many or n_rows <= _MANY_ROWS]
        compare(names, n_rows, arguments.features)


if __name__ == "__main__":
    main()
