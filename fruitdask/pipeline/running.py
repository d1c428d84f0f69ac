"""A run, from its configuration to its results."""

import platform
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
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
from fruitdask.pipeline.inputs import Inputs, dump_config, prepare_inputs, settle_erasure
from fruitdask.pipeline.planning import LOCAL_REDUCE_BYTES, Plan, Work, estimate
from fruitdask.pipeline.presenting import describe_presentation, present
from fruitdask.pipeline.processing import describe_processing, describe_protection
from fruitdask.pipeline.reducing import reduce_features, write_components
from fruitdask.pipeline.results import PCA, RunResult, open_features
from fruitdask.pipeline.spending import Budget
from fruitdask.progress import RunProgress
from fruitdask.storage import Location, exists

if TYPE_CHECKING:
    from fruitdask.featurize import PartitionSummary
    from fruitdask.reduce import PrincipalComponents

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

    @property
    def config(self) -> Config:
        return self.inputs.config

    @property
    def output(self) -> Location:
        return self.inputs.output

    @property
    def catalog(self) -> pd.DataFrame:
        return self.inputs.catalog

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
    with progress, ExitStack() as locks:
        progress.begin("Listing images")
        task = _prepare(config, client, clock, progress, locks)
        _check_failures(task, _count_failed(task))
        if config.model.weights == "random":
            progress.say("Warning: model.weights is random; features of an untrained network say little about images.")
        survey = _plan_survey(task)
        if task.manifest is not None and task.is_reduced and task.is_presented and survey is None:
            return RunResult(task.output, task.manifest, n_computed=0)
        store.delete_strays(task.output)
        _check_limits(task, client, clock, progress)
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
        n_computed = len(task.catalog) - task.n_images_done
        # Seconds of stages that were done before are those of the run that did them; so is the total, if that computed the features.
        manifest["seconds"] |= clock.seconds | ({"total": clock.total_seconds} if n_computed else {})
        manifest |= {"config": dump_config(config)} | ({"n_computed": n_computed} if n_computed else {})
        record = describe_processing(config, since=manifest["finished"])
        manifest |= {"regions": task.inputs.regions, "processing": manifest.get("processing", {}) | record}
        manifest |= task.budget.describe()
        store.write_manifest(task.output, manifest)
        progress.begin("Drawing")
        manifest = present(config, task.output) or manifest
    return RunResult(task.output, manifest, n_computed=n_computed)


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


def _prepare(config: Config, client: Any, clock: _Clock, progress: RunProgress, locks: ExitStack | None) -> _Task:
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
    manifest = store.check_output(output, fingerprint, overwrite=config.output.overwrite)
    return _Task(
        inputs=inputs,
        fingerprint=fingerprint,
        images_per_partition=(
            manifest["images_per_partition"]
            if manifest
            else config.featurize.images_per_partition or choose_partition_size(len(catalog))
        ),
        manifest=manifest,
        committed=_find_done(output, manifest),
        budget=Budget(
            config.limits,
            # A cluster of somebody else's costs this run nothing.
            config.cluster if client is None else LocalClusterConfig(),
            region=inputs.regions["cluster"],
            manifest=manifest,
            elapsed_seconds=clock.total_seconds,
        ),
        lock=lock,
    )


def _find_done(output: Location, manifest: dict[str, Any] | None) -> frozenset[int]:
    """Find the partitions that are done; one of whose images some were out of reach is not, for they may be within reach by now."""
    if manifest is None or store.open_store(output) is None:
        return frozenset()
    committed = store.list_committed(output)
    if manifest["status"] == "complete" and "unreachable" not in manifest["counts"]["by_status"]:
        return frozenset(committed)
    n_images = manifest["images_per_partition"]
    return frozenset(committed - store.list_unreachable(output, sorted(committed), images_per_partition=n_images))


