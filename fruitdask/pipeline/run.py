"""Runs the whole pipeline, from a configuration to results."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from fruitdask import report, store
from fruitdask.core.config import CloudClusterConfig, Config
from fruitdask.core.guard import leave_imported_script
from fruitdask.core.progress import RunProgress, resolve_progress
from fruitdask.core.storage import exists
from fruitdask.errors import FruitdaskError, LimitError, OutputError
from fruitdask.pipeline.changes import format_changes
from fruitdask.pipeline.check import find_issues, write_issues
from fruitdask.pipeline.config import write_config
from fruitdask.pipeline.explore import ImageExploration
from fruitdask.pipeline.featurize import check_failures, compute_features, record_vanished
from fruitdask.pipeline.inputs import dump_config
from fruitdask.pipeline.plan import LOCAL_REDUCE_BYTES, Plan, Work, estimate
from fruitdask.pipeline.record import describe_processing
from fruitdask.pipeline.reduce import Reduction, choose_components, reduce_features, write_components
from fruitdask.pipeline.report import render
from fruitdask.pipeline.results import RunResult
from fruitdask.pipeline.state import Applied, RunState, prepare

if TYPE_CHECKING:
    from fruitdask.analysis.pca import PCA


def run(
    config: Config, *, retry_failed: bool = False, client: Any = None, progress: RunProgress | bool | None = None
) -> RunResult:
    """
    Run the whole pipeline: list, featurize, reduce, write. Work that an earlier run has done is not repeated.

    If the input has changed, new and changed images are computed, and images that are gone are recorded as missing.

    Parameters
    ----------
    config : Config
        The run, from `fruitdask.load_config`.
    retry_failed : bool
        Whether to compute images again that failed in an earlier run.
    client : distributed.Client, optional
        A cluster to use instead of the configured one; it is left open.
    progress : RunProgress or bool, optional
        How to show progress; by default, only on a terminal and in a notebook. False shows none.

    Returns
    -------
    RunResult
        The results.

    Raises
    ------
    FruitdaskError
        If something is wrong; see the subclasses in `fruitdask.errors`.
    """
    return carry_out(config, retry_failed=retry_failed, client=client, progress=progress)


def carry_out(
    config: Config,
    *,
    applied: Applied | None = None,
    retry_failed: bool = False,
    client: Any = None,
    progress: RunProgress | bool | None = None,
) -> RunResult:
    """Run the whole pipeline, with its own principal components or those of another run."""
    leave_imported_script()
    progress = resolve_progress(progress)
    with progress, ExitStack() as locks:
        state = prepare(config, progress, client=client, locks=locks, retry_failed=retry_failed, applied=applied)
        check_failures(state, state.pending.n_failed)
        if config.model.weights == "random":
            progress.say("Warning: model.weights is random; features of an untrained network say little about images.")
        exploration = _plan_exploration(state)
        if state.manifest is not None and state.is_reduced and state.is_rendered and exploration is None:
            return RunResult(state.output, state.manifest.dump(), n_computed=0, seconds=state.clock.describe())
        store.delete_strays(state.output)
        _check_limits(state, client, progress)
        changes = state.changes
        if changes:
            progress.say(f"Since the last run: {format_changes(changes)}.")
        with _cost_noted(state), ExitStack() as stack:
            manifest = state.manifest
            if manifest is None or state.pending.n_images:
                client, manifest = compute_features(
                    state, progress, client=client, stack=stack, exploration=exploration
                )
            elif not state.has_features:
                manifest = record_vanished(state, manifest, progress)
            if exploration is not None:
                client = client or stack.enter_context(state.budget.open_client())
                with state.clock.measure("explore"):
                    exploration.complete(client, progress)
            if not state.is_reduced:
                manifest = _reduce_features(state, manifest, client, stack, progress)
            progress.begin("Closing the cluster")
        manifest = _record_run(state, manifest)
        store.write_manifest(state.output, manifest)
        if not state.pending.n_images:
            # The configuration may have changed although there was nothing to compute.
            write_config(state.output, config)
        progress.begin("Drawing")
        output, clock, n_computed = state.output, state.clock, state.pending.n_images
        # Frees the catalog, which drawing does not need.
        del state, exploration
        with clock.measure("draw"):
            manifest = render(config, output) or manifest
    return RunResult(output, manifest.dump(), n_computed=n_computed, changes=changes, seconds=clock.describe())


def plan(config: Config, *, progress: RunProgress | bool | None = None) -> Plan:
    """
    Plan a run: its work, time, machines and cost, estimated from a few images that are computed on this machine.

    Parameters
    ----------
    config : Config
        The run, from `fruitdask.load_config`.
    progress : RunProgress or bool, optional
        How to show progress; by default, only on a terminal and in a notebook. False shows none.

    Returns
    -------
    Plan
        The plan. Nothing is written to the output, and nothing is started that costs.

    Raises
    ------
    FruitdaskError
        If the run would fail before it starts.
    """
    leave_imported_script()
    progress = resolve_progress(progress)
    with progress:
        return estimate(_describe_work(prepare(config, progress), None), progress)


def _record_run(state: RunState, manifest: store.RunManifest) -> store.RunManifest:
    """Return the manifest with the time and cost of this run, and the record of processing as configured now."""
    n_computed = state.pending.n_images
    # A stage that an earlier run did keeps the seconds of that run, and so does the total if it computed the features.
    seconds = state.clock.seconds | ({"total": state.clock.total_seconds} if n_computed else {})
    record = describe_processing(state.config.privacy, since=manifest.finished)
    return manifest.change(
        seconds=manifest.seconds | seconds,
        config=dump_config(state.config),
        n_computed=n_computed or manifest.n_computed,
        regions=state.inputs.regions,
        processing=manifest.processing | record,
        left_out=dict(state.inputs.left_out),
        cost=state.budget.describe() or manifest.cost,
    )


def _describe_work(state: RunState, client: Any) -> Work:
    """Describe the pending work."""
    return Work(
        state.inputs,
        images_per_partition=state.images_per_partition,
        n_left=state.pending.n_images,
        list_seconds=state.clock.seconds["list"],
        spent_dollars=state.budget.spent_dollars,
        client=client,
    )


def _plan_exploration(state: RunState) -> ImageExploration | None:
    """Return the exploration to be done; None if it is not configured or already done."""
    if state.config.explore.enabled:
        exploration = ImageExploration(state.inputs, images_per_partition=state.images_per_partition)
        if state.config.output.overwrite or not exploration.is_done:
            return exploration
    # An interrupted exploration may have left thumbnails of all images.
    store.delete_exploring(state.output)
    return None


def _check_limits(state: RunState, client: Any, progress: RunProgress) -> None:
    """Refuse a run that would exceed a limit before anything is started."""
    limits = state.config.limits
    costs = limits.max_cost is not None and client is None and isinstance(state.config.cluster, CloudClusterConfig)
    if not (state.pending.n_images and (costs or limits.max_hours is not None)):
        return
    exceeded = estimate(_describe_work(state, client), progress).exceeded
    if exceeded:
        raise LimitError(f"the run was not started: {'; '.join(exceeded)}; see fruitdask plan")


@contextmanager
def _cost_noted(state: RunState) -> Iterator[None]:
    """Record the cost of a run in the manifest, even if the run fails or is interrupted."""
    try:
        yield
    except BaseException:
        with suppress(FruitdaskError):
            cost, manifest = state.budget.describe(), store.read_run(state.output)
            if cost is not None and manifest is not None:
                store.write_manifest(state.output, manifest.change(cost=cost))
        raise


def _reduce_features(
    state: RunState, manifest: store.RunManifest, client: Any, stack: ExitStack, progress: RunProgress
) -> store.RunManifest:
    """Reduce the features and write the tables; returns the manifest of the complete run."""
    progress.begin("Reducing")
    client = _choose_client(state, manifest, client, stack)
    with state.clock.measure("reduce"), _computing_on(client):
        settings, manifest = state.reduce_settings, _take_components(state, manifest)
        fit = manifest.pca.fit.dump() if manifest.pca is not None else None
        kept = choose_components(settings, state.output, fit)
        images, is_applied = state.rows.catalog, state.applied is not None
        reduction = reduce_features(
            settings, state.config.quality, state.output, images, kept=kept, fit=fit, is_applied=is_applied
        )
    if reduction.problem:
        progress.say(reduction.problem)
    progress.begin("Writing results")
    with state.clock.measure("write"), _computing_on(client):
        # If this is interrupted, the next run must not mistake a mixture of old and new tables for results.
        manifest = manifest.reopen()
        if not reduction.is_kept:
            # The same for a mixture of old and new components.
            manifest = manifest.drop_components()
            if reduction.components is None:
                store.delete_result(state.output, store.COMPONENTS)
        store.write_manifest(state.output, manifest)
        # The page and figures show the old results; the configuration decides whether to render them again.
        for name in (store.PAGE, *map(store.name_figure, store.FIGURE_NAMES)):
            store.delete_result(state.output, name)
        if state.rows.changes and manifest.groupings != state.groupings:
            # Splits and groups may change without anything to compute.
            store.write_catalog(state.output, state.rows.catalog)
        n_at_once = store.count_at_once(state.images_per_partition)
        outcomes = store.read_outcomes(state.output, range(state.n_partitions), partitions_at_once=n_at_once)
        groupings = {name: state.rows.catalog[name] for name in state.groupings}
        counts, digests = report.write_results(
            state.output, outcomes, pca=reduction.scores, tsne=reduction.tsne, groupings=groupings
        )
        if reduction.components is not None and not reduction.is_kept:
            write_components(state.output, reduction.components)
        store.delete_result(state.output, store.QUALITY)
        if reduction.quality is not None:
            store.write_json(state.output.child(store.QUALITY), reduction.quality)
    manifest = _check_images(state, manifest.change(digests=digests), client, progress)
    return manifest.complete(**_describe_results(state, reduction, counts))


def _check_images(
    state: RunState, manifest: store.RunManifest, client: Any, progress: RunProgress
) -> store.RunManifest:
    """Write the list of photographs to check, and delete what is of earlier images; returns the manifest."""
    store.delete_outdated(state.output, state.fingerprint["catalog"])
    for name in (store.ISSUES, store.ISSUES_CSV, store.PREDICTIONS, store.PREDICTIONS_CSV):
        store.delete_result(state.output, name)
    if not state.config.check.enabled:
        return manifest.change(issues=None)
    progress.begin("Checking")
    with state.clock.measure("check"), _computing_on(client):
        issues = find_issues(state.config.check, state.output, state.rows.catalog)
    digests, record = write_issues(state.output, issues)
    return manifest.change(issues=record, digests=manifest.digests | digests)


def _take_components(state: RunState, manifest: store.RunManifest) -> store.RunManifest:
    """Copy the principal components of the run that is applied, if there is one."""
    applied, location = state.applied, state.output.child(store.COMPONENTS)
    if applied is None:
        return manifest
    # A manifest that was restored after damage no longer names the applied run.
    manifest = manifest.change(applied=applied.record, pca=manifest.pca or applied.record.components)
    if manifest.pca is None:
        return manifest
    if applied.source is not None:
        store.copy_arrays(applied.source.child(store.COMPONENTS), location)
    elif not exists(location):
        raise OutputError(
            f"{location.url}: expected the principal components of {applied.record.output}, found none; use fruitdask "
            "apply again"
        )
    return manifest


def _choose_client(state: RunState, manifest: store.RunManifest, client: Any, stack: ExitStack) -> Any:
    """Choose where to reduce: many features on the cluster, few in this process, for which there is no client."""
    n_bytes = manifest.n_images * manifest.model.n_features * np.dtype(np.float32).itemsize
    if n_bytes <= LOCAL_REDUCE_BYTES:
        # Idle instances would cost money.
        stack.close()
        return None
    return client or stack.enter_context(state.budget.open_client())


def _computing_on(client: Any) -> AbstractContextManager[Any]:
    """Let Dask compute on a cluster, or without a client on threads of this process."""
    import dask

    return dask.config.set(scheduler="threads") if client is None else client.as_current()


def _describe_results(state: RunState, reduction: Reduction, counts: report.Counts) -> dict[str, Any]:
    """Return the entries of the manifest on the results."""
    n_vanished = len(state.rows.catalog) - state.n_listed
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "groupings": state.groupings,
        "config": dump_config(state.config),
        "counts": {"by_status": dict(counts.by_status), "by_class": counts.by_class(), "vanished": n_vanished},
    } | {"pca": _describe_fit(reduction, reduction.components) if reduction.components is not None else None}


def _describe_fit(reduction: Reduction, fitted: "PCA") -> dict[str, Any]:
    """Return the entries of the manifest on the principal components."""
    return {
        "is_kept": reduction.is_kept,
        "fit": reduction.fit,
        "n_components": fitted.n_components_,
        "explained_variance_ratio": [round(float(ratio), 6) for ratio in fitted.explained_variance_ratio_],
    }
