"""A run, from its configuration to its results."""

import platform
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pandas as pd

from fruitdask import __version__, report, store
from fruitdask.catalog import choose_partition_size, split_catalog
from fruitdask.config import Config, LocalClusterConfig
from fruitdask.errors import FruitdaskError, LimitError, PartitionError, TooManyFailuresError
from fruitdask.mapping import map_partitions
from fruitdask.models import ModelArtifact, fingerprint_model, settle_engine, start_building
from fruitdask.pipeline.exploring import Survey
from fruitdask.pipeline.growing import Backlog, Rows, describe_fit, find_backlog, format_changes, order_images
from fruitdask.pipeline.inputs import Inputs, dump_config, prepare_inputs, settle_erasure
from fruitdask.pipeline.planning import LOCAL_REDUCE_BYTES, Plan, Work, estimate
from fruitdask.pipeline.presenting import describe_presentation, present
from fruitdask.pipeline.processing import describe_processing, describe_protection
from fruitdask.pipeline.reducing import Reduction, choose_components, reduce_features, write_components
from fruitdask.pipeline.results import PCA, RunResult, open_features
from fruitdask.pipeline.spending import Budget
from fruitdask.progress import RunProgress
from fruitdask.storage import Location, exists

if TYPE_CHECKING:
    from fruitdask.featurize import PartitionSummary

#: Sections of the configuration on which the tables depend.
_REDUCING = ("reduce", "quality")
#: Packages whose versions can change what a run computes.
_PACKAGES = ("dask", "distributed", "keras", "numpy", "pillow", "scikit-learn", "zarr")


