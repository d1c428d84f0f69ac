"""The first stage of a run: images to features, on a cluster that is started for it, if there is anything to compute."""

import platform
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from importlib.metadata import version
from itertools import islice
from typing import TYPE_CHECKING, Any

import pandas as pd

from fruitdask import report, store
from fruitdask.cluster.scheduling import map_partitions
from fruitdask.core.partition import Partition
from fruitdask.core.progress import RunProgress
from fruitdask.core.version import __version__
from fruitdask.errors import PartitionError, TooManyFailuresError
from fruitdask.pipeline.changes import describe_fit
from fruitdask.pipeline.explore import Survey
from fruitdask.pipeline.inputs import dump_config
from fruitdask.pipeline.preparation import Task
from fruitdask.pipeline.record import describe_processing, describe_protection
from fruitdask.store.catalog import split_catalog
from fruitdask.worker.models import ModelArtifact, resolve_engine, start_building

if TYPE_CHECKING:
    from fruitdask.worker.featurize import PartitionSummary

#: Packages whose versions can change what a run computes.
_PACKAGES = ("dask", "distributed", "keras", "numpy", "pillow", "scikit-learn", "zarr")
#: Partitions that the client writes at once; it waits for the storage most of the time.
_N_MARKED_AT_ONCE = 16


def compute_features(
    task: Task, progress: RunProgress, *, client: Any, stack: ExitStack, survey: Survey | None
) -> tuple[Any, dict[str, Any]]:
    """Start what is needed and featurize."""
    progress.begin("Starting the cluster and building the network")
    with task.clock.measure("start"):
        client, artifact = _start(task, client, stack)
    # Dask serves its health and metrics there where no dashboard is wanted.
    is_wanted = getattr(task.config.cluster, "dashboard_address", "") is not None
    if is_wanted and "dashboard" in client.scheduler_info()["services"]:
        progress.say(f"Dask dashboard: {client.dashboard_link}")
    manifest = _begin_output(task, _describe_computation(task, artifact, client), client)
    with task.clock.measure("featurize"):
        manifest["seconds"]["worker"] = _featurize(task, artifact, client, survey, progress)
    return client, manifest


def record_vanished(task: Task, manifest: dict[str, Any], progress: RunProgress) -> dict[str, Any]:
    """Record images that have vanished, where nothing is to be computed: without a cluster, and without a network."""
    from fruitdask.worker.featurize import mark_vanished

    progress.begin("Recording images that are gone")
    manifest = _begin_output(task, manifest)
    mark = partial(mark_vanished, output=task.output, n_features=manifest["model"]["n_features"])
    todo = _list_todo(task)
    with ThreadPoolExecutor(_N_MARKED_AT_ONCE) as pool:
        while parts := list(islice(todo, _N_MARKED_AT_ONCE)):
            list(pool.map(mark, parts))
            if task.lock is not None:
                task.lock.check()
    return manifest


def check_failures(task: Task, n_failed: int) -> None:
    """End a run in which too many images of the input have failed, and write down which."""
    limit = task.config.featurize.max_failed_fraction
    if n_failed <= limit * task.n_listed:
        return
    tables = store.read_outcomes(task.output, sorted(task.backlog.done))
    failures = [table[table["status"] != "ok"] for table in tables]
    report.write_failures(task.output, pd.concat(failures))
    raise TooManyFailuresError(
        f"{n_failed:,} of {task.n_listed:,} images failed, more than featurize.max_failed_fraction ({limit:g}) allows; see "
        f"{task.output.child('failures.csv').url} for the reasons; "
        "mend the images or raise the limit, and run again to go on"
    )


def _start(task: Task, client: Any, stack: ExitStack) -> tuple[Any, ModelArtifact]:
    """Start the cluster while a child process builds the network."""
    from fruitdask.worker.featurize import prepare_workers

    _check_reduction(task)
    model = resolve_engine(task.config)
    with start_building(model) as wait_for_artifact:
        client = client or stack.enter_context(task.budget.open_client())
        preparing = prepare_workers(client, model.engine)
        # The workers and the child are busy for seconds: time to import what reducing will need.
        import_module("dask.array")
        artifact = wait_for_artifact()
    for future in preparing:
        # A worker without the engine would fail with each task; better now, before anything is written.
        if future.status == "error":
            future.result()
    return client, artifact


def _check_reduction(task: Task, n_features: int | None = None) -> None:
    """Refuse before anything is computed what the reduction would refuse; too few images for any components are no error."""
    from fruitdask.analysis.reduction import MIN_IMAGES, check_n_components, check_solver

    settings, n_images = task.config.reduce, task.n_listed
    if not settings.enabled or n_images < MIN_IMAGES:
        return
    check_n_components(settings.n_components, n_images=n_images, n_features=n_features)
    if n_features is not None:
        check_solver(settings.solver, n_images=n_images, n_features=n_features)


