"""A run, from its configuration to its results: the stages in their order, and nothing else."""

import json
import os
import platform
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask import __version__, report, store
from fruitdask.catalog import choose_partition_size, hash_catalog, list_images, split_catalog
from fruitdask.cluster import open_client
from fruitdask.config import Config
from fruitdask.errors import ConfigError, OutputError, TooManyFailuresError
from fruitdask.models import ModelArtifact, fingerprint_model, start_building
from fruitdask.progress import RunProgress
from fruitdask.sample import draw_sample
from fruitdask.storage import Location, exists

if TYPE_CHECKING:
    import dask.array as da

    from fruitdask.featurize import PartitionSummary
    from fruitdask.reduce import PrincipalComponents

_PCA = "pca.zarr"
#: Features of up to this size are reduced on the client: 3,276 images of 1280 features, which take 0.1 GB of its memory.
_LOCAL_REDUCE_BYTES = 16 * 1024**2
#: Packages whose versions can change what a run computes.
_PACKAGES = ("dask", "distributed", "dask-ml", "keras", "numpy", "pillow", "scikit-learn", "tensorflow", "zarr")


@dataclass(frozen=True)
class RunResult:
    """
    What a finished run has left in its output folder; everything is read when it is asked for.

    Parameters
    ----------
    output : Location
        The output folder.
    manifest : dict[str, Any]
        What was run, on what, when, and the counts.
    n_computed : int
        Images that this run computed; the others were done before.
    """

    output: Location
    manifest: dict[str, Any] = field(repr=False)
    n_computed: int

    @property
    def table(self) -> pd.DataFrame:
        """All images: path, label, status, pca_1, pca_2 ... (tsne_1, tsne_2)."""
        return report.read_results(self.output)

    @property
    def features(self) -> "da.Array":
        """Features of all images, (image, feature) float32, lazy; NaN rows for images that failed."""
        return _open_features(self.output)[0]

    @property
    def pca(self) -> "PrincipalComponents":
        """The fitted principal components."""
        from fruitdask.reduce import PrincipalComponents

        return PrincipalComponents(**store.read_arrays(self.output.child(_PCA)))

    def _repr_html_(self) -> str:
        """Show counts and places in a notebook."""
        classes = pd.DataFrame(self.manifest["counts"]["by_class"]).T.rename_axis("class")
        explained = ", ".join(f"{ratio:.1%}" for ratio in self.manifest["pca"]["explained_variance_ratio"][:5])
        n_ok = self.manifest["counts"]["by_status"].get("ok", 0)
        return (
            f"<p><b>fruitdask run</b>: {self.manifest['n_images']:,} images, {n_ok:,} with features; "
            f"variance explained by the first components: {explained}; results in <code>{self.output.url}</code></p>{classes.to_html()}"
        )