def _describe_work(task: _Task, client: Any, clock: _Clock) -> Work:
    """Describe what there is to do."""
    return Work(
        task.inputs,
        images_per_partition=task.images_per_partition,
        n_left=len(task.catalog) - task.n_images_done,
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

    check_n_components(task.config.reduce.n_components, n_images=len(task.catalog))
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
    if "dashboard" in client.scheduler_info()["services"]:
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
        reduction = reduce_features(task.config, task.output, task.catalog["label"].to_numpy())
    progress.begin("Writing results")
    with clock.measure("write"):
        # Should this be interrupted, the next run must not take a mixture of old and new tables for results.
        manifest = manifest | {"status": "running"}
        store.write_manifest(task.output, manifest)
        # They show other numbers; whether they are drawn again is for the configuration to say.
        for name in (report.PAGE, *(f"{store.FIGURES}/{figure}.png" for figure in store.FIGURE_NAMES)):
            store.delete_result(task.output, name)
        outcomes = store.read_outcomes(task.output, range(task.n_partitions))
        counts = report.write_results(task.output, outcomes, pca=reduction.scores, tsne=reduction.tsne)
        write_components(task.output, reduction.components)
        store.delete_result(task.output, store.QUALITY)
        if reduction.quality is not None:
            store.write_json(task.output.child(store.QUALITY), reduction.quality)
    return manifest | _describe_results(task, reduction.components, counts)


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

    shape = {"n_images": len(task.catalog), "n_features": artifact.n_features}
    check_n_components(task.config.reduce.n_components, **shape)
    check_solver(task.config.reduce.solver, **shape)
    if task.config.output.overwrite:
        store.clear_output(task.output)
    manifest = {
        "fruitdask": __version__,
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "fingerprint": task.fingerprint,
        "n_images": len(task.catalog),
        "images_per_partition": task.images_per_partition,
        "erasures": (task.manifest or {}).get("erasures", []),
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
    store.write_manifest(task.output, manifest)
    manifest["processing"] |= describe_protection(task.config, task.output.child(store.MANIFEST), client)
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


def _featurize(
    task: _Task, artifact: ModelArtifact, client: Any, survey: Survey | None, progress: RunProgress
) -> dict[str, float]:
    """Featurize what has no commit mark, and look at the images meanwhile; gives the seconds of all workers by stage."""
    from fruitdask.featurize import FeaturizeJob, featurize_partition, probe_partition

    explore_job = survey.begin() if survey is not None else None
    if explore_job is not None and explore_job.input_px != artifact.input_px:
        explore_job = None
    job = FeaturizeJob(task.inputs.source, task.output, explore_job)
    seconds: Counter[str] = Counter()
    n_failed = _count_failed(task)
    progress.begin("Featurizing")
    progress.begin_images(len(task.catalog), n_done=task.n_images_done)

    def note(summary: "PartitionSummary") -> None:
        nonlocal n_failed
        n_failed += summary.n_failed
        seconds.update(summary.seconds)
        if survey is not None and summary.findings is not None:
            survey.add(summary.findings)
        progress.advance(summary.n_images, n_failed=summary.n_failed)
        _check_failures(task, n_failed)
        task.budget.check()
        if task.lock is not None:
            task.lock.check()

    todo = (part for part in split_catalog(task.catalog, task.images_per_partition) if part.index not in task.committed)
    try:
        map_partitions(
            client, featurize_partition, todo, job, delivered=artifact, on_result=note, probe=probe_partition
        )
    except PartitionError:
        # A cluster that is lost may have ended because a limit was reached.
        task.budget.check()
        raise
    return {stage: round(value, 3) for stage, value in seconds.items()}


def _count_failed(task: _Task) -> int:
    """Count the failures of an earlier run."""
    if task.manifest is not None and task.manifest["status"] == "complete" and task.has_features:
        by_status: dict[str, int] = task.manifest["counts"]["by_status"]
        return sum(by_status.values()) - by_status.get("ok", 0)
    tables = store.read_outcomes(task.output, sorted(task.committed))
    return sum(int((table["status"] != "ok").sum()) for table in tables)


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


def _describe_results(task: _Task, fitted: "PrincipalComponents", counts: report.Counts) -> dict[str, Any]:
    """Say in the manifest what came out."""
    return {
        "status": "complete",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": dump_config(task.config),
        "counts": {"by_status": dict(counts.by_status), "by_class": counts.by_class()},
        "pca": {
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