def _begin_output(task: Task, computation: dict[str, Any], client: Any = None) -> dict[str, Any]:
    """Write the manifest of a run that begins, and make room; how features are computed, the caller says."""
    n_features = computation["model"]["n_features"]
    _check_reduction(task, n_features)
    if task.config.output.overwrite:
        store.clear_output(task.output)
    before, changes = task.manifest or {}, task.changes
    n_changed = sum(changes.values()) - changes.get("kept", 0)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = (
        computation
        | {
            "fruitdask": __version__,
            "status": "running",
            "started": started,
            "fingerprint": task.fingerprint,
            "n_images": len(task.rows.catalog),
            "images_per_partition": task.images_per_partition,
            "history": before.get("history", []) + ([{"at": started} | changes] if changes else []),
            "erasures": before.get("erasures", []),
            "config": dump_config(task.config),
            "regions": task.inputs.regions,
            "left_out": dict(task.inputs.left_out),
            "processing": computation.get("processing", {}) | describe_processing(task.config),
        }
        | task.budget.describe()
    )
    manifest |= describe_fit(task.manifest, n_changed)
    store.write_manifest(task.output, manifest)
    manifest["processing"] |= describe_protection(task.config, task.output.child(store.MANIFEST), client)
    attributes = {
        "fruitdask": __version__,
        "fingerprint": task.fingerprint,
        "model": manifest["model"],
        "class_names": sorted(set(task.rows.catalog["label"])),
    }
    _make_room(task, n_features, attributes)
    return manifest


def _make_room(task: Task, n_features: int, attributes: dict[str, Any]) -> None:
    """Make the store ready for all images: an empty one where nothing is committed, else the one that is there, where it has to grow."""
    catalog, output, changes = task.rows.catalog, task.output, task.rows.changes
    if not task.committed:
        store.create_store(
            output,
            n_images=len(catalog),
            n_features=n_features,
            images_per_partition=task.images_per_partition,
            attributes=attributes,
        )
        store.write_catalog(output, catalog)
    elif changes:
        store.write_catalog(output, catalog)
        # Also where the catalog says so already: a run that was interrupted may have come so far and no further.
        store.resize_store(output, n_images=len(catalog), attributes=attributes)


def _featurize(
    task: Task, artifact: ModelArtifact, client: Any, survey: Survey | None, progress: RunProgress
) -> dict[str, float]:
    """Featurize what has no commit mark, and look at the images meanwhile; gives the seconds of all workers by stage."""
    from fruitdask.worker.featurize import FeaturizeJob, featurize_partition, probe_partition

    explore_job = survey.begin() if survey is not None else None
    is_in_order = task.rows.catalog["path"].equals(task.inputs.catalog["path"])
    if explore_job is not None and (explore_job.input_px != artifact.input_px or not is_in_order):
        explore_job = None
    job = FeaturizeJob(task.inputs.source, task.output, explore_job)
    seconds: Counter[str] = Counter()
    backlog, n_failed = task.backlog, task.backlog.n_failed
    progress.begin("Featurizing")
    progress.begin_images(task.n_listed, n_done=task.n_listed - backlog.n_images)

    def note(summary: "PartitionSummary") -> None:
        nonlocal n_failed
        n_failed += summary.n_failed
        backlog.done.add(summary.index)
        seconds.update(summary.seconds)
        if survey is not None and summary.findings is not None:
            survey.add(summary.findings)
        progress.advance(summary.n_images, n_failed=summary.n_failed)
        check_failures(task, n_failed)
        task.budget.check()
        if task.lock is not None:
            task.lock.check()

    todo = _list_todo(task)
    try:
        map_partitions(
            client, featurize_partition, todo, job, delivered=artifact, on_result=note, probe=probe_partition
        )
    except PartitionError:
        # A cluster that is lost may have ended because a limit was reached.
        task.budget.check()
        raise
    return {stage: round(value, 3) for stage, value in seconds.items()}


def _list_todo(task: Task) -> Iterator[Partition]:
    """List the partitions that are to be written, with what is to be computed of each."""
    todo = task.backlog.todo
    parts = split_catalog(task.rows.catalog, task.images_per_partition)
    return (replace(part, rows=todo[part.index]) for part in parts if part.index in todo)


def _describe_computation(task: Task, artifact: ModelArtifact, client: Any) -> dict[str, Any]:
    """Say in the manifest what computes the features: which network, on which cluster."""
    return {
        "model": {
            "name": artifact.name,
            "layer": artifact.layer,
            "engine": artifact.engine,
            "preprocessing": artifact.preprocessing,
            "input_px": artifact.input_px,
            "n_features": artifact.n_features,
            "sha256": artifact.sha256,
        },
        "cluster": {
            "kind": task.config.cluster.kind,
            "n_workers": len(client.nthreads()),
            "n_threads": sum(client.nthreads().values()),
        },
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in (*_PACKAGES, artifact.engine)},
        "seconds": {},
    }
