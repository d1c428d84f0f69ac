"""The first stage of a run: images to features. A cluster is started only if there is something to compute."""

import platform
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from itertools import islice
from threading import Thread
from typing import TYPE_CHECKING, Any

from fruitdask import report, store
from fruitdask.cluster.scheduling import map_partitions
from fruitdask.core.partition import Partition
from fruitdask.core.progress import RunProgress
from fruitdask.core.version import __version__, find_version
from fruitdask.errors import PartitionError, TooManyFailuresError
from fruitdask.pipeline.changes import carry_components
from fruitdask.pipeline.config import write_config
from fruitdask.pipeline.explore import ImageExploration
from fruitdask.pipeline.inputs import dump_config
from fruitdask.pipeline.record import describe_processing, describe_protection
from fruitdask.pipeline.state import RunState
from fruitdask.store.catalog import split_catalog
from fruitdask.worker.models import ModelArtifact, resolve_engine, start_building

if TYPE_CHECKING:
    from fruitdask.worker.featurize import PartitionSummary

#: Packages whose versions can change what a run computes.
_PACKAGES = ("dask", "distributed", "keras", "numpy", "pillow", "scikit-learn", "zarr")
#: Partitions that the client writes concurrently; it mostly waits for the storage.
_N_MARKED_AT_ONCE = 16


def compute_features(
    state: RunState, progress: RunProgress, *, client: Any, stack: ExitStack, exploration: ImageExploration | None
) -> tuple[Any, store.RunManifest]:
    """Start the cluster, build the network and featurize; returns the client and the manifest of a run that has all
    features.
    """
    progress.begin("Starting the cluster and building the network")
    with state.clock.measure("start"):
        client, artifact = _start(state, client, stack)
    # Without a dashboard, Dask still serves health and metrics at that address.
    is_wanted = getattr(state.config.cluster, "dashboard_address", "") is not None
    if is_wanted and "dashboard" in client.scheduler_info()["services"]:
        progress.say(f"Dask dashboard: {client.dashboard_link}")
    manifest = _begin_output(state, _describe_computation(state, artifact, client), client)
    with state.clock.measure("featurize"):
        seconds = _featurize(state, artifact, client, exploration, progress)
    return client, manifest.change(seconds={"worker": seconds})


def record_vanished(state: RunState, manifest: store.RunManifest, progress: RunProgress) -> store.RunManifest:
    """Record missing images if nothing else is pending; needs neither a cluster nor a network."""
    from fruitdask.worker.featurize import mark_vanished

    progress.begin("Recording missing images")
    manifest = _begin_output(state, manifest.dump())
    mark = partial(mark_vanished, output=state.output, n_features=manifest.model.n_features)
    todo = _list_todo(state)
    with ThreadPoolExecutor(_N_MARKED_AT_ONCE) as pool:
        while parts := list(islice(todo, _N_MARKED_AT_ONCE)):
            list(pool.map(mark, parts))
            if state.lock is not None:
                state.lock.check()
    return manifest


def check_failures(state: RunState, n_failed: int) -> None:
    """Stop a run in which too many images have failed, and write the table of failures."""
    limit = state.config.featurize.max_failed_fraction
    if n_failed <= limit * state.n_listed:
        return
    tables = store.read_outcomes(state.output, sorted(state.pending.done))
    report.write_failures(state.output, (table[table["status"] != "ok"] for table in tables))
    raise TooManyFailuresError(
        f"{n_failed:,} of {state.n_listed:,} images failed, more than featurize.max_failed_fraction ({limit:g}) "
        f"allows; see {state.output.child(store.FAILURES).url} for the reasons; "
        "repair the images or raise the limit, and run again to resume"
    )


def _start(state: RunState, client: Any, stack: ExitStack) -> tuple[Any, ModelArtifact]:
    """Start the cluster while a child process builds the network."""
    from fruitdask.worker.featurize import prepare_workers

    _check_reduction(state)
    model = resolve_engine(state.config.model, state.config.cluster)
    with start_building(model) as wait_for_artifact:
        client = client or stack.enter_context(state.budget.open_client())
        preparing = prepare_workers(client, model.engine)
        # The workers and the child take seconds, in which the client imports what reducing needs.
        import_module("dask.array")
        artifact = wait_for_artifact()
    for future in preparing:
        # A worker without the engine would fail every task: fail now, before anything is written.
        if future.status == "error":
            future.result()
    if state.applied is None and state.config.reduce.enabled:
        # This takes a second, in which this process would only wait for the workers.
        Thread(target=import_module, args=("fruitdask.analysis.pca",), name="import of the reduction").start()
    return client, artifact


def _check_reduction(state: RunState, n_features: int | None = None) -> None:
    """Refuse impossible settings of the reduction before anything is computed; too few images are not an error."""
    from fruitdask.analysis.reduction import MIN_IMAGES, check_n_components, check_solver

    settings, n_images = state.config.reduce, state.n_listed
    if state.applied is not None or not settings.enabled or n_images < MIN_IMAGES:
        return
    check_n_components(settings.n_components, n_images=n_images, n_features=n_features)
    if n_features is not None:
        check_solver(settings.solver, n_images=n_images, n_features=n_features)