@dataclass(frozen=True)
class _Task:
    """A run that has been checked: what there is to do, and what is done."""

    inputs: Inputs
    fingerprint: dict[str, str]
    images_per_partition: int
    manifest: dict[str, Any] | None
    committed: frozenset[int]
    budget: Budget
    lock: store.OutputLock | None
    retry_failed: bool

    @property
    def config(self) -> Config:
        return self.inputs.config

    @property
    def output(self) -> Location:
        return self.inputs.output

    @property
    def n_listed(self) -> int:
        """Images in the input."""
        return len(self.inputs.catalog)

    @cached_property
    def rows(self) -> Rows:
        """The images in the order of the store's rows."""
        return order_images(self.inputs, has_commits=bool(self.committed))

    @cached_property
    def backlog(self) -> Backlog:
        """What is to be computed; of a complete run it is known without a look at outcomes."""
        if self._is_settled and self.manifest is not None:
            counts = self.manifest["counts"]
            n_failed = sum(counts["by_status"].values()) - counts["by_status"].get("ok", 0) - counts.get("vanished", 0)
            is_out_of_reach = "unreachable" in counts["by_status"]
            if not (is_out_of_reach or (n_failed and self.retry_failed)):
                return Backlog({}, n_images=0, n_failed=n_failed, n_retried=0, done=set(self.committed))
        return find_backlog(
            self.output,
            self.rows,
            self.committed,
            images_per_partition=self.images_per_partition,
            retry_failed=self.retry_failed,
        )

    @property
    def n_partitions(self) -> int:
        return -(-len(self.rows.catalog) // self.images_per_partition)

    @property
    def has_other_images(self) -> bool:
        """Whether the input is not what it was in the run before."""
        if self.manifest is None:
            return False
        theirs = self.manifest["fingerprint"]["catalog"]
        return bool(theirs != self.fingerprint.get("catalog", theirs))

    @property
    def _is_settled(self) -> bool:
        """Whether the run before is complete, and was of the images of this one."""
        if self.manifest is None or self.manifest["status"] != "complete" or self.has_other_images:
            return False
        n_images: int = self.manifest["n_images"]
        return len(self.committed) == -(-n_images // self.images_per_partition)

    @property
    def has_features(self) -> bool:
        return self.manifest is not None and not self.backlog.todo and not self.has_other_images

    @property
    def is_reduced(self) -> bool:
        manifest = self.manifest or {"status": "new"}
        if manifest["status"] != "complete" or not self.has_features:
            return False
        names = [report.RESULTS, PCA] + [store.QUALITY] * self.config.quality.enabled
        if not all(exists(self.output.child(name)) for name in names):
            return False
        return _select(manifest["config"], _REDUCING) == _select(dump_config(self.config), _REDUCING)

    @property
    def is_presented(self) -> bool:
        names = [report.PAGE] * self.config.report.enabled + [store.FIGURES] * self.config.plots.enabled
        mark = (self.manifest or {}).get("presented")
        is_same = mark == describe_presentation(self.config, self.output)
        return is_same and all(exists(self.output.child(name)) for name in names)


def run(
    config: Config, *, retry_failed: bool = False, client: Any = None, progress: RunProgress | None = None
) -> RunResult:
    """
    Run the whole pipeline: list, featurize, reduce, write. What an earlier run has done is not done again.

    Where the input has changed since, images that are new or changed are computed, and those that are gone are recorded as missing.

    Parameters
    ----------
    config : Config
        What to do, from `fruitdask.load_config`.
    retry_failed : bool
        Whether images that have failed in an earlier run are computed again.
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
    with progress, ExitStack() as locks:
        progress.begin("Listing images")
        task = _prepare(config, client, clock, progress, locks, retry_failed=retry_failed)
        _check_failures(task, task.backlog.n_failed)
        if config.model.weights == "random":
            progress.say("Warning: model.weights is random; features of an untrained network say little about images.")
        survey = _plan_survey(task)
        if task.manifest is not None and task.is_reduced and task.is_presented and survey is None:
            return RunResult(task.output, task.manifest, n_computed=0)
        store.delete_strays(task.output)
        _check_limits(task, client, clock, progress)
        changes = _count_changes(task)
        if changes:
            progress.say(f"Since the last run: {format_changes(changes)}.")
        with _cost_noted(task), ExitStack() as stack:
            manifest = task.manifest
            if manifest is None or not task.has_features:
                client, manifest = _compute_features(task, client, stack, survey, clock, progress)
            if survey is not None:
                client = client or stack.enter_context(task.budget.open_client())
                with clock.measure("explore"):
                    survey.complete(client, progress)
            if not task.is_reduced:
                manifest = _reduce_features(task, manifest, client, stack, clock, progress)
            progress.begin("Closing the cluster")
        n_computed = task.backlog.n_images
        # Seconds of stages that were done before are those of the run that did them; so is the total, if that computed the features.
        manifest["seconds"] |= clock.seconds | ({"total": clock.total_seconds} if n_computed else {})
        manifest |= {"config": dump_config(config)} | ({} if task.has_features else {"n_computed": n_computed})
        record = describe_processing(config, since=manifest["finished"])
        manifest |= {"regions": task.inputs.regions, "processing": manifest.get("processing", {}) | record}
        manifest |= task.budget.describe()
        store.write_manifest(task.output, manifest)
        progress.begin("Drawing")
        manifest = present(config, task.output) or manifest
    return RunResult(task.output, manifest, n_computed=n_computed, changes=changes)


def plan(config: Config, *, progress: RunProgress | None = None) -> Plan:
    """
    Plan a run: what there is to do, how long it takes, on which machines, at what cost. A few images are tried on this machine.

    Parameters
    ----------
    config : Config
        The run, from `fruitdask.load_config`.
    progress : RunProgress, optional
        Where to show progress; nowhere by default.

    Returns
    -------
    Plan
        The plan. Nothing was written to the output, and nothing was started that costs.

    Raises
    ------
    FruitdaskError
        If the run would end with an error before it starts.
    """
    progress = progress or RunProgress()
    clock = _Clock()
    with progress:
        progress.begin("Listing images")
        task = _prepare(config, None, clock, progress, locks=None)
        return estimate(_describe_work(task, None, clock), progress)


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


def _prepare(
    config: Config,
    client: Any,
    clock: _Clock,
    progress: RunProgress,
    locks: ExitStack | None,
    *,
    retry_failed: bool = False,
) -> _Task:
    """Check all that can be checked before anything is started; without a place for its lock, nothing is written either."""
    with clock.measure("list"):
        inputs = prepare_inputs(config, client=client)
    output, catalog = inputs.output, inputs.catalog
    fingerprint = inputs.fingerprint | {"model": fingerprint_model(config.model)}
    lock = None
    if locks is not None:
        lock = locks.enter_context(store.locked(output))
        settle_erasure(inputs, progress)
    elif (store.read_manifest(output) or {}).get("status") == store.ERASED:
        # Which images are left, the run will find out.
        del fingerprint["catalog"]
    manifest = store.check_output(output, fingerprint, overwrite=config.output.overwrite, may_grow=True)
    has_store = manifest is not None and store.open_store(output) is not None
    return _Task(
        inputs=inputs,
        fingerprint=fingerprint,
        images_per_partition=(
            manifest["images_per_partition"]
            if manifest
            else config.featurize.images_per_partition or choose_partition_size(len(catalog))
        ),
        manifest=manifest,
        committed=frozenset(store.list_committed(output) if has_store else ()),
        budget=Budget(
            config.limits,
            # A cluster of somebody else's costs this run nothing.
            config.cluster if client is None else LocalClusterConfig(),
            region=inputs.regions["cluster"],
            manifest=manifest,
            elapsed_seconds=clock.total_seconds,
        ),
        lock=lock,
        retry_failed=retry_failed,
    )


def _describe_work(task: _Task, client: Any, clock: _Clock) -> Work:
    """Describe what there is to do."""
    return Work(
        task.inputs,
        images_per_partition=task.images_per_partition,
        n_left=task.backlog.n_images,
        list_seconds=clock.seconds["list"],
        spent_dollars=task.budget.spent_dollars,
        client=client,
    )


def _check_limits(task: _Task, client: Any, clock: _Clock, progress: RunProgress) -> None:
    """Refuse a run that would exceed a limit, before anything is started."""
    limits = task.config.limits
    costs = limits.max_cost is not None and client is None and task.config.cluster.kind == "ec2"
    if task.has_features or not (costs or limits.max_hours is not None):
        return
    exceeded = estimate(_describe_work(task, client, clock), progress).exceeded
    if exceeded:
        raise LimitError(f"the run was not started: {'; '.join(exceeded)}; fruitdask plan says why")


@contextmanager
def _cost_noted(task: _Task) -> Iterator[None]:
    """Note in the manifest what a run has cost that is interrupted, or fails."""
    try:
        yield
    except BaseException:
        with suppress(FruitdaskError):
            cost, manifest = task.budget.describe(), store.read_manifest(task.output)
            if cost and manifest is not None:
                store.write_manifest(task.output, manifest | cost)
        raise


def _start(task: _Task, client: Any, stack: ExitStack) -> tuple[Any, ModelArtifact]:
    """Start the cluster while a child process builds the network."""
    from fruitdask.featurize import prepare_workers
    from fruitdask.reduce import check_n_components

    check_n_components(task.config.reduce.n_components, n_images=task.n_listed)
    model = settle_engine(task.config)
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


def _compute_features(
    task: _Task, client: Any, stack: ExitStack, survey: Survey | None, clock: _Clock, progress: RunProgress
) -> tuple[Any, dict[str, Any]]:
    """Start what is needed and featurize; gives the client and the manifest."""
    progress.begin("Starting the cluster and building the network")
    with clock.measure("start"):
        client, artifact = _start(task, client, stack)
    # Dask serves its health and metrics there where no dashboard is wanted.
    is_wanted = getattr(task.config.cluster, "dashboard_address", "") is not None
    if is_wanted and "dashboard" in client.scheduler_info()["services"]:
        progress.say(f"Dask dashboard: {client.dashboard_link}")
    manifest = _begin_output(task, artifact, client)
    with clock.measure("featurize"):
        manifest["seconds"]["worker"] = _featurize(task, artifact, client, survey, progress)
    return client, manifest


def _reduce_features(
    task: _Task, manifest: dict[str, Any], client: Any, stack: ExitStack, clock: _Clock, progress: RunProgress
) -> dict[str, Any]:
    """Reduce the features and write the tables; gives the manifest of the complete run."""
    progress.begin("Reducing")
    with clock.measure("reduce"), _choose_scheduler(task, client, stack):
        fit = manifest.get("pca", {}).get("fit")
        kept = choose_components(task.config, task.output, fit)
        labels = task.rows.catalog["label"].to_numpy()
        reduction = reduce_features(task.config, task.output, labels, kept=kept, fit=fit)
    progress.begin("Writing results")
    with clock.measure("write"):
        # Should this be interrupted, the next run must not take a mixture of old and new tables for results.
        manifest = manifest | {"status": "running"}
        if not reduction.is_kept:
            # Nor old and new components for those of a fit.
            manifest.pop("pca", None)
        store.write_manifest(task.output, manifest)
        # They show other numbers; whether they are drawn again is for the configuration to say.
        for name in (report.PAGE, *(f"{store.FIGURES}/{figure}.png" for figure in store.FIGURE_NAMES)):
            store.delete_result(task.output, name)
        outcomes = store.read_outcomes(task.output, range(task.n_partitions))
        counts = report.write_results(task.output, outcomes, pca=reduction.scores, tsne=reduction.tsne)
        if not reduction.is_kept:
            write_components(task.output, reduction.components)
        store.delete_result(task.output, store.QUALITY)
        if reduction.quality is not None:
            store.write_json(task.output.child(store.QUALITY), reduction.quality)
    return manifest | _describe_results(task, reduction, counts)


def _choose_scheduler(task: _Task, client: Any, stack: ExitStack) -> AbstractContextManager[Any]:
    """Reduce few features here, on threads, which takes no cluster and no imports on its workers; many on the cluster."""
    import dask

    if open_features(task.output)[0].nbytes <= LOCAL_REDUCE_BYTES:
        # Instances would cost money for nothing meanwhile.
        stack.close()
        return dask.config.set(scheduler="threads")
    client = client or stack.enter_context(task.budget.open_client())
    return client.as_current()  # type: ignore[no-any-return]


def _begin_output(task: _Task, artifact: ModelArtifact, client: Any) -> dict[str, Any]:
    """Write the manifest of a run that begins, and the empty store where there is none."""
    from fruitdask.reduce import check_n_components, check_solver

    shape = {"n_images": task.n_listed, "n_features": artifact.n_features}
    check_n_components(task.config.reduce.n_components, **shape)
    check_solver(task.config.reduce.solver, **shape)
    if task.config.output.overwrite:
        store.clear_output(task.output)
    before, changes = task.manifest or {}, _count_changes(task)
    n_changed = sum(changes.values()) - changes.get("kept", 0)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = {
        "fruitdask": __version__,
        "status": "running",
        "started": started,
        "fingerprint": task.fingerprint,
        "n_images": len(task.rows.catalog),
        "images_per_partition": task.images_per_partition,
        "history": before.get("history", []) + ([{"at": started} | changes] if changes else []),
        "erasures": before.get("erasures", []),
        "model": _describe_model(artifact),
        "cluster": {
            "kind": task.config.cluster.kind,
            "n_workers": len(client.nthreads()),
            "n_threads": sum(client.nthreads().values()),
        },
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in (*_PACKAGES, artifact.engine)},
        "config": dump_config(task.config),
        "regions": task.inputs.regions,
        "processing": describe_processing(task.config),
        "seconds": {},
    } | task.budget.describe()
    manifest |= describe_fit(task.manifest, n_changed)
    store.write_manifest(task.output, manifest)
    manifest["processing"] |= describe_protection(task.config, task.output.child(store.MANIFEST), client)
    attributes = {
        "fruitdask": __version__,
        "fingerprint": task.fingerprint,
        "model": manifest["model"],
        "class_names": sorted(set(task.rows.catalog["label"])),
    }
    _make_room(task, artifact.n_features, attributes)
    return manifest


def _make_room(task: _Task, n_features: int, attributes: dict[str, Any]) -> None:
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
        if changes["kept"] < len(catalog):
            store.write_catalog(output, catalog)
        # Also where the catalog says so already: a run that was interrupted may have come so far and no further.
        store.resize_store(output, n_images=len(catalog), attributes=attributes)


def _featurize(
    task: _Task, artifact: ModelArtifact, client: Any, survey: Survey | None, progress: RunProgress
) -> dict[str, float]:
    """Featurize what has no commit mark, and look at the images meanwhile; gives the seconds of all workers by stage."""
    from fruitdask.featurize import FeaturizeJob, featurize_partition, probe_partition

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
        _check_failures(task, n_failed)
        task.budget.check()
        if task.lock is not None:
            task.lock.check()

    parts = split_catalog(task.rows.catalog, task.images_per_partition)
    todo = (replace(part, rows=backlog.todo[part.index]) for part in parts if part.index in backlog.todo)
    try:
        map_partitions(
            client, featurize_partition, todo, job, delivered=artifact, on_result=note, probe=probe_partition
        )
    except PartitionError:
        # A cluster that is lost may have ended because a limit was reached.
        task.budget.check()
        raise
    return {stage: round(value, 3) for stage, value in seconds.items()}


def _count_changes(task: _Task) -> dict[str, int]:
    """Count what this run changes in results that were there; nothing where it goes on with what an earlier one has begun to change."""
    n_retried = task.backlog.n_retried
    if not (task.committed and (task.has_other_images or n_retried)):
        return {}
    kept = {"added": 0, "changed": 0, "vanished": 0, "kept": task.n_listed} | task.rows.changes
    return kept | {"retried": n_retried, "kept": kept["kept"] - n_retried}


def _plan_survey(task: _Task) -> Survey | None:
    """Plan the exploration that is to be done; None where it is not wanted, or done."""
    if task.config.explore.enabled:
        survey = Survey(task.inputs, images_per_partition=task.images_per_partition)
        if task.config.output.overwrite or not survey.is_done:
            return survey
    # An interrupted exploration may have left those of all images.
    store.delete_thumbnails(task.output)
    return None


def _check_failures(task: _Task, n_failed: int) -> None:
    """End a run in which too many images of the input have failed, and say which."""
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


def _describe_results(task: _Task, reduction: Reduction, counts: report.Counts) -> dict[str, Any]:
    """Say in the manifest what came out."""
    fitted, n_vanished = reduction.components, len(task.rows.catalog) - task.n_listed
    return {
        "status": "complete",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": dump_config(task.config),
        "counts": {"by_status": dict(counts.by_status), "by_class": counts.by_class(), "vanished": n_vanished},
        "pca": {
            "is_kept": reduction.is_kept,
            "fit": reduction.fit,
            "n_components": fitted.n_components,
            "explained_variance_ratio": [round(float(ratio), 6) for ratio in fitted.explained_variance_ratio],
        },
    }


def _select(sections: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Select some sections of a dumped configuration."""
    return {name: sections.get(name) for name in names}


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