@dataclass(frozen=True)
class _Task:
    """A run that has been checked: what there is to do, and what is done."""

    config: Config
    output: Location
    catalog: pd.DataFrame
    fingerprint: dict[str, str]
    images_per_partition: int
    manifest: dict[str, Any] | None
    committed: frozenset[int]

    @property
    def n_partitions(self) -> int:
        return -(-len(self.catalog) // self.images_per_partition)

    @property
    def n_images_done(self) -> int:
        last_is_done = self.n_partitions - 1 in self.committed
        missing_in_last = self.n_partitions * self.images_per_partition - len(self.catalog)
        return len(self.committed) * self.images_per_partition - (missing_in_last if last_is_done else 0)

    @property
    def has_features(self) -> bool:
        return len(self.committed) == self.n_partitions

    @property
    def is_finished(self) -> bool:
        manifest = self.manifest or {"status": "new"}
        if manifest["status"] != "complete" or not self.has_features:
            return False
        if not all(exists(self.output.child(name)) for name in (report.RESULTS, _PCA)):
            return False
        return bool(manifest["config"]["reduce"] == _dump(self.config)["reduce"])


def run(config: Config, *, client: Any = None, progress: RunProgress | None = None) -> RunResult:
    """
    Run the whole pipeline: list, featurize, reduce, write. What an earlier run has done is not done again.

    Parameters
    ----------
    config : Config
        What to do, from `fruitdask.load_config`.
    client : distributed.Client, optional
        A cluster to use instead of the one that the configuration describes; it is left open.
    progress : RunProgress, optional
        Where to show progress; nowhere by default.

    Returns
    -------
    RunResult
        The results.

    Raises
    ------
    FruitdaskError
        If something is wrong; the subclasses in `fruitdask.errors` tell what.
    """
    progress = progress or RunProgress()
    clock = _Clock()
    with progress:
        progress.begin("Listing images")
        with clock.measure("list"):
            task = _prepare(config)
        _check_failures(task, _count_failed(task))
        if config.model.weights == "random":
            progress.say("Warning: model.weights is random; features of an untrained network say little about images.")
        if task.manifest is not None and task.is_finished:
            return RunResult(task.output, task.manifest, n_computed=0)
        with ExitStack() as stack:
            manifest = task.manifest
            if manifest is None or not task.has_features:
                progress.begin("Starting the cluster and building the network")
                with clock.measure("start"):
                    client, artifact = _start(task, client, stack)
                if "dashboard" in client.scheduler_info()["services"]:
                    progress.say(f"Dask dashboard: {client.dashboard_link}")
                manifest = _begin_output(task, artifact, client)
                with clock.measure("featurize"):
                    manifest["seconds"]["worker"] = _featurize(task, artifact, client, progress)
            progress.begin("Reducing")
            with clock.measure("reduce"), _choose_scheduler(task, client, stack):
                fitted, scores, tsne = _reduce(config, task.output)
            progress.begin("Writing results and closing the cluster")
            with clock.measure("write"):
                # Should this be interrupted, the next run must not take a mixture of old and new tables for results.
                manifest = manifest | {"status": "running"}
                store.write_manifest(task.output, manifest)
                counts = report.write_results(
                    task.output, store.read_outcomes(task.output, range(task.n_partitions)), pca=scores, tsne=tsne
                )
                _write_pca(task.output, fitted)
    manifest |= _describe_results(task, fitted, counts)
    # Seconds of stages that were done before are those of the run that did them.
    manifest["seconds"] |= clock.seconds | {"total": clock.total_seconds}
    store.write_manifest(task.output, manifest)
    return RunResult(task.output, manifest, n_computed=len(task.catalog) - task.n_images_done)


class _Clock:
    """Seconds by stage of a run, as passed on the wall."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @property
    def total_seconds(self) -> float:
        """Seconds since the run began."""
        return round(time.perf_counter() - self._start, 3)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Note the seconds of a block."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)


def _prepare(config: Config) -> _Task:
    """Check all that can be checked before anything is started or written."""
    source, output = Location(config.input.url, config.input.storage_options), Location(
        config.output.url, config.output.storage_options
    )
    _check_places(source, output)
    if config.input.sample is not None and not source.is_local:
        raise ConfigError(
            f"input.sample draws into a local folder, but input.url is {source.url}; draw with: fruitdask sample FOLDER"
        )
    if config.input.sample is not None and not exists(source):
        sample = config.input.sample
        draw_sample(source.path, per_class=sample.per_class, size_px=sample.size_px, seed=sample.seed)
    catalog = list_images(config.input)
    fingerprint = {
        "catalog": hash_catalog(catalog),
        "model": fingerprint_model(config.model),
        "decoding": f"exact, max_pixels {config.featurize.max_pixels}",
    }
    manifest = store.check_output(output, fingerprint, overwrite=config.output.overwrite)
    has_store = manifest is not None and store.open_store(output) is not None
    return _Task(
        config=config,
        output=output,
        catalog=catalog,
        fingerprint=fingerprint,
        images_per_partition=(
            manifest["images_per_partition"]
            if manifest
            else config.featurize.images_per_partition or choose_partition_size(len(catalog))
        ),
        manifest=manifest,
        committed=frozenset(store.list_committed(output) if has_store else ()),
    )


def _check_places(source: Location, output: Location) -> None:
    """Refuse an output that would be listed as input the next time, or that cannot be a folder."""
    inner, outer = (os.path.realpath(place.path) if place.is_local else place.path for place in (output, source))
    if f"{inner}/".startswith(f"{outer}/") and type(output.fs) is type(source.fs):
        raise ConfigError(f"output.url {output.url} lies inside input.url {source.url}; choose a folder outside it")
    if output.is_local:
        _check_writable(output)


def _check_writable(output: Location) -> None:
    """Refuse a local folder that cannot be made or written, before anything is."""
    path = output.path
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    if not os.path.isdir(path):
        raise OutputError(f"output.url {output.url}: expected a folder, found the file {path}; choose another place")
    if not os.access(path, os.W_OK | os.X_OK):
        raise OutputError(
            f"output.url {output.url}: no permission to write in {path}; choose another place or change its permissions"
        )


def _start(task: _Task, client: Any, stack: ExitStack) -> tuple[Any, ModelArtifact]:
    """Start the cluster while a child process builds the network."""
    from fruitdask.featurize import prepare_workers
    from fruitdask.reduce import check_n_components

    check_n_components(task.config.reduce.n_components, n_images=len(task.catalog))
    with start_building(task.config.model) as wait_for_artifact:
        client = client or stack.enter_context(open_client(task.config.cluster))
        preparing = prepare_workers(client, task.config.model.engine)
        # The workers and the child are busy for seconds: time to import what reducing will need.
        import_module("dask_ml.decomposition")
        artifact = wait_for_artifact()
    del preparing
    return client, artifact


def _choose_scheduler(task: _Task, client: Any, stack: ExitStack) -> AbstractContextManager[Any]:
    """Reduce few features here, on threads, which takes no cluster and no imports on its workers; many on the cluster."""
    import dask

    if _open_features(task.output)[0].nbytes <= _LOCAL_REDUCE_BYTES:
        return dask.config.set(scheduler="threads")
    client = client or stack.enter_context(open_client(task.config.cluster))
    return client.as_current()  # type: ignore[no-any-return]


def _begin_output(task: _Task, artifact: ModelArtifact, client: Any) -> dict[str, Any]:
    """Write the manifest of a run that begins, and the empty store where there is none."""
    from fruitdask.reduce import check_n_components

    check_n_components(task.config.reduce.n_components, n_images=len(task.catalog), n_features=artifact.n_features)
    if task.manifest is None:
        store.clear_output(task.output)
    manifest = {
        "fruitdask": __version__,
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "fingerprint": task.fingerprint,
        "n_images": len(task.catalog),
        "images_per_partition": task.images_per_partition,
        "model": _describe_model(artifact),
        "cluster": {
            "kind": task.config.cluster.kind,
            "n_workers": len(client.nthreads()),
            "n_threads": sum(client.nthreads().values()),
        },
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
        "config": _dump(task.config),
        "seconds": {},
    }
    store.write_manifest(task.output, manifest)
    if not task.committed:
        store.create_store(
            task.output,
            n_images=len(task.catalog),
            n_features=artifact.n_features,
            images_per_partition=task.images_per_partition,
            attributes={
                "fruitdask": __version__,
                "fingerprint": task.fingerprint,
                "model": manifest["model"],
                "class_names": sorted(set(task.catalog["label"])),
            },
        )
    return manifest


def _featurize(task: _Task, artifact: ModelArtifact, client: Any, progress: RunProgress) -> dict[str, float]:
    """Featurize what has no commit mark; gives the seconds of all workers by stage."""
    from fruitdask.featurize import FeaturizeJob, featurize_catalog

    config = task.config
    job = FeaturizeJob(
        source=Location(config.input.url, config.input.storage_options),
        output=task.output,
        batch_size=config.featurize.batch_size,
        max_pixels=config.featurize.max_pixels,
        fetch_attempts=config.featurize.fetch_attempts,
        concurrent_reads=config.featurize.concurrent_reads,
    )
    seconds: Counter[str] = Counter()
    n_failed = _count_failed(task)
    progress.begin("Featurizing")
    progress.begin_images(len(task.catalog), n_done=task.n_images_done)

    def note(summary: "PartitionSummary") -> None:
        nonlocal n_failed
        n_failed += summary.n_failed
        seconds.update(summary.seconds)
        progress.advance(summary.n_images, n_failed=summary.n_failed)
        _check_failures(task, n_failed)

    todo = (part for part in split_catalog(task.catalog, task.images_per_partition) if part.index not in task.committed)
    featurize_catalog(client, todo, artifact, job, on_summary=note)
    return {stage: round(value, 3) for stage, value in seconds.items()}


def _count_failed(task: _Task) -> int:
    """Count the failures of an earlier run."""
    if task.manifest is not None and task.manifest["status"] == "complete" and task.has_features:
        by_status: dict[str, int] = task.manifest["counts"]["by_status"]
        return sum(by_status.values()) - by_status.get("ok", 0)
    tables = store.read_outcomes(task.output, sorted(task.committed))
    return sum(int((table["status"] != "ok").sum()) for table in tables)


def _check_failures(task: _Task, n_failed: int) -> None:
    """End a run in which too many images have failed, and say which."""
    limit = task.config.featurize.max_failed_fraction
    if n_failed <= limit * len(task.catalog):
        return
    done = sorted(store.list_committed(task.output))
    failures = [table[table["status"] != "ok"] for table in store.read_outcomes(task.output, done)]
    report.write_failures(task.output, pd.concat(failures))
    raise TooManyFailuresError(
        f"{n_failed:,} of {len(task.catalog):,} images failed, more than featurize.max_failed_fraction ({limit:g}) allows; see "
        f"{task.output.child('failures.csv').url} for the reasons; "
        "raise the limit and run again to go on, or mend the images and run with --overwrite"
    )


def _reduce(
    config: Config, output: Location
) -> tuple["PrincipalComponents", npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
    """Fit and apply the reductions to the images that have features; the others get NaN."""
    from fruitdask.reduce import TSNE_COMPONENTS, check_n_components, embed_tsne, fit_pca, sample_rows

    features, is_ok = _open_features(output)
    rows = np.flatnonzero(is_ok)
    wanted = config.reduce.n_components
    check_n_components(wanted, n_images=len(rows), n_features=features.shape[1])
    ok = features if is_ok.all() else features[rows]
    largest = min(len(rows), features.shape[1])
    n_for_tsne = min(TSNE_COMPONENTS, largest) if config.reduce.tsne.enabled else 0
    most = max(wanted, n_for_tsne) if isinstance(wanted, int) else largest
    found = fit_pca(ok, n_components=most, solver=config.reduce.solver, seed=config.reduce.seed)
    fitted = found.truncate(wanted)
    scores = _spread(fitted.transform(ok).astype(np.float32).compute(), rows, len(is_ok))
    if not config.reduce.tsne.enabled:
        return fitted, scores, None
    sampled = sample_rows(len(rows), config.reduce.tsne)
    tsne_scores = found.truncate(n_for_tsne).transform(ok[sampled]).compute()
    embedding = embed_tsne(tsne_scores, perplexity=config.reduce.tsne.perplexity, seed=config.reduce.tsne.seed)
    return fitted, scores, _spread(embedding, rows[sampled], len(is_ok))


def _open_features(output: Location) -> tuple["da.Array", npt.NDArray[np.bool_]]:
    """Open the features as a Dask array, and read which rows are well."""
    import dask.array as da

    group = store.open_store(output)
    if group is None:
        raise OutputError(f"{output.url}: expected the features of a run, found none; run it first")
    arrays: Any = group
    array, status = arrays["features"], np.asarray(arrays["status"][:])
    return da.from_array(array, chunks=array.chunks, name=False), status == store.STATUSES.index("ok")


def _spread(values: npt.NDArray[np.float32], rows: npt.NDArray[np.int64], n_rows: int) -> npt.NDArray[np.float32]:
    """Lay rows at their places in a table that is NaN elsewhere."""
    spread = np.full((n_rows, values.shape[1]), np.nan, np.float32)
    spread[rows] = values
    return spread


def _write_pca(output: Location, fitted: "PrincipalComponents") -> None:
    """Store the fitted components."""
    arrays = {
        "mean": (fitted.mean, ["feature"]),
        "components": (fitted.components, ["component", "feature"]),
        "explained_variance": (fitted.explained_variance, ["component"]),
        "explained_variance_ratio": (fitted.explained_variance_ratio, ["component"]),
        "singular_values": (fitted.singular_values, ["component"]),
    }
    store.write_arrays(output.child(_PCA), arrays, {"fruitdask": __version__})


def _describe_results(task: _Task, fitted: "PrincipalComponents", counts: report.Counts) -> dict[str, Any]:
    """Say in the manifest what came out."""
    return {
        "status": "complete",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": _dump(task.config),
        "counts": {"by_status": dict(counts.by_status), "by_class": counts.by_class()},
        "pca": {
            "n_components": fitted.n_components,
            "explained_variance_ratio": [round(float(ratio), 6) for ratio in fitted.explained_variance_ratio],
        },
    }


def _describe_model(artifact: ModelArtifact) -> dict[str, Any]:
    """Say in the manifest which network it was."""
    return {
        "name": artifact.name,
        "engine": artifact.engine,
        "preprocessing": artifact.preprocessing,
        "input_px": artifact.input_px,
        "n_features": artifact.n_features,
        "sha256": artifact.sha256,
    }


def _dump(config: Config) -> dict[str, Any]:
    """Write a configuration out without storage options, which may hold secrets."""
    exclude = {"input": {"storage_options"}, "output": {"storage_options"}}
    dumped: dict[str, Any] = json.loads(config.model_dump_json(exclude=exclude))
    return dumped