def _begin_output(state: RunState, computation: dict[str, Any], client: Any = None) -> store.RunManifest:
    """Write the manifest of a run that begins and prepare the store; `computation` says how features are computed."""
    n_features = computation["model"]["n_features"]
    _check_reduction(state, n_features)
    if state.config.output.overwrite:
        store.clear_output(state.output)
    before, changes = state.manifest, state.changes
    applied = state.applied.record if state.applied is not None else None
    n_changed = sum(changes.values()) - changes.get("kept", 0)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    begun = {
        "fruitdask": __version__,
        "status": "running",
        "started": started,
        "fingerprint": state.fingerprint,
        "n_images": len(state.rows.catalog),
        "images_per_partition": state.images_per_partition,
        "history": [*(before.history if before else ()), *([{"at": started} | changes] if changes else [])],
        "erasures": before.erasures if before else (),
        "config": dump_config(state.config),
        "regions": state.inputs.regions,
        "left_out": dict(state.inputs.left_out),
        "processing": computation.get("processing", {}) | describe_processing(state.config.privacy),
        "pca": carry_components(before, n_changed),
        "applied": applied,
        "cost": state.budget.describe(),
    }
    manifest = store.RunManifest.model_validate(computation | begun)
    store.write_manifest(state.output, manifest)
    write_config(state.output, state.config)
    protection = describe_protection(state.config.privacy, state.output.child(store.MANIFEST), client)
    attributes = {
        "fruitdask": __version__,
        "fingerprint": state.fingerprint,
        "model": manifest.model.dump(),
        "class_names": sorted(state.rows.catalog["label"].unique()),
    }
    _make_room(state, n_features, attributes)
    return manifest.change(processing=manifest.processing | protection)


def _make_room(state: RunState, n_features: int, attributes: dict[str, Any]) -> None:
    """Create the store if nothing is committed; otherwise extend it for new images."""
    catalog, output, changes = state.rows.catalog, state.output, state.rows.changes
    if not state.committed:
        store.create_store(
            output,
            n_images=len(catalog),
            n_features=n_features,
            images_per_partition=state.images_per_partition,
            attributes=attributes,
        )
        store.write_catalog(output, catalog)
    elif changes:
        store.write_catalog(output, catalog)
        # Even if the catalog is up to date: an interrupted run may have written the catalog only.
        store.resize_store(output, n_images=len(catalog), attributes=attributes)


def _featurize(
    state: RunState, artifact: ModelArtifact, client: Any, exploration: ImageExploration | None, progress: RunProgress
) -> dict[str, float]:
    """Featurize the pending partitions, exploring their images too; returns the seconds of all workers per stage."""
    from fruitdask.worker.featurize import FeaturizeJob, featurize_partition, probe_partition

    explore_job = exploration.begin() if exploration is not None else None
    is_in_order = state.rows.catalog["path"].equals(state.inputs.catalog["path"])
    if explore_job is not None and (explore_job.input_px != artifact.input_px or not is_in_order):
        explore_job = None
    job = FeaturizeJob(state.inputs.source, state.output, explore_job)
    seconds: Counter[str] = Counter()
    pending, n_failed = state.pending, state.pending.n_failed
    progress.begin("Featurizing")
    progress.begin_images(
        state.n_listed,
        n_done=state.n_listed - pending.n_images,
        # Not the state, whose catalog it would keep.
        ask_cluster=partial(state.budget.describe_cluster, client),
    )

    def note(summary: "PartitionSummary") -> None:
        nonlocal n_failed
        n_failed += summary.n_failed
        pending.done.add(summary.index)
        seconds.update(summary.seconds)
        if exploration is not None and summary.is_explored:
            exploration.add(summary.index)
        progress.advance(summary.n_images, failures=summary.failures)
        check_failures(state, n_failed)
        state.budget.check()
        if state.lock is not None:
            state.lock.check()

    todo = _list_todo(state)
    try:
        map_partitions(
            client, featurize_partition, todo, job, delivered=artifact, on_result=note, probe=probe_partition
        )
    except PartitionError:
        # The cluster may have terminated because a limit was reached.
        state.budget.check()
        raise
    return {stage: round(value, 3) for stage, value in seconds.items()}


def _list_todo(state: RunState) -> Iterator[Partition]:
    """Yield the pending partitions, with the positions to compute in each."""
    todo = state.pending.todo
    parts = split_catalog(state.rows.catalog, state.images_per_partition, among=todo)
    return (replace(part, rows=todo[part.index]) for part in parts)


def _describe_computation(state: RunState, artifact: ModelArtifact, client: Any) -> dict[str, Any]:
    """Return the entries of the manifest on the network, the cluster and the versions."""
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
            "kind": state.config.cluster.kind,
            "n_workers": len(client.nthreads()),
            "n_threads": sum(client.nthreads().values()),
        },
        "versions": {"python": platform.python_version()}
        | {name: find_version(name) for name in (*_PACKAGES, artifact.engine)},
        "seconds": {},
    }
